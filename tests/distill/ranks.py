"""Runs `nanokit` on several processes as torchrun would, without importing torch anew for each: they are forked.

Reads one JSON object a line: {"count": processes, "arguments": [...], "log": prefix}. Writes two lines for each: the
processes' ids, and, when all are gone, their statuses (negative: the signal that ended it). What process r prints
goes to PREFIX.r.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.auto.modeling_auto  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh  # noqa: F401

import distill.work  # noqa: F401
from nano.cli import run


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def be(rank: int, count: int, port: int, arguments: list[str], log: str) -> None:
    """Become a process of the run; does not return."""
    status = 99
    try:
        out = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(
            TORCHELASTIC_RUN_ID=log, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        torch.set_num_threads(1)
        status = run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        port, ids = free_port(), []
        for rank in range(asked["count"]):
            child = os.fork()
            if not child:
                be(rank, asked["count"], port, asked["arguments"], asked["log"])
            ids.append(child)
        print(json.dumps(ids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ids]), flush=True)


if __name__ == "__main__":
    main()
