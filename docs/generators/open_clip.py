"""Write docs/open_clip.md: which preset each pretrained tag of open_clip is, and what it needs.

python -m docs.generators.open_clip
"""

import json
from pathlib import Path
from typing import Any

from hfvlm.modeling.timm_trunks import HfvlmTimmTrunkConfig
from hfvlm.presets import Preset, load_preset

PAGE = Path(__file__).parents[1] / "open_clip.md"
# `commit`, `models`: the preset of each tag of each name, and `elsewhere`: what reads those that have none.
DATA: dict[str, Any] = json.loads((Path(__file__).parent / "open_clip.json").read_text(encoding="utf-8"))
TEXT = """# open_clip's models

<!-- written by make open-clip -->

open_clip at {commit} lists {tags} pretrained tags under {names} names; a name with `-quickgelu` repeats those tags of
the plain name whose files need that activation. The release 3.3.0 of open_clip_torch lists 196 tags under 115 names:
the two models of audio and SigLIP 2's two with NaFlex are newer. {converted} of the tags convert, by
`hfvlm convert FILE --preset PRESET -o OUTPUT`. {timm} of these have an image tower that timm runs, and need it:
`pip install 'hfvlm[timm]'`. The other {others} are models of audio, which transformers itself reads.

| name | tag | preset | image tower | text tower | needs | licence |
|---|---|---|---|---|---|---|
{rows}
"""


def tower(config: Any) -> str:
    """Name a tower by its class and, where it is built around a model of another library, that model."""
    name = type(config).__name__.removeprefix("Hfvlm").removesuffix("Config")
    if isinstance(config, HfvlmTimmTrunkConfig):
        return f"{name}, {config.architecture}"
    return f"{name}, {config.trunk_config.model_type}" if hasattr(config, "trunk_config") else name


def row(name: str, tag: str, preset: Preset) -> str:
    """Give the row of a tag that converts."""
    config = preset.make_config()
    needs = "timm" if isinstance(config.vision_config, HfvlmTimmTrunkConfig) else ""
    licence = preset.licence.get("name", preset.licence["id"])
    towers = f"{tower(config.vision_config)} | {tower(config.text_config)}"
    return f"| {name} | `{tag}` | `{preset.name}` | {towers} | {needs} | {licence} |"


def page() -> str:
    """Put the page together."""
    tags = [(name, tag, preset) for name, presets in DATA["models"].items() for tag, preset in presets.items()]
    rows = [
        row(name, tag, load_preset(preset))
        if preset
        else f"| {name} | `{tag}` | none: {DATA['elsewhere'][name]} |||||"
        for name, tag, preset in tags
    ]
    converted = sum(preset is not None for _, _, preset in tags)
    return TEXT.format(
        commit=DATA["commit"][:7],
        names=len(DATA["models"]),
        tags=len(tags),
        converted=converted,
        others=len(tags) - converted,
        timm=sum("| timm |" in each for each in rows),
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
