"""How time, memory, work and growth are measured here."""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Any]
# For which a row is measured, and rounds that it has whatever they take.
SECONDS, FEWEST = 8.0, 3


@dataclass
class Size:
    """How large inputs and models are, and where models run."""

    quick: bool = False
    device: str = "cpu"

    def pick(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full


@dataclass
class Row:
    """Several ways to one result: "hfvlm" and at least one peer of `report.PEERS`.

    Args:
        name: of the row.
        ways: what each calls; results are equal arrays, or numbers, texts and ids.
        tolerance: of results, relative to the largest value; 0 for equal ones.
        memory: of each way the arguments of `peak_memory`, where it is measured.
        timed: whether time is, too.
    """

    name: str
    ways: Mapping[str, Run]
    tolerance: float = 1e-4
    memory: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    timed: bool = True


@dataclass
class Growth:
    """How a quantity grows: the largest exponent between two neighbouring sizes is at most `most`.

    Args:
        name: what grows, with what.
        sizes: at least two.
        measure: size -> quantity, such as `work` or `peak_memory`.
        most: the exponent that is promised.
    """

    name: str
    sizes: Sequence[int]
    measure: Callable[[int], float]
    most: float

    def exponent(self) -> float:
        found = [(size, max(self.measure(size), 1e-9)) for size in self.sizes]
        return max(log(high / low) / log(large / small) for (small, low), (large, high) in pairwise(found))


@dataclass
class Options:
    """Ways of hfvlm itself to nearly one result: "hfvlm" as it comes, and some of `report.OPTIONS`.

    Args:
        name: of the row.
        ways: what each calls.
        tolerance: of results, as that of a `Row`; what an option is off by is told in any case.
        score: result -> a share, such as an accuracy, which is told in place of times.
    """

    name: str
    ways: Mapping[str, Run]
    tolerance: float
    score: Callable[[Any], float] | None = None


Item = Row | Growth | Options
Workload = Callable[[Size], Iterator[Item]]


def measure(item: Item, size: Size, rounds: int) -> dict[str, Any]:
    """Check a row and, unless it is quick, time it; or measure a growth.

    Raises:
        RuntimeError: two ways disagree, or something grows faster than it is promised to.
    """
    if isinstance(item, Growth):
        exponent = item.exponent()
        if exponent > item.most:
            raise RuntimeError(f"{item.name}: grows with the power {exponent:.2f}, not {item.most}.")
        return {"name": item.name, "exponent": exponent, "most": item.most}
    if isinstance(item, Options):
        return compare(item, size, rounds)
    row = {"name": item.name, "error": check_equal(item)}
    if size.quick:
        return row
    if item.memory:
        row["peak_mib"] = {name: peak_memory(*arguments) for name, arguments in item.memory.items()}
    if item.timed:
        times = interleaved(item.ways, rounds, size.device)
        row["seconds"] = {name: statistics.median(wall for wall, _ in found) for name, found in times.items()}
        clock = 0 if size.device == "cuda" else 1
        row["ratios"] = {
            name: ratios(found, times["hfvlm"], clock) for name, found in times.items() if name != "hfvlm"
        }
    return row


def compare(item: Options, size: Size, rounds: int) -> dict[str, Any]:
    """Check options, and score them or, unless they are quick, time them: how many times as fast each of them is.

    Raises:
        RuntimeError: one is further off than the tolerance.
    """
    results = {name: run() for name, run in item.ways.items()}
    off = {
        name: check_equal(Row(item.name, {"hfvlm": lambda: results["hfvlm"], name: lambda r=r: r}, item.tolerance))
        for name, r in results.items()
        if name != "hfvlm"
    }
    row: dict[str, Any] = {"name": item.name, "off": off}
    if item.score is not None:
        return row | {"scores": {name: item.score(result) for name, result in results.items()}}
    if size.quick:
        return row
    times = interleaved(item.ways, rounds, size.device)
    clock = 0 if size.device == "cuda" else 1
    row["seconds"] = {name: statistics.median(wall for wall, _ in taken) for name, taken in times.items()}
    row["gains"] = {name: ratios(times["hfvlm"], times[name], clock) for name in off}
    return row


def check_equal(row: Row) -> float:
    """Compare all ways' results with hfvlm's -> the largest error.

    Raises:
        RuntimeError: one is further off than the row's tolerance.
    """
    results = {name: arrays(run()) for name, run in row.ways.items()}
    ours, worst = results.pop("hfvlm"), 0.0
    for name, theirs in results.items():
        if len(ours) != len(theirs):
            raise RuntimeError(f"{row.name}: hfvlm has {len(ours)} results, {name} {len(theirs)}.")
        worst = max([worst, *(error(a, b) for a, b in zip(ours, theirs, strict=True))])
        if not worst <= row.tolerance:
            raise RuntimeError(f"{row.name}: hfvlm and {name} differ by {worst:.1e}.")
    return worst


def arrays(result: Any) -> list[np.ndarray]:
    """Turn a result, or a list of such, into arrays."""
    if isinstance(result, list | tuple):
        return [array for part in result for array in arrays(part)]
    return [result.detach().float().cpu().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)]


def error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the largest value; of texts 0 or infinity."""
    if a.shape != b.shape or a.dtype.kind in "US":
        return 0.0 if np.array_equal(a, b) else float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))


def interleaved(ways: Mapping[str, Run], rounds: int, device: str = "cpu") -> dict[str, list[tuple[float, float]]]:
    """Run all ways in turn, in alternating order: wall and CPU seconds of every run, by name.

    Neighbours in time share whatever else the machine does. Rounds end after `SECONDS`, if there were `FEWEST`. What
    the first run of a way sets up is to have been set up before.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    began = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= FEWEST and time.perf_counter() - began > SECONDS:
            break
        for name, run in list(ways.items())[:: 1 if round_ % 2 else -1]:
            gc.collect()
            wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wait(device)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def wait(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(base: list[tuple[float, float]], ours: list[tuple[float, float]], clock: int) -> dict[str, float]:
    """How many times as long the base took, over the rounds; clock 0 is wall time, 1 CPU time."""
    found = [b[clock] / max(o[clock], 1e-9) for b, o in zip(base, ours, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def work(run: Run) -> float:
    """Count the floating-point operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def peak_memory(module: str, function: str, *arguments: Any) -> float:
    """MiB by which a fresh process grows in `module.function(*arguments)`, which returns what is measured; Linux."""
    code = PROBE.format(module=module, function=function, arguments=[str(argument) for argument in arguments])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


PROBE = """
import torch
from {module} import {function}
torch.set_num_threads(1)
def status(key): return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) / 1024
run = {function}(*{arguments})
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run()
print(status("VmHWM") - before)
"""


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        # bfloat16 and 8-bit products are fast where there are instructions for them.
        "instructions": "CUDA" if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gflops": {f"{rows} x 768 x 3072": product_speed(rows, device) for rows in (1, 50, 400, 1600)},
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def product_speed(rows: int, device: str) -> float:
    """GFLOP/s of a float32 product."""
    x, weight = torch.randn(rows, 768, device=device), torch.randn(3072, 768, device=device)
    repeats = max(1, 1600 // rows)
    times = interleaved({"product": lambda: [x @ weight.t() for _ in range(repeats)]}, 5, device)["product"]
    return 2 * rows * 768 * 3072 * repeats / min(wall for wall, _ in times) / 1e9
