"""Several processes that talk to each other, on one machine without a GPU."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(rank, *args)` in `size` processes of one gloo group -> what each returned, in the order of the ranks.

    The function must be importable by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (function, size, Path(folder), args), nprocs=size)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def _process(rank: int, function: Callable[..., Any], size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        torch.save(function(rank, *args), folder / str(rank))
    finally:
        dist.destroy_process_group()
