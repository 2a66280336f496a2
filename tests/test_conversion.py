"""Every key of every released file goes somewhere, and every parameter gets one, at full size."""

import copy
import importlib
from functools import cache

import pytest
import torch

from hfvlm.checkpoints.key_table import KeyTableError, Table, convert_keys, convert_tables, restore_keys
from hfvlm.conversion.processors import special_tokens
from hfvlm.presets import list_presets, load_preset
from hfvlm.registry import architectures
from hfvlm.release.plans import empty_model
from hfvlm.release.sources import conversion_of
from tests.originals.common import needs_timm
from tests.support.golden import key_lists, name_of, notes_of, read_key_list
from tests.support.shapes import shapes_of


def composition(name):
    """How a released file of the architecture becomes a whole model, where there are several files: a function that
    returns the configuration, the tables and, where a file leaves some out, the names of parameters that it lacks."""
    return getattr(importlib.import_module(f"tests.originals.{name}"), "compose", None)


@pytest.mark.parametrize("path", key_lists(), ids=name_of)
def test_every_key_is_accounted_for(path):
    name, fresh = path.parent.parent.name, []
    if name not in architectures():
        pytest.skip(f"hfvlm has no architecture called {name!r} yet")
    if compose := composition(name):
        config, tables, *fresh = compose(path)
        fresh = fresh[0] if fresh else []
    else:
        tensors, original, conversion = read_key_list(path), notes_of(path), conversion_of(name)
        config = conversion.config_from_original(original, tensors)
        layout = conversion.layout_of(original)
        tables = [Table(tensors, conversion.keys_for(config, layout, tensors))]
        needs_timm(config)
        fresh = conversion.fresh_parameters(config, layout, tensors, shapes_of(config)[0])
    expected = {key: t for key, t in shapes_of(config)[0].items() if key not in fresh}
    converted = {key: t for part in convert_tables(tables, expected) for key, t in part.items()}
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in expected.items()}


def whole(path):
    """Whether the file is a model by itself; what is composed names its preset, which the test above goes by."""
    name = path.parent.parent.name
    return name not in architectures() or composition(name) is None


@cache
def presets_of(name, layout):
    """The configurations of an architecture's presets of a layout."""
    presets = map(load_preset, list_presets(name))
    return [preset.make_config().to_dict() for preset in presets if preset.source.get("layout") == layout]


@pytest.mark.parametrize("path", list(filter(whole, key_lists())), ids=name_of)
def test_a_preset_knows_the_file(path):
    """One preset a released checkpoint: its configuration is what the file's shapes and its authors' own say."""
    name = path.parent.parent.name
    if name not in architectures():
        pytest.skip(f"hfvlm has no architecture called {name!r} yet")
    conversion, original = conversion_of(name), notes_of(path)
    config = conversion.config_from_original(original, read_key_list(path)).to_dict()
    layout = conversion.layout_of(original)
    assert config in presets_of(name, layout), f"no preset of {name} describes {path.name}"


@pytest.fixture(scope="module")
def small():
    """A table and a state dict that fit."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = architectures()["clip"].HfvlmCLIPConfig(
        vision_config=sizes | {"image_size": 16, "patch_size": 8, "projection_dim": 32},
        text_config=sizes
        | {"vocab_size": 20, "max_position_embeddings": 6, "projection_dim": 32}
        | special_tokens(20),
    )
    expected = empty_model(config).state_dict()
    rows = conversion_of("clip").keys_for(config)
    return rows, restore_keys(expected, rows), expected


def test_all_kinds_of_offenders_are_named_together(small):
    rows, tensors, expected = small
    tensors = copy.copy(tensors)
    del tensors["visual.class_embedding"]
    tensors["visual.stranger"] = torch.empty(1, device="meta")
    tensors["ln_final.weight"] = torch.empty(7, device="meta")
    with pytest.raises(KeyTableError) as error:
        convert_keys(tensors, [*rows, ("ln_final.weight", "text_model.post_norm.weight")], expected)
    assert error.value.unknown == ["visual.stranger"]
    assert error.value.ambiguous == ["ln_final.weight"]
    assert error.value.unused == ["visual.class_embedding"]
    assert set(error.value.unfilled) == {"vision_model.class_token", "text_model.post_norm.weight"}
    for words in ("without a row", "several rows", "without a key", "left unfilled"):
        assert words in str(error.value)


def test_a_wrong_shape_is_named(small):
    rows, tensors, expected = small
    with pytest.raises(KeyTableError, match=r"text_model.post_norm.weight is \(7,\), expected \(64,\)"):
        convert_keys(tensors | {"ln_final.weight": torch.empty(7, device="meta")}, rows, expected)


def test_a_missing_layer_is_named(small):
    rows, tensors, expected = small
    with pytest.raises(KeyTableError, match="16 parameters.*text_model.layers.1.attention_norm.weight"):
        convert_keys({k: t for k, t in tensors.items() if not k.startswith("transformer.resblocks.1")}, rows, expected)
