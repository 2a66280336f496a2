"""Lower precision, which changes results: its speed, and what zero-shot classification and retrieval lose by it.

    python -m benchmarks.precision [--quick] [--rounds 7] [--page] [--output precision.json]

Quality is that of the models that ship: CLIP on held-out handwriting, and ImageBind on events that it has not seen,
each modality searched with each other one.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from benchmarks.measuring import Item, Options, Run, Size
from benchmarks.models import clip_tiny, clip_with_processor, pixels, tokens
from benchmarks.report import main
from examples.six_modalities import prepare
from hfvlm import Embedder, ZeroShotClassifier
from hfvlm.evaluation.classification import accuracy
from hfvlm.evaluation.retrieval import recall_at
from hfvlm.modeling.base import unit
from hfvlm.samples import digits
from hfvlm.samples.events import EVENTS

# The digits of which the shipped CLIP has seen the names, and seeds of events that the shipped ImageBind has not seen.
KNOWN, UNSEEN = range(8), 1000


def in_bfloat16(model: Any) -> Any:
    return copy.deepcopy(model).to(torch.bfloat16)


def in_int8(model: Any) -> Any:
    """Quantize the weights of linear layers once, and their inputs in each call, by PyTorch on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a later PyTorch without it
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def in_bitsandbytes(model: Any) -> Any:
    """Quantize linear layers as `from_pretrained(quantization_config=BitsAndBytesConfig(load_in_8bit=True))` does."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                bias = child.bias is not None
                layer = Linear8bitLt(
                    child.in_features, child.out_features, bias, has_fp16_weights=False, threshold=6.0
                )
                layer.weight = Int8Params(child.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
                layer.bias = child.bias
                setattr(module, name, layer.to("cpu"))
    return model


RECIPES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": in_bfloat16,
    "int8": in_int8,
    "bitsandbytes": in_bitsandbytes,
}


def rows(size: Size) -> Iterator[Item]:
    model, _ = clip_with_processor(size)
    models = {"hfvlm": model} | {name: recipe(model) for name, recipe in RECIPES.items()}
    batch, texts = pixels(model, 8), tokens(model, 16)
    for name, modality, inputs in (("8 images", "image", {"pixel_values": batch}), ("16 texts", "text", texts)):
        ways = {way: encoding(each, modality, inputs) for way, each in models.items()}
        yield Options(f"CLIP, {name}", ways, tolerance=0.5)
    yield Options("CLIP, handwriting among 8 digits", classifying(size), score=right, tolerance=0.5)
    yield Options("ImageBind, first of 24 events", searching(size), score=found, tolerance=0.5)


def encoding(model: Any, modality: str, inputs: dict[str, Tensor]) -> Run:
    inputs = {name: cast(value, model.dtype) for name, value in inputs.items()}
    return torch.inference_mode()(lambda: unit(model.embeddings(modality, **inputs).float()))


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() and dtype.is_floating_point else value


def classifying(size: Size) -> dict[str, Run]:
    """Score held-out images of the shipped CLIP's digits."""
    model, processor = AutoModel.from_pretrained(clip_tiny()).eval(), AutoProcessor.from_pretrained(clip_tiny())
    known = [digit for digit in digits.load_digits("test") if digit.label in KNOWN][: size.pick(16, None)]
    templates = [template.format(word="{}", digit="{}") for template in digits.TEMPLATES if "{word}" in template]

    def run(model: Any) -> np.ndarray:
        classifier = ZeroShotClassifier(Embedder(model, processor), [digits.WORDS[i] for i in KNOWN], templates)
        labels = np.array([digit.label for digit in known])
        return np.column_stack([classifier.scores([digit.image for digit in known]), labels])

    ways: dict[str, Any] = {"hfvlm": model} | {name: recipe(model) for name, recipe in RECIPES.items()}
    return {name: lambda each=each: run(each) for name, each in ways.items()}


def right(scores: np.ndarray) -> float:
    """Return the share of images whose highest score is that of their digit, which is the last column."""
    return accuracy(scores[:, :-1], scores[:, -1].astype(int))


def searching(size: Size) -> dict[str, Run]:
    """Embed events of the shipped ImageBind in every modality -> `(modalities, views, events, D)`."""
    folder = str(files("hfvlm.samples") / "imagebind-tiny")
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = prepare(AutoProcessor.from_pretrained(folder), range(UNSEEN, UNSEEN + size.pick(2, 10)))

    def run(model: Any) -> Tensor:
        vectors = []
        for modality, parts in inputs.items():
            flat = {name: value.flatten(0, 1) for name, value in parts.items()}
            vectors.append(encoding(model, modality, flat)().unflatten(0, (-1, len(EVENTS))))
        return torch.stack(vectors)

    ways: dict[str, Any] = {"hfvlm": model} | {name: recipe(model) for name, recipe in RECIPES.items()}
    return {name: lambda each=each: run(each) for name, each in ways.items()}


def found(vectors: Tensor) -> float:
    """Return the mean share of queries of one modality that find their event first in another modality and view."""
    shares = [
        recall_at(queries, gallery, (1,))[1]
        for one, other in permutations(vectors, 2)
        for queries, gallery in zip(one, other.roll(1, 0), strict=True)
    ]
    return float(np.mean(shares))


if __name__ == "__main__":
    main({"precision": rows}, __doc__)
