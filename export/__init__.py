"""Int4 checkpoint to phone files: the same codes and scales, bit for bit, in ExecuTorch and ONNX."""
