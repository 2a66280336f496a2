"""An image of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the training loss and, next to it, any recalls of evaluations over the steps; PNG.

    Args:
        history: `trainer.state.log_history`.
        path: of the new image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for entry in history for name in entry if "recall@1" in name and not name.endswith("0")})
    figure = Figure(figsize=(9 if names else 4.5, 3.2))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.08 if names else 0.16, right=0.98, bottom=0.16, top=0.96)
    losses, *others = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    losses.plot(*curve(history, "loss"), color="tab:blue")
    losses.set(xlabel="step", ylabel="training loss")
    for recalls in others:
        for name in names:
            label = name.removeprefix("eval_").replace("_recall@1", "").replace("_", " ")
            recalls.plot(*curve(history, name), marker=".", label=label)
        recalls.set(xlabel="step", ylabel="recall@1", ylim=(0, 1.02))
        recalls.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def curve(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of everything that was logged under a name."""
    entries = [entry for entry in history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]
