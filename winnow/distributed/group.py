"""The process group of the ranks, through which their layers' sums go.

Tensors on GPUs go by NCCL, and all else by gloo.
"""

import logging
import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from winnow.distributed.heads import Split

logger = logging.getLogger(__name__)

# A rank that dies ends the worker at once; this is for one that hangs. One may load for much longer
# than another, from a disk that all of them read.
LOADING_TIMEOUT = timedelta(minutes=30)
STEP_TIMEOUT = timedelta(minutes=5)
_LEAVING_TIMEOUT_S = 10.0


def join(split: Split, rendezvous: str, device: str) -> None:
    """Join the group of this process's model; returns when all ranks have.

    rendezvous: path of a file, the same for all ranks, that does not exist before.
    """
    on_gpu = device.startswith("cuda")
    # The ranks are on one machine, whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["LOCAL_RANK"] = str(split.rank)  # transformers loads to this GPU
    if on_gpu:
        torch.cuda.set_device(split.rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{rendezvous}",
        rank=split.rank,
        world_size=split.num_ranks,
        timeout=LOADING_TIMEOUT,
    )


def expect_steps() -> None:
    """All ranks have loaded: from now on each has to take part in time."""
    _set_pg_timeout(STEP_TIMEOUT)


def leave() -> None:
    """Leave the group, if this process is in one.

    NCCL may wait for other ranks then, which have ended, and waits for ever while a graph exists
    that it is recorded in.
    """
    if not dist.is_initialized():
        return
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(_LEAVING_TIMEOUT_S)
    if leaving.is_alive():
        logger.warning("the ranks' group is not left after %g s", _LEAVING_TIMEOUT_S)


def device_of(device: str, rank: int) -> str:
    """The torch device of a rank: the GPU of its number."""
    return f"cuda:{rank}" if device.startswith("cuda") else device
