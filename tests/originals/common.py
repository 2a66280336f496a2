"""What all architectures' cases need."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hfvlm.converter import conversion_module, empty_model, fresh_tensors
from hfvlm.key_table import convert_keys


def converted(
    architecture: str, state_dict: dict[str, Tensor], config: PreTrainedConfig, layout: str
) -> PreTrainedModel:
    """The original's weights in our model, as a user's `from_pretrained` would give it."""
    module, empty = conversion_module(architecture), empty_model(config)
    expected = empty.state_dict()
    fresh = fresh_tensors(module, config, layout, state_dict, expected)
    rows = module.keys_for(config, layout, state_dict)
    tensors = convert_keys(state_dict, rows, {key: t for key, t in expected.items() if key not in fresh})
    tensors = {key: tensor.contiguous().clone() for key, tensor in (tensors | fresh).items()}
    model, info = type(empty).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    assert {type(m) for m in model.modules()} == {type(m) for m in AutoModel.from_config(config).modules()}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return model.eval()


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
