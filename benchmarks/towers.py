"""Image and text towers and training steps of dual encoders, next to transformers' own with equal weights.

python -m benchmarks.towers [--quick] [--rounds 7] [--device cuda] [--output towers.json]
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from benchmarks.measuring import Growth, Item, Row, Run, Size, work
from benchmarks.models import config, embedding, native_of, pixels, seeded, tokens, trimmed
from benchmarks.report import main

NAMES = ("clip", "siglip", "align")
READS_PADDING = ("siglip",)  # trained on texts of full length
Embed = Callable[..., Tensor]


def features(model: Any, modality: str, **inputs: Tensor) -> Tensor:
    return embedding(getattr(model, f"get_{modality}_features")(**inputs))


def embeddings(model: Any, modality: str, **inputs: Tensor) -> Tensor:
    return model.embeddings(modality, **inputs)


# Of hfvlm's models; with their features come all tokens, as transformers' have them.
WHAT = {"features": features, "embeddings": embeddings}


def rows(size: Size) -> Iterator[Item]:
    for name in NAMES:
        ours = seeded(AutoModel.from_config, config(name, size), size)
        theirs = native_of(ours, name)
        for count in size.pick((2,), (1, 8)):
            for what, embed in WHAT.items():
                yield Row(f"{name}, {what} of {count} images", images(ours, theirs, pixels(ours, count), embed))
        for count in size.pick((3,), (1, 16)):
            for what, embed in WHAT.items():
                yield Row(f"{name}, {what} of {count} texts", texts(ours, theirs, name, tokens(ours, count), embed))
        if name in ("clip", "siglip"):
            yield Row(f"{name}, training step of 4 pairs", training(ours, theirs, name))
    ours = seeded(AutoModel.from_config, config("clip", size), size)
    encode = torch.inference_mode()
    yield Growth(
        "clip: work of an image batch with images",
        (2, 4, 8),
        lambda n: work(encode(lambda: ours.get_image_features(pixels(ours, n)))),
        1.05,
    )
    yield Growth(
        "clip: work of a text batch with texts",
        (4, 8, 16),
        lambda n: work(encode(lambda: ours.get_text_features(**tokens(ours, n)))),
        1.3,
    )
    if not size.quick:
        low = (ours.to(torch.bfloat16), native_of(ours, "clip").to(torch.bfloat16))
        batch = pixels(ours, 8).to(torch.bfloat16)
        yield Row("clip, features of 8 images in bfloat16", images(*low, batch), tolerance=3e-2)


def images(ours: Any, theirs: Any, batch: Tensor, embed: Embed = features) -> dict[str, Run]:
    encode = torch.inference_mode()
    return {
        "hfvlm": encode(lambda: embed(ours, "image", pixel_values=batch)),
        "transformers": encode(lambda: features(theirs, "image", pixel_values=batch)),
    }


def texts(ours: Any, theirs: Any, name: str, inputs: dict[str, Tensor], embed: Embed) -> dict[str, Run]:
    """Compare texts that are padded to the context, and for careful users to the longest."""
    encode = torch.inference_mode()
    if name in READS_PADDING:
        inputs = {"input_ids": inputs["input_ids"]}
    ways = {
        "hfvlm": encode(lambda: embed(ours, "text", **inputs)),
        "transformers": encode(lambda: features(theirs, "text", **inputs)),
    }
    if name not in READS_PADDING:
        short = trimmed(inputs)
        ways["careful"] = encode(lambda: features(theirs, "text", **short))
    return ways


def training(ours: Any, theirs: Any, name: str) -> dict[str, Run]:
    batch, inputs = pixels(ours, 4), tokens(ours, 4)
    if name in READS_PADDING:
        inputs = {"input_ids": inputs["input_ids"]}
    ways = {"hfvlm": step(ours, batch, inputs), "transformers": step(theirs, batch, inputs)}
    if name not in READS_PADDING:
        ways["careful"] = step(theirs, batch, trimmed(inputs))
    return ways


def step(model: Any, batch: Tensor, inputs: dict[str, Tensor]) -> Run:
    """Forward, backward and a step of the optimiser that Trainer uses by default, at a rate that changes nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def run() -> Tensor:
        loss = model(pixel_values=batch, **inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


if __name__ == "__main__":
    main({"towers": rows}, __doc__)
