"""Several processes that talk to each other, on one machine without a GPU, and scripts run as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
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


# Runs in the nursery: forks itself for each line that it reads, and answers with the exit code.
NURSERY = """
import atexit, json, os, signal, sys, traceback
import torch._dynamo, torch._inductor.compile_fx, torch.distributed.tensor, scipy.optimize, sklearn.linear_model

def live(request):
    signal.alarm(300)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(request["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:], sys.argv[:] = request["path"], ["-c", *request["arguments"]]
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

others = {"transformers", "peft", "huggingface_hub", "datasets", "hfvlm"}
assert others.isdisjoint(sys.modules)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = live(json.loads(line))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@cache
def nursery() -> subprocess.Popen[str]:
    """A process that has imported torch and scipy, and neither transformers nor what builds on it."""
    return subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_fresh(code: str, *arguments: Any, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c code arguments` does, in a process that has imported nothing but torch and scipy: their
    import is most of what a new interpreter takes."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        request = {
            "code": textwrap.dedent(code),
            "arguments": [str(argument) for argument in arguments],
            "environment": os.environ | environment,
            "folder": os.getcwd(),
            "path": sys.path,
            "outputs": [str(path) for path in outputs],
        }
        server = nursery()
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        done = subprocess.CompletedProcess(["python", "-c"], status, *(path.read_text() for path in outputs))
    assert not (check and status), done.stderr[-3000:]
    return done
