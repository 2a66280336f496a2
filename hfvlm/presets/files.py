"""One file a released checkpoint in `modeling_configs/`: what it is, where it came from and how it is read."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Preset:
    """A released checkpoint.

    Args:
        name: "clip/vit-b-32".
        architecture: the folder's name, "clip".
        config: the configuration's fields that differ from its defaults; a `model_type` among them is that of a tower
            which was released alone.
        processor: settings of the processor's parts that differ from theirs.
        source: `layout` of the keys, `files`, `url`, `sha256` where published, or `sha256_begins`, its first digits,
            where the authors publish no more, of the file that `url` names, `vocabulary` of the tokenizer, `parts`,
            what else the model is made of, and `published`, what the authors' `readme` prints: `inputs`, texts and
            names of files by modality, and `probabilities`, each with the two modalities it is `of` and its `values`.
        licence: `id` as the Hub spells it (with `name` and `link` for "other"), `non_commercial`, `note`.
        parameters: of the whole model.
        notes: what a user should know.
    """

    name: str
    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    licence: Mapping[str, Any] = field(default_factory=lambda: {"id": "unknown"})
    parameters: int | None = None
    notes: str = ""

    def published_sha256(self, file: str) -> str | None:
        """Return the sha256 that the authors publish of a file of that name, or how it begins; None for no such."""
        begins = self.source.get("sha256_begins")
        if begins is not None:
            return begins if self.source["url"].endswith(f"/{file}") else None
        return self.source.get("sha256")

    def make_config(self) -> "PreTrainedConfig":
        """Return the configuration, in full."""
        from transformers import AutoConfig

        fields = {"model_type": f"hfvlm_{self.architecture}"} | json.loads(json.dumps(self.config))
        return AutoConfig.for_model(**fields)


@cache
def list_presets(architecture: str | None = None) -> tuple[str, ...]:
    """Return the names of all presets, or of one architecture's."""
    folder = files("hfvlm.modeling_configs")
    names = [
        f"{kind.name}/{file.name.removesuffix('.json')}"
        for kind in folder.iterdir()
        if kind.is_dir()
        for file in kind.iterdir()
        if file.name.endswith(".json")
    ]
    return tuple(sorted(name for name in names if architecture in (None, name.split("/")[0])))


def load_preset(name: str) -> Preset:
    """Return a preset by its name; the architecture may be left out where one preset alone ends so.

    Raises:
        ValueError: there is none, or there are several; the message lists the nearest names.
    """
    names = list_presets()
    hits = [known for known in names if name in (known, known.split("/")[1])]
    if len(hits) == 1:
        text = files("hfvlm.modeling_configs").joinpath(f"{hits[0]}.json").read_text(encoding="utf-8")
        return Preset(name=hits[0], **json.loads(text))
    near = hits or difflib.get_close_matches(
        name, [*names, *(known.split("/")[1] for known in names)], n=5, cutoff=0.4
    )
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"No preset is called {name!r}.{hint} `hfvlm list` shows all of them.")
