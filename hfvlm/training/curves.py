"""An image of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the training loss and, next to it, the recalls of the evaluations, over the steps; PNG.

    Args:
        history: `trainer.state.log_history`.
        path: of the new image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses, recalls = figure.subplots(1, 2)
    losses.plot(*curve(history, "loss"), color="tab:blue")
    losses.set(xlabel="step", ylabel="training loss")
    names = sorted({name for entry in history for name in entry if "recall@1" in name and not name.endswith("0")})
    for name in names:
        label = name.removeprefix("eval_").replace("_recall@1", "").replace("_", " ")
        recalls.plot(*curve(history, name), marker=".", label=label)
    recalls.set(xlabel="step", ylabel="recall@1", ylim=(0, 1.02))
    if names:
        recalls.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def curve(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of everything that was logged under a name."""
    entries = [entry for entry in history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]
