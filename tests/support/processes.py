"""Several processes that talk to each other, on one machine without a GPU, and scripts run as a user runs them."""

import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A process is a fork of a server, which imports what they have in common once a session.
forks = get_context("forkserver")
forks.set_forkserver_preload(["tests.support.suite", "hfvlm.training"])


def run_processes(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(rank, *args)` in `size` processes of one gloo group -> what each returned, in the order of the ranks.

    The function must be importable by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (function, size, Path(folder), args), nprocs=size, start_method="forkserver")
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


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own, whose environment it may change -> what it returns or raises."""
    with ProcessPoolExecutor(1, forks) as executor:
        return executor.submit(function, *args).result()


def run_script(path: Path, *arguments: Any) -> None:
    """Run a script as `python path arguments` does, in this process: its libraries are imported already."""
    with patch.object(sys, "argv", [str(path), *map(str, arguments)]):
        runpy.run_path(str(path), run_name="__main__")
