"""CLIP ViT-B/32 with equal (random) weights: hfvlm's against transformers' own, encoding and training.

    python -m benchmarks.clip [--preset clip/vit-b-32] [--batch 16] [--rounds 5] [--output clip.json]

Captions have 8 to 20 tokens. transformers' model gets them padded to 77, as in CLIP's training, and padded to the
longest; hfvlm's reads no padding either way.
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
from transformers import CLIPModel

import hfvlm
from benchmarks.measuring import interleaved, machine, ratio
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.clip import keys_for
from hfvlm.conversion.interop.clip import config_to_transformers
from hfvlm.models.clip import HfvlmCLIPModel

CONTEXT, SHORTEST, LONGEST = 77, 8, 20
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="clip/vit-b-32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("clip.json"))
    arguments = parser.parse_args()
    ours, theirs = models(arguments.preset)
    pixels, padded, trimmed = inputs(ours, arguments.batch)
    check_equal(ours, theirs, pixels, padded)
    rows = []
    for task, contenders in tasks(ours, theirs, pixels, padded, trimmed).items():
        times = interleaved(contenders, arguments.rounds)
        rows.append({"task": task, "hfvlm_seconds": min(wall for wall, _ in times["hfvlm"])})
        rows[-1] |= {name: ratio(found, times["hfvlm"]) for name, found in times.items() if name != "hfvlm"}
    report = {"machine": machine(), "preset": arguments.preset, "batch": arguments.batch, "rows": rows}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("task", "hfvlm, s", "transformers at 77, ratio", "transformers at the longest, ratio", box=None)
    for row in rows:
        ratios = [f"{row[name]:.2f}" if name in row else "-" for name in ("padded to 77", "padded to the longest")]
        table.add_row(row["task"], f"{row['hfvlm_seconds']:.3f}", *ratios)
    Console().print(table)


def models(preset: str) -> tuple[HfvlmCLIPModel, CLIPModel]:
    """Two models of the same weights."""
    torch.manual_seed(0)
    config = hfvlm.load_preset(preset).make_config()
    ours, theirs = HfvlmCLIPModel(config).eval(), CLIPModel(config_to_transformers(config)).eval()
    state = restore_keys(ours.state_dict(), keys_for(config, "transformers"))
    theirs.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, strict=False)
    return ours, theirs


def inputs(model: HfvlmCLIPModel, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, token ids padded to the context and the same padded to the longest."""
    text, vision = model.config.text_config, model.config.vision_config
    lengths = torch.randint(SHORTEST, LONGEST + 1, (batch,)).tolist()
    ids = torch.full((batch, CONTEXT), text.eos_token_id)
    for row, length in zip(ids, lengths, strict=True):
        row[0] = text.bos_token_id
        row[1 : length - 1] = torch.randint(320, 40000, (length - 2,))
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size)
    return pixels, ids, ids[:, : max(lengths)].contiguous()


def check_equal(ours: HfvlmCLIPModel, theirs: CLIPModel, pixels: Tensor, ids: Tensor) -> None:
    """Times of models that compute different things would mean nothing."""
    with torch.no_grad():
        a, b = (model(pixel_values=pixels, input_ids=ids).logits_per_image for model in (ours, theirs))
    error = ((a - b).abs().max() / b.abs().max()).item()
    if error > TOLERANCE:
        raise RuntimeError(f"The two models' logits differ by {error:.1e}.")


def tasks(
    ours: HfvlmCLIPModel, theirs: CLIPModel, pixels: Tensor, padded: Tensor, trimmed: Tensor
) -> dict[str, dict[str, Callable[[], Any]]]:
    encode = torch.inference_mode()
    return {
        "encode images": {
            "hfvlm": encode(lambda: ours.get_image_features(pixels)),
            "padded to 77": encode(lambda: theirs.get_image_features(pixels)),
        },
        "encode texts": {
            "hfvlm": encode(lambda: ours.get_text_features(padded)),
            "padded to 77": encode(lambda: theirs.get_text_features(padded)),
            "padded to the longest": encode(lambda: theirs.get_text_features(trimmed)),
        },
        "train": {
            "hfvlm": training_step(ours, pixels, padded),
            "padded to 77": training_step(theirs, pixels, padded),
            "padded to the longest": training_step(theirs, pixels, trimmed),
        },
    }


def training_step(model: Any, pixels: Tensor, ids: Tensor) -> Callable[[], None]:
    """Forward, backward and a step of the optimiser that Trainer uses by default, the same for both."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        model.train()
        model(pixel_values=pixels, input_ids=ids, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    return step


if __name__ == "__main__":
    main()
