"""Contrastive losses, forward and backward, at 512 dimensions: hfvlm's against the formulas of transformers and
open_clip.

    python -m benchmarks.losses [--sizes 1024 2048 4096 8192 16384 32768] [--rounds 3] [--output losses.json]

Memory is the growth of a fresh process. The formulas hold several matrices of B x B numbers: they are left out where
those would not fit into `--limit` GiB.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import interleaved, machine, peak_memory, ratio
from hfvlm.losses import contrastive_loss, sigmoid_loss

DIM = 512
MATRICES = 5  # of B x B numbers that the formulas hold at most


def transformers_softmax(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`clip_loss` of transformers 5."""
    logits = a @ b.t() * scale
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits.t(), labels) + F.cross_entropy(logits, labels)) / 2


def open_clip_softmax(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`ClipLoss` of open_clip: a product for each direction."""
    labels = torch.arange(len(a))
    return (F.cross_entropy(scale * a @ b.t(), labels) + F.cross_entropy(scale * b @ a.t(), labels)) / 2


def transformers_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`SiglipModel`'s loss in transformers 5."""
    logits = b @ a.t() * scale + bias
    eye = torch.eye(len(logits))
    return -F.logsigmoid((2 * eye - torch.ones_like(logits)) * logits).sum(dim=-1).mean()


def open_clip_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`SigLipLoss` of open_clip."""
    labels = 2 * torch.eye(len(a)) - torch.ones(len(a), len(a))
    return -F.logsigmoid(labels * (scale * a @ b.t() + bias)).sum() / len(a)


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "softmax": {"hfvlm": contrastive_loss, "transformers": transformers_softmax, "open_clip": open_clip_softmax},
    "sigmoid": {"hfvlm": sigmoid_loss, "transformers": transformers_sigmoid, "open_clip": open_clip_sigmoid},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that a formula may hold")
    parser.add_argument("--output", type=Path, default=Path("losses.json"))
    arguments = parser.parse_args()
    rows = [
        measure(loss, size, arguments.rounds, arguments.limit) for loss in LOSSES for size in sorted(arguments.sizes)
    ]
    arguments.output.write_text(json.dumps({"machine": machine(), "dim": DIM, "rows": rows}, indent=2) + "\n")
    Console().print(table(rows))
    plot(rows, arguments.output.with_suffix(".png"))


def inputs(size: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(size, DIM), dim=-1).requires_grad_() for _ in range(2))
    return a, b, torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)


def step(loss: str, name: str, tensors: tuple[Tensor, ...]) -> Tensor:
    for tensor in tensors:
        tensor.grad = None
    value = LOSSES[loss][name](*tensors)
    value.backward()
    return value


def measure(loss: str, size: int, rounds: int, limit: float) -> dict[str, Any]:
    tensors = inputs(size)
    fits = MATRICES * size**2 * 4 < limit * 2**30
    names = [name for name in LOSSES[loss] if fits or name == "hfvlm"]
    contenders = {name: (lambda name=name: step(loss, name, tensors)) for name in names}
    times = interleaved(contenders, rounds)
    row: dict[str, Any] = {"loss": loss, "batch": size}
    for name in names:
        row[name] = {
            "wall_seconds": min(wall for wall, _ in times[name]),
            "peak_mib": peak_memory(MEMORY, loss, name, str(size)),
            "times_as_long_as_hfvlm": ratio(times[name], times["hfvlm"]),
        }
    return row


MEMORY = """
import torch
from benchmarks.losses import inputs, step
loss, name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
step(loss, name, inputs(64))
tensors = inputs(size)
start()
step(loss, name, tensors)
stop()
"""


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(
        "loss", "batch", "hfvlm, s", "transformers, ratio", "open_clip, ratio", "peak MiB of the three", box=None
    )
    for row in rows:
        found = [row.get(name) for name in ("hfvlm", "transformers", "open_clip")]
        ratios = [f"{part['times_as_long_as_hfvlm']:.2f}" if part else "-" for part in found[1:]]
        peaks = " / ".join(f"{part['peak_mib']:.0f}" if part else "-" for part in found)
        result.add_row(row["loss"], f"{row['batch']:,}", f"{row['hfvlm']['wall_seconds']:.2f}", *ratios, peaks)
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, label) in zip(
        figure.subplots(1, 2), (("wall_seconds", "seconds"), ("peak_mib", "peak MiB")), strict=True
    ):
        for loss, style in (("softmax", "-"), ("sigmoid", "--")):
            for name, colour in (("hfvlm", "tab:blue"), ("transformers", "tab:orange"), ("open_clip", "tab:green")):
                points = [(row["batch"], row[name][key]) for row in rows if row["loss"] == loss and name in row]
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{name}, {loss}")
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=label)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
