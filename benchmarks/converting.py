"""Memory of converting and exporting, next to the size of the file.

python -m benchmarks.converting [--quick] [--output converting.json]
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModel

import hfvlm
from benchmarks.measuring import Growth, Item, Row, Run, Size, peak_memory
from benchmarks.models import WIDE, clip_tiny
from benchmarks.report import main
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion import clip

MIB = 2**20


def rows(size: Size) -> Iterator[Item]:
    with TemporaryDirectory() as folder:
        path = released(Path(folder) / "released.pt", size.pick(2, 12))
        output = str(Path(folder) / "output")
        peaks = {
            "hfvlm": ("benchmarks.converting", "converting", path, output),
            "careful": ("benchmarks.converting", "loading", path, output),
        }
        ways = {"hfvlm": converting(str(path), output), "careful": loading(str(path), output)}
        yield Row(f"memory of converting {path.stat().st_size / MIB:.0f} MiB", ways, memory=peaks, timed=False)
        if not size.quick:
            paths = {n: released(Path(folder) / f"{n}.pt", n) for n in (6, 12, 24)}
            yield Growth(
                "memory of converting with layers",
                tuple(paths),
                lambda n: peak_memory("benchmarks.converting", "converting", paths[n], output),
                1.1,
            )


def released(path: Path, layers: int) -> Path:
    """Write a CLIP with random weights in OpenAI's layout."""
    fields = AutoModel.from_pretrained(clip_tiny()).config.to_dict()
    vision = fields["vision_config"] | WIDE | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    config = type(AutoModel.from_pretrained(clip_tiny()).config)(
        vision_config=vision, text_config=fields["text_config"]
    )
    state = restore_keys(AutoModel.from_config(config).state_dict(), clip.keys_for(config, "openai"))
    torch.save({"state_dict": state}, path)
    return path


def converting(path: str, output: str) -> Run:
    """Convert a file -> the sum of a tensor."""
    hfvlm.convert(path, "clip", f"{output}-before", vocabulary="none", overwrite=True)

    def run() -> float:
        folder = hfvlm.convert(path, "clip", output, vocabulary="none", overwrite=True)
        return float(AutoModel.from_pretrained(folder).vision_model.position.detach().sum())

    return run


def loading(path: str, output: str) -> Run:
    """Load the whole file, and save it as it is."""

    def run() -> float:
        state = torch.load(path)["state_dict"]
        torch.save(state, f"{output}.pt")
        return float(state["visual.positional_embedding"].sum())

    return run


if __name__ == "__main__":
    main({"converting": rows}, __doc__)
