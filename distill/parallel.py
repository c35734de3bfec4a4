"""Several processes that torchrun started, as one run: who is who, what all must agree on, and what if one is lost.

`joined` reads what torchrun put into the environment and gives a `World`; without torchrun it is `ALONE` and costs
nothing. Numbers are added in the order of the ranks on every process, so all of them hold the same bits and every
decision that follows from them (to stop, to save, which weights are best) is the same everywhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from distill.options import DistillOptions
from nano.errors import NanokitError, PeerLostError, RequestError, UnsupportedError, WorkError

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first cuts the student alone meanwhile. A death is noticed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: this one's number.
        size: how many there are.
        local_rank: its number on this host.
        mesh: torch's one-dimensional DeviceMesh over them, that models are sharded on; None where there is but one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes; the same bits everywhere."""
        if self.mesh is None:
            return list(values)
        import torch

        mine = torch.tensor(values, dtype=torch.float64)
        all_WX = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(all_WX, mine)
        return [float(x) for x in torch.stack(all_WX).sum(0)]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.mesh is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def shared(self, value: T | None) -> T:
        """The first process's value, on all."""
        first: T | None = self.gathered(value if self.first else None)[0]
        return first  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all are here."""
        self.gathered(None)

    def checked(self, work: Callable[[], T]) -> T:
        """Do `work` on every process, on each host the first one before the others (it fills caches they then read).

        Raises:
            NanokitError: what the first process that failed raised, on all.
        """
        if self.mesh is None:
            return work()
        made, error = _attempt(work) if self.local_rank == 0 else (None, None)
        self.wait()
        if self.local_rank:
            made, error = _attempt(work)
        self._agree(error)
        return made  # type: ignore[return-value]

    def lead(self, work: Callable[[], T]) -> T | None:
        """Do `work` on the first process while the others wait; None there.

        Raises:
            NanokitError: what it raised, on all.
        """
        if self.mesh is None:
            return work()
        made, error = _attempt(work) if self.first else (None, None)
        self._agree(error)
        return made

    def _agree(self, error: NanokitError | None) -> None:
        found = next((error for error in self.gathered(error) if error), None)
        if found:
            raise found


ALONE = World()


def _attempt(work: Callable[[], T]) -> tuple[T | None, NanokitError | None]:
    try:
        return work(), None
    except NanokitError as error:
        return None, error


def check_together(options: DistillOptions) -> None:
    """Refuse what several processes cannot do.

    Raises:
        UnsupportedError: continuations of the student's own, bitsandbytes' optimizers, another tokenizer, or a search.
    """
    for name, wanted, instead in (
        (f"--on-policy {options.on_policy:g}", options.on_policy > 0, "leave it out, or use one device"),
        (f"--optimizer {options.optimizer}", options.optimizer != "adamw", "its moments are sharded: adamw is enough"),
        (f"--cross-tokenizer {options.cross_tokenizer}", options.cross_tokenizer != "none", "use one device"),
        (f"--shapes {options.shapes}", options.shapes > 1,
         "find the shape in one process (--shapes N --steps 0), then train that folder: --student FOLDER"),
    ):  # fmt: skip
        if wanted:
            raise UnsupportedError("That runs on one device only.", found=f"{name} under torchrun", todo=instead)


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started this one among; `ALONE` where it did not, or started one.

    Raises:
        RequestError: more processes on this host than it has GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    local, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise RequestError(
                "There are more processes than GPUs.",
                found=f"--nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')}, {torch.cuda.device_count()} GPUs",
                todo="torchrun --nproc-per-node gpu",
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield World(dist.get_rank(), size, local, init_device_mesh("cuda" if cuda else "cpu", (size,)))
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process went away, in gloo's words or NCCL's."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def lost_peer(error: BaseException, world: World, kept: str) -> WorkError:
    """What to raise then; one process beside the first tells it as well, for the first may be the one that is lost.

    Args:
        error: what the communication failed with.
        world: the run.
        kept: what is left to go on from, in words for people.
    """
    kind = PeerLostError if not world.first and _elected() else WorkError
    return kind(
        "Another process of the run was lost.",
        found=f"rank {world.rank} of {world.size}: {(str(error).splitlines() or [''])[0][:200]}",
        todo=f"{kept} (what ended it is in its own output, or in the system's log if memory ran out)",
    )


def _elected() -> bool:
    """Whether this is the first of the survivors that asks; torchrun itself keeps the count."""
    import torch.distributed as dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return bool(store.add("nanokit/lost", 1) == 1)
    except (dist.DistError, RuntimeError):
        return True
