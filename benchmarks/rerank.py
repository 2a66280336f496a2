"""BLIP's matching of texts with images, and retrieval in two stages.

python -m benchmarks.rerank [--quick] [--rounds 7] [--device cuda] [--output rerank.json]
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import Growth, Item, Row, Size, work
from benchmarks.models import config, native_of, pixels, seeded, tokens, trimmed
from benchmarks.report import main
from hfvlm.models.blip import HfvlmBLIPForImageTextRetrieval
from hfvlm.modules.context import Context


def rows(size: Size) -> Iterator[Item]:
    ours = make(size)
    theirs = native_of(ours, "blip", "BlipForImageTextRetrieval")
    encode = torch.inference_mode()
    for count in size.pick((2,), (1, 8)):
        batch = pixels(ours, count)
        ways = {
            "hfvlm": encode(lambda x=batch: tokens_of(ours, x)),
            "transformers": encode(lambda x=batch: tokens_of(theirs, x)),
        }
        yield Row(f"{count} images", ways)
    for count in size.pick((3,), (1, 16)):
        inputs, image = tokens(ours, count), pixels(ours, 1)
        whole, images = begun(ours, inputs), image.repeat(count, 1, 1, 1)
        texts, short = trimmed(inputs), trimmed(whole)
        ways = {
            "hfvlm": encode(lambda i=texts, x=image: ours.match(**i, context=Context(tokens_of(ours, x)))),
            "transformers": encode(lambda i=whole, x=images: theirs(pixel_values=x, **i)[0]),
            "careful": encode(lambda i=short, x=image: matched(theirs, i, x)),
        }
        yield Row(f"{count} texts matched with an image", ways)
    for count, top_k in size.pick(((3, 2),), ((4, 4), (8, 4))):
        inputs, images = tokens(ours, count), pixels(ours, count)
        short, second = trimmed(inputs), trimmed(begun(ours, inputs))
        ways = {
            "hfvlm": encode(lambda i=inputs, x=images, k=top_k: list(pair(ours.rerank(x, **i, top_k=k)))),
            "careful": encode(lambda i=short, j=second, x=images, k=top_k: by_hand(theirs, i, j, x, k)),
        }
        if count == top_k and not size.quick:
            whole = begun(ours, inputs)
            ways["transformers"] = encode(lambda i=inputs, j=whole, x=images: pair_by_pair(theirs, i, j, x))
        yield Row(f"{count} images and texts, the best {top_k} of each matched", ways)
        cosines, seen = encode(lambda i=short, x=images: first_stage(theirs, i, x))()
        ways = {
            "hfvlm": encode(lambda i=inputs, c=cosines, s=seen, k=top_k: list(pair(ours.rescore(c, s, **i, top_k=k)))),
            "careful": encode(lambda j=second, c=cosines, s=seen, k=top_k: second_by_hand(theirs, j, c, s, k)),
        }
        yield Row(f"of {count} images and texts, the best {top_k} of each matched, encoded before", ways)
    batch = pixels(ours, 2)
    yield Growth(
        "work of reranking with texts",
        (8, 16, 32),
        lambda n: work(encode(lambda: ours.rerank(batch, **tokens(ours, n), top_k=2))),
        1.1,
    )


def make(size: Size) -> HfvlmBLIPForImageTextRetrieval:
    settings = config("blip", size)
    settings.architectures = ["HfvlmBLIPForImageTextRetrieval"]
    return seeded(HfvlmBLIPForImageTextRetrieval, settings, size)


def tokens_of(model: Any, images: Tensor) -> Tensor:
    return model.vision_model(images).last_hidden_state


def begun(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Begin texts with the token that means matching, which users of transformers' class put there."""
    ids = inputs["input_ids"].clone()
    ids[:, 0] = model.config.text_config.encoder_token_id
    return inputs | {"input_ids": ids}


def pair(scores: Any) -> tuple[Tensor, Tensor]:
    return scores.per_image, scores.per_text


def matched(model: Any, inputs: dict[str, Tensor], image: Tensor) -> Tensor:
    """Match by hand with transformers' parts, so that the image is encoded once."""
    seen = model.vision_model(image).last_hidden_state
    return logits(model, inputs, seen.expand(inputs["input_ids"].shape[0], -1, -1))


def logits(model: Any, inputs: dict[str, Tensor], seen: Tensor) -> Tensor:
    mask = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
    output = model.text_encoder(**inputs, encoder_hidden_states=seen, encoder_attention_mask=mask)
    return model.itm_head(output.last_hidden_state[:, 0])


def by_hand(
    model: Any, first: dict[str, Tensor], second: dict[str, Tensor], images: Tensor, top_k: int
) -> list[Tensor]:
    """Retrieve in two stages with transformers' parts; each image and text is encoded once."""
    return second_by_hand(model, second, *first_stage(model, first, images), top_k)


def first_stage(model: Any, inputs: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines of images and texts, and the images' tokens."""
    seen = model.vision_model(images).last_hidden_state
    text = model.text_encoder(**inputs).last_hidden_state[:, 0]
    image, text = F.normalize(model.vision_proj(seen[:, 0]), dim=-1), F.normalize(model.text_proj(text), dim=-1)
    return image @ text.t(), seen


def pair_by_pair(model: Any, first: dict[str, Tensor], second: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Match every image with every text by calls of transformers' class."""
    rows = []
    for image in images:
        batch = image.expand(second["input_ids"].shape[0], -1, -1, -1)
        cosines = model(pixel_values=image[None], **first, use_itm_head=False)[0]
        rows.append(model(pixel_values=batch, **second)[0][:, 1] + cosines[0])
    scores = torch.stack(rows)
    return [scores, scores.t()]


def second_by_hand(model: Any, second: dict[str, Tensor], cosines: Tensor, seen: Tensor, top_k: int) -> list[Tensor]:
    """Match the candidates of each image, then those of each text."""
    found = []
    for rows_of, rows_are_images in ((cosines, True), (cosines.t(), False)):
        scores = torch.full_like(rows_of, -100.0)
        for i, row in enumerate(rows_of):
            cosine, best = row.topk(min(top_k, row.shape[0]))
            texts = best if rows_are_images else torch.full_like(best, i)
            which = torch.full_like(best, i) if rows_are_images else best
            chosen = {name: value[texts] for name, value in second.items()}
            scores[i, best] = logits(model, chosen, seen[which])[:, 1] + cosine
        found.append(scores)
    return found


if __name__ == "__main__":
    main({"rerank": rows}, __doc__)
