"""Every preset file is valid, and its claims hold."""

import json
from importlib.resources import files

import pytest

from hfvlm.presets import list_presets, load_preset
from hfvlm.registry import architectures
from hfvlm.release.sources import conversion_of
from tests.originals.common import needs_timm
from tests.support.shapes import shapes_of

PRESETS = list_presets()


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    text = files("hfvlm.modeling_configs").joinpath(f"{name}.json").read_text()
    assert set(json.loads(text)) <= {"architecture", "config", "processor", "source", "licence", "parameters", "notes"}
    preset = load_preset(name)
    assert preset.architecture == name.split("/")[0]
    config = preset.make_config()
    conversion = conversion_of(preset.architecture)
    processor = conversion.image_processor_for(config, preset.processor)
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        assert processor.size == {"height": height, "width": width}
    assert preset.licence["id"] != "unknown"
    if preset.source:
        assert preset.source["files"]
        assert preset.source["url"].startswith("https://")
        assert conversion.keys_for(config, preset.source["layout"])
        if vocabularies := conversion.vocabularies_for(config):
            assert preset.source["vocabulary"]["file"] in vocabularies[0]
        assert len(preset.source.get("sha256", "0" * 64)) == 64
    needs_timm(config)
    _, parameters = shapes_of(config)
    assert preset.parameters == parameters


@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_each_architecture_has_a_tiny_preset(architecture):
    assert load_preset(f"{architecture}/tiny").parameters < 2e6


def test_all_released_openai_models_are_here():
    wanted = ["rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336px"]
    assert all(load_preset(name).source["url"].split("/")[-2] == load_preset(name).source["sha256"] for name in wanted)


def test_a_hash_may_be_published_in_part():
    """As open_clip does, of the files on GitHub; their copies on the Hub are others."""
    preset = load_preset("clip/rn50-cc12m")
    assert preset.published_sha256("rn50-quickgelu-cc12m-f000538c.pt") == "f000538c"
    assert preset.published_sha256("open_clip_model.safetensors") is None
    whole = load_preset("clip/rn50")
    assert whole.published_sha256("renamed.pt") == whole.source["sha256"]
    for name in PRESETS:
        source = load_preset(name).source
        if "sha256_begins" in source:
            assert source["url"].rpartition("/")[2].rpartition(".")[0].endswith(f"-{source['sha256_begins']}")


def test_names_may_be_short_where_they_are_unique():
    assert load_preset("vit-b-32").name == load_preset("clip/vit-b-32").name == "clip/vit-b-32"
    with pytest.raises(ValueError, match="Did you mean .*clip/tiny.*siglip/tiny"):
        load_preset("tiny")
    with pytest.raises(ValueError, match="No preset is called 'vit-b-31'. Did you mean vit-b-32"):
        load_preset("vit-b-31")


def test_known_sizes():
    """Against the numbers that the papers and repositories state."""
    for name, millions in (("vit-b-32", 151.3), ("vit-l-14", 427.6), ("rn50", 102.0), ("rn50x64", 623.3)):
        assert round(load_preset(name).parameters / 1e6, 1) == millions
