// A .pte loaded as a phone app loads it, with XNNPACK's packed weights in a file: ExecuTorch's runtime API alone, the
// options given where the program is loaded (LoadBackendOptionsMap). The Python wheel has no way to give them.
// Built and called by packed_cache.py against the wheel's own headers and library.
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace rt = executorch::runtime;
namespace ea = executorch::aten;

// Maps each segment on its own, without locking it, as ExecuTorch's MmapDataLoader does on Android.
class Mapped final : public rt::DataLoader {
 public:
  explicit Mapped(const char* path) : fd_(open(path, O_RDONLY)) {
    struct stat found {};
    if (fd_ >= 0 && fstat(fd_, &found) == 0) size_ = found.st_size;
  }
  ~Mapped() override { if (fd_ >= 0) close(fd_); }

  rt::Result<rt::FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    const size_t page = sysconf(_SC_PAGESIZE), lead = offset % page;
    void* at = mmap(nullptr, size + lead, PROT_READ, MAP_PRIVATE, fd_, offset - lead);
    if (at == MAP_FAILED) return rt::Error::AccessFailed;
    return rt::FreeableBuffer(static_cast<uint8_t*>(at) + lead, size, unmap, reinterpret_cast<void*>(lead));
  }
  rt::Error load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const override {
    return pread(fd_, buffer, size, offset) == ssize_t(size) ? rt::Error::Ok : rt::Error::AccessFailed;
  }
  rt::Result<size_t> size() const override { return size_; }

 private:
  static void unmap(void* lead, void* data, size_t size) {
    const size_t ahead = reinterpret_cast<size_t>(lead);
    munmap(static_cast<uint8_t*>(data) - ahead, size + ahead);
  }
  int fd_;
  size_t size_ = 0;
};

class Heap final : public rt::MemoryAllocator {
 public:
  Heap() : MemoryAllocator(0, nullptr) {}
  ~Heap() override { reset(); }
  void* allocate(size_t size, size_t alignment) override {
    void* at = nullptr;
    if (posix_memalign(&at, alignment < 16 ? 16 : alignment, size ? size : 1) != 0) return nullptr;
    held_.push_back(at);
    return at;
  }
  void reset() override {
    for (void* at : held_) free(at);
    held_.clear();
  }

 private:
  std::vector<void*> held_;
};

struct Model {
  std::unique_ptr<Mapped> loader;
  std::unique_ptr<rt::Program> program;
  Heap method_heap, temporary;
  std::vector<std::unique_ptr<uint8_t[]>> planned;
  std::vector<rt::Span<uint8_t>> spans;
  std::unique_ptr<rt::HierarchicalAllocator> hierarchy;
  std::unique_ptr<rt::MemoryManager> manager;
  rt::BackendOptions<2> options;
  rt::LoadBackendOptionsMap map;
  std::unique_ptr<rt::Method> method;
};

extern "C" Model* load_pte(const char* path, const char* cache, int use_cache) {
  rt::runtime_init();
  auto model = std::make_unique<Model>();
  model->loader = std::make_unique<Mapped>(path);
  auto program = rt::Program::load(model->loader.get());
  if (!program.ok()) return nullptr;
  model->program = std::make_unique<rt::Program>(std::move(program.get()));
  auto meta = model->program->method_meta("forward");
  if (!meta.ok()) return nullptr;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const size_t size = meta->memory_planned_buffer_size(i).get();
    model->planned.push_back(std::make_unique<uint8_t[]>(size));
    model->spans.push_back({model->planned.back().get(), size});
  }
  model->hierarchy = std::make_unique<rt::HierarchicalAllocator>(
      rt::Span<rt::Span<uint8_t>>(model->spans.data(), model->spans.size()));
  model->manager =
      std::make_unique<rt::MemoryManager>(&model->method_heap, model->hierarchy.get(), &model->temporary);
  (void)model->options.set_option("weight_cache_enabled", use_cache != 0);
  if (use_cache && cache[0]) (void)model->options.set_option("packed_cache_path", cache);
  (void)model->map.set_options("XnnpackBackend", model->options.view());
  auto method = model->program->load_method("forward", model->manager.get(), nullptr, nullptr, &model->map);
  if (!method.ok()) return nullptr;
  model->method = std::make_unique<rt::Method>(std::move(method.get()));
  return model.release();
}

// One call; returns the number of logits, or -1, and the largest one's place in *best.
extern "C" int64_t step_pte(Model* model, int64_t* ids, int32_t count, int64_t position, int64_t* best) {
  ea::SizesType sizes[2] = {1, count}, one[1] = {1};
  ea::DimOrderType order[2] = {0, 1};
  ea::StridesType strides[2] = {count, 1}, unit[1] = {1};
  ea::TensorImpl tokens(ea::ScalarType::Long, 2, sizes, ids, order, strides);
  ea::TensorImpl start(ea::ScalarType::Long, 1, one, &position, order, unit);
  if (model->method->set_input(rt::EValue(ea::Tensor(&tokens)), 0) != rt::Error::Ok) return -1;
  if (model->method->set_input(rt::EValue(ea::Tensor(&start)), 1) != rt::Error::Ok) return -1;
  if (model->method->execute() != rt::Error::Ok) return -1;
  const auto logits = model->method->get_output(0).toTensor();
  const float* row = logits.const_data_ptr<float>();
  *best = 0;
  for (int64_t i = 1; i < logits.numel(); ++i)
    if (row[i] > row[*best]) *best = i;
  return logits.numel();
}
