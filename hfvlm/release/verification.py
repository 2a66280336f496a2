"""Checks of a folder that need nothing but the folder: what would show silent wrongness."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from hfvlm.processing.base import HfvlmProcessor
from hfvlm.processing.media_text import MediaTextProcessor
from hfvlm.release.merging import whole
from hfvlm.release.published import published_checks
from hfvlm.release.records import Check, record_checks

__all__ = ["Check", "VerificationError", "sample_inputs", "samples", "verify"]

TOLERANCE = 1e-5
TEXTS = ("a photo of a cat", "two dogs on a beach")


class VerificationError(ValueError):
    """A folder that cannot be loaded and run."""


def verify(folder: str | Path, examples: str | Path | None = None) -> list[Check]:
    """Check a folder, of an adapter as merged into its base; see `verify_whole`."""
    with whole(folder) as model:
        return verify_whole(model, examples)


def verify_whole(folder: str | Path, examples: str | Path | None = None) -> list[Check]:
    """Check that a folder holds what its conversion wrote, and that it is whole and consistent.

    By the record that `convert` left in conversion.json: every tensor, setting and file is the one that was written.
    By running the model in float32: eager attention equals SDPA, a batch equals its rows, saving and loading changes
    nothing, each tower loaded alone equals the tower inside, the processor survives a round trip, and another image
    gives another answer. By the authors' word: the numbers that their README prints, where its inputs are at hand.

    Args:
        folder: as `convert` or `save_pretrained` wrote it.
        examples: the folder of the files that the authors' README feeds the model.

    Returns:
        The checks. What could not be checked is among them, with `checked` off and the reason.

    Raises:
        CheckpointError: a file is cut off or damaged, or a shard is not there.
        ValueError: the folder has no processor of texts and images to run the model with, or cannot be loaded.
    """
    folder = Path(folder)
    checks = record_checks(folder)
    try:
        checks += consistency_checks(folder)
    except Exception as error:
        found = [check.name for check in checks if not check.passed]
        if not found and isinstance(error, ValueError | OSError | ImportError):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else repr(error)
        if not found:
            raise VerificationError(f"{folder}: cannot be loaded and run ({reason}).") from error
        return [*checks, Check("the folder can be loaded and run", passed=False, detail=reason)]
    return [*checks, *published_checks(folder, examples)]


def consistency_checks(folder: Path) -> list[Check]:
    """Check what running the model shows."""
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = [f"{len(keys)} {kind}" for kind, keys in info.items() if keys]
    checks = [Check("every weight of the model is in the file", not problems, ", ".join(problems) or "all")]
    processor = AutoProcessor.from_pretrained(folder)
    if not isinstance(processor, HfvlmProcessor):
        raise ValueError(
            f"{folder}: has no processor of texts and images to verify it with, but {type(processor).__name__}."
        )
    if isinstance(processor, MediaTextProcessor):
        return [*checks, *answering_checks(folder, model.eval(), processor)]
    known = getattr(model, "modalities", model.input_modalities)
    modalities = [modality for modality in known if modality in processor.modalities]
    # Some models take rows that are laid out of several inputs, which they make themselves.
    laid_out: Any = getattr(model, "sample_inputs", None)
    inputs = sample_inputs(processor, modalities) if laid_out is None else laid_out(processor, samples)
    if (together := getattr(model, "images_per_text", 1)) > 1:
        inputs["pixel_values"] = torch.stack([inputs["pixel_values"]] * together, dim=1)
    with torch.no_grad():
        expected = outputs_of(model.eval(), inputs)
        for name, actual in (
            ("eager attention equals sdpa", lambda: with_attention(model, inputs)),
            ("a batch equals its rows", lambda: row_by_row(model, inputs)),
            ("saving and loading changes nothing", lambda: outputs_of(saved_and_loaded(model), inputs)),
        ):
            checks.append(compare(name, actual, expected))
        alone = [modality for modality in modalities if modality in getattr(model, "towers", {})]
        checks += [tower_check(folder, model, modality, processor) for modality in alone]
        checks.append(sensitivity(model, modalities[0], inputs, expected))
    checks.append(processor_check(processor, modalities))
    return checks


def sample_inputs(processor: Any, modalities: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return two examples of each modality, by default of all that the processor prepares: texts, and noise."""
    inputs: dict[str, Tensor] = {}
    special = getattr(processor, "samples", lambda _: None)  # of inputs that are one processor's alone
    for modality in processor.modalities if modalities is None else modalities:
        inputs |= processor.prepare(modality, special(modality) or samples(modality))
    return inputs


def samples(modality: str) -> list[Any]:
    """Return two examples, as users would bring them."""
    noise = np.random.RandomState(0)
    images = [noise.randint(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((240, 320), (300, 180))]
    kinds: dict[str, Callable[[], list[Any]]] = {
        "image": lambda: [Image.fromarray(image) for image in images],
        "video": lambda: [(np.stack([image, 255 - image]), 1.0) for image in images],
        "text": lambda: list(TEXTS),
        "audio": lambda: [(noise.uniform(-0.5, 0.5, 16_000 * seconds), 16_000) for seconds in (1, 3)],
        "depth": lambda: [image[..., 0] / 64 + 0.5 for image in images],
        "thermal": lambda: [image[..., 0] for image in images],
        "imu": lambda: [(noise.standard_normal((6, 200 * seconds)), 200) for seconds in (3, 6)],
    }
    return kinds[modality]()


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}


