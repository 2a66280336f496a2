"""What all architectures' cases need."""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import KeyTableError, convert_keys, convert_tables
from hfvlm.modeling.timm_trunks import HfvlmTimmTrunkConfig, TimmMissingError, timm_wrapper_config
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.release.plans import empty_model, fresh_tensors
from hfvlm.release.sources import conversion_of
from tests.support.golden import UnknownOptionError
from tests.support.shapes import shapes_of


def converted(
    architecture: str, state_dict: dict[str, Tensor], config: PreTrainedConfig, layout: str
) -> PreTrainedModel:
    """The original's weights in our model, as a user's `from_pretrained` would give it."""
    conversion, empty = conversion_of(architecture), empty_model(config)
    expected = empty.state_dict()
    fresh = fresh_tensors(conversion, config, layout, state_dict, expected)
    rows = conversion.keys_for(config, layout, state_dict)
    tensors = convert_keys(state_dict, rows, {key: t for key, t in expected.items() if key not in fresh})
    tensors = {key: tensor.contiguous().clone() for key, tensor in (tensors | fresh).items()}
    model, info = type(empty).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    assert {type(m) for m in model.modules()} == {type(m) for m in empty.modules()}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return model.eval()


def needs_timm(config: PreTrainedConfig) -> None:
    """Skip what needs timm where it does not load, once the message of the model has been seen to tell so."""
    vision = getattr(config, "vision_config", config)
    if not isinstance(vision, HfvlmTimmTrunkConfig):
        return
    try:
        timm_wrapper_config(vision.architecture, {})
    except TimmMissingError as reason:
        with pytest.raises(TimmMissingError, match=rf"{vision.architecture} is .* timm.*pip install 'hfvlm\[timm\]'"):
            empty_model(config)
        pytest.skip(str(reason))


def made_of(fields: dict[str, Any], name: str, text: str) -> Any:
    """What a field of that name holds of a text."""
    for pattern, make in fields.items():
        if found := re.fullmatch(pattern, name):
            return make(text, *found.groups())
    raise UnknownOptionError(f"a row of texts has {name}; the runner knows {', '.join(fields)}")


# The configuration, the tables and, where a file leaves some out, the names of parameters that it lacks.
Composition = tuple[Any, ...]
Compose = Callable[[Preset], Composition]


def fitting(architecture: str, stem: str, compose: Compose) -> Composition:
    """The composition of a released file: that of its own preset, or of the first that fits.

    Raises:
        AssertionError: no preset fits; it says why the last does not.
    """
    released = [preset for preset in map(load_preset, list_presets(architecture)) if "layout" in preset.source]
    own = [preset for preset in released if preset.name == f"{architecture}/{stem.lower()}"]
    reason: Exception | None = None
    for preset in own or released:
        found, reason = tried(compose, preset)
        if reason is None:
            return found
    raise AssertionError(f"no preset of {architecture} fits {stem or 'the file'}: {reason}") from reason


def tried(compose: Compose, preset: Preset) -> tuple[Composition, Exception | None]:
    """What `compose` makes of a preset, and why it does not fit."""
    try:
        config, tables, *fresh = found = compose(preset)
        own, lacking = shapes_of(config)[0], fresh[0] if fresh else []
        convert_tables(tables, {key: tensor for key, tensor in own.items() if key not in lacking})
    except (AssertionError, KeyTableError, CheckpointError, FileNotFoundError, KeyError) as error:
        return (), error
    return found, None


def vocabulary(folder: Path, name: str) -> Path:
    """A released vocabulary: beside the case, in $HFVLM_VOCABULARIES, or among an installed open_clip's data."""
    folders = [folder, Path(os.environ.get("HFVLM_VOCABULARIES", folder))]
    if (package := importlib.util.find_spec("open_clip")) is not None:
        folders += [Path(place) for place in package.submodule_search_locations]
    for place in folders:
        if (place / name).exists():
            return place / name
    pytest.skip(
        f"{name} is not at hand: set HFVLM_VOCABULARIES to its folder; OpenAI's comes with pip install --no-deps "
        "open_clip_torch, bert-base-uncased's with its weights on the Hub"
    )


def bert_vocabulary(folder: Path) -> Path:
    """bert-base-uncased's: beside the case, among another architecture's cases, or where `vocabulary` looks."""
    beside, others = folder / "vocab.txt", sorted(folder.parent.parent.glob("*/*/vocab.txt"))
    whole = [path for path in others if path.read_text(encoding="utf-8").count("\n") == 30522]
    return whole[0] if whole and not beside.exists() else vocabulary(folder, "vocab.txt")
