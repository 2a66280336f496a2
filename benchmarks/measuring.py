"""How a time and a peak of memory are measured here."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run the contenders one after the other, `rounds` times: wall and CPU seconds of every run, by name.

    Neighbours in time share whatever else the machine does; the first run of each is not counted.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if round_:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ratio(base: list[tuple[float, float]], ours: list[tuple[float, float]], clock: int = 1) -> float:
    """How many times as long the base took: the median over the rounds; clock 0 is wall time, 1 CPU time."""
    return statistics.median(b[clock] / o[clock] for b, o in zip(base, ours, strict=True))


def peak_memory(code: str, *arguments: str) -> float:
    """MiB by which a fresh process grew at most between the `start()` and the `stop()` in `code`; Linux."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE + code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


PROBE = """
import sys
def status(key): return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) / 1024
def start():
    global before
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
def stop(): print(status("VmHWM") - before)
"""


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