def with_attention(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], read: Callable[..., dict[str, Tensor]] = outputs_of
) -> dict[str, Tensor]:
    # Each part has its own: transformers' language models do not all know the others'.
    parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
    before = {"": model.config._attn_implementation}
    # A part that a model has no tower for has none.
    known = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    before |= {name: value for name, value in known.items() if value is not None}
    model.set_attn_implementation("eager" if before[""] != "eager" else "sdpa")
    try:
        return read(model, inputs)
    finally:
        model.set_attn_implementation(before)


# Of models without a joint space.
OUTPUTS = ("reconstruction", "logits", "pooler_output", "embeds")


def row_by_row(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute embeddings of each row alone, from which logits of pairs follow; or the logits of each, its image, or
    what is pooled."""
    rows = [outputs_of(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(len(TEXTS))]
    names = [name for name in rows[0] if name.endswith("_embeds") or name in OUTPUTS]
    return {name: torch.cat([row[name] for row in rows]) for name in names}


def saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        return type(model).from_pretrained(temporary, dtype=torch.float32).eval()


def tower_check(folder: Path, model: Any, modality: str, processor: Any) -> Check:
    name, inputs = model.towers[modality], sample_inputs(processor, [modality])
    inside, features = getattr(model, name), getattr(model, f"get_{modality}_features")
    expected = {"embeds": features(**inputs).pooler_output}
    setattr(model, name, type(inside).from_pretrained(folder, dtype=torch.float32).eval())
    try:
        alone = {"embeds": features(**inputs).pooler_output}
    finally:
        setattr(model, name, inside)
    return compare(f"{modality}: {name} alone equals the one inside", lambda: alone, expected)


def sensitivity(
    model: PreTrainedModel, modality: str, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Check:
    name = next(name for name in (f"{modality}_embeds", *OUTPUTS) if name in expected)
    keeps_texts = name in ("logits", "pooler_output", "embeds")
    same = {key for key in inputs if keeps_texts and (key.endswith("_ids") or key == "attention_mask")}
    changed = {key: value if key in same else value.flip(0) for key, value in inputs.items()}
    difference = relative(outputs_of(model, changed)[name], expected[name])
    kind = "image" if modality == "image" else f"{modality} input"
    return Check(f"another {kind} gives another answer", difference > 1e-3, f"differs by {difference:.1%}", difference)


def processor_check(processor: Any, modalities: Iterable[str]) -> Check:
    inputs = sample_inputs(processor, modalities)
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        again = sample_inputs(AutoProcessor.from_pretrained(temporary), modalities)
    same = again.keys() == inputs.keys() and all(torch.equal(again[name], inputs[name]) for name in inputs)
    return Check("the processor survives a round trip", same, "equal" if same else "its inputs differ")


@torch.no_grad()
def answering_checks(folder: Path, model: Any, processor: MediaTextProcessor) -> list[Check]:
    """Check the same of a model that answers about images."""
    inputs = questions(processor, slice(None))
    expected = logits_of(model, inputs)
    rows = [questions(processor, slice(i, i + 1)) for i in range(len(TEXTS))]
    checks = [
        compare("eager attention equals sdpa", lambda: with_attention(model, inputs, logits_of), expected),
        compare(
            "a batch equals its rows",
            lambda: {"logits": torch.cat([logits_of(model, row)["logits"] for row in rows])},
            expected,
        ),
        compare("saving and loading changes nothing", lambda: logits_of(saved_and_loaded(model), inputs), expected),
    ]
    inside = model.vision_model
    model.vision_model = type(inside).from_pretrained(folder, dtype=torch.float32).eval()
    checks.append(compare("vision_model alone equals the one inside", lambda: logits_of(model, inputs), expected))
    model.vision_model = inside
    pixels = model.media_inputs[processor.modality][0]
    changed = logits_of(model, {**inputs, pixels: inputs[pixels].flip(0)})
    difference = relative(changed["logits"], expected["logits"])
    detail = f"differs by {difference:.1%}"
    checks.append(Check("another image gives another answer", difference > 1e-3, detail, difference))
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        again = questions(AutoProcessor.from_pretrained(temporary), slice(None))
    same = again.keys() == inputs.keys() and all(torch.equal(again[name], inputs[name]) for name in inputs)
    checks.append(Check("the processor survives a round trip", same, "equal" if same else "its inputs differ"))
    return checks


def questions(processor: MediaTextProcessor, rows: slice) -> dict[str, Tensor]:
    """Make two texts with an image of noise each, or one of them."""
    texts = [f"{processor.media_token}\n{text}" for text in TEXTS]
    media = {f"{processor.modality}s": samples(processor.modality)[rows]}
    return dict(processor(text=texts[rows], **media))


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the logits of the tokens that are no padding; of an encoder and a decoder, those of what is
    generated."""
    logits = model(**inputs).logits
    return {"logits": logits if model.config.is_encoder_decoder else logits[inputs["attention_mask"].bool()]}


def compare(name: str, actual: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor]) -> Check:
    tensors = actual()
    error = max(relative(value, expected[key]) for key, value in tensors.items())
    return Check(name, error <= TOLERANCE, f"largest relative difference {error:.1e}", error)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Compute max |a - b| / max |b|; NaN counts as infinite."""
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")
