"""Names of classes and prompt templates of the data sets of CLIP's paper, as its authors used them.

They are facts, in a file for each data set in `hfvlm/evaluation/prompts`, from openai/CLIP at d05afc4 (MIT licence):
`data/prompts.md`, and for ImageNet `notebooks/Prompt_Engineering_for_ImageNet.ipynb`. Names, their order, and their
spelling errors are the authors'.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from hfvlm.inference.templates import template_set

FOLDER = files("hfvlm.evaluation") / "prompts"


@dataclass(frozen=True)
class PromptSet:
    """How to name the classes of a data set.

    Args:
        name: as "cifar10".
        title: of the data set.
        metric: what CLIP's paper reports of it (table 9).
        templates: texts with one `{}` each.
        classes: the names of each class, in the order of their numbers; one of equal name has a number in its key, as
            ImageNet's two missiles.
    """

    name: str
    title: str
    metric: str
    templates: tuple[str, ...]
    classes: dict[str, list[str]]

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """Find the classes of a data set's own labels: by name where every label is a name, whatever its case, else
        by order where none is and there are as many, as of ImageNet's folders n01440764, n01443537, ...

        Raises:
            ValueError: some labels are names and others are not, or their number is another.
        """
        known = {plain(name): i for i, names in reversed([*enumerate(self.classes.values())]) for name in names}
        missing = [label for label in labels if plain(label) not in known]
        if not missing:
            return [known[plain(label)] for label in labels]
        if len(missing) == len(labels) == len(self.classes):
            return list(range(len(labels)))
        nearest = get_close_matches(plain(missing[0]), known, 1, cutoff=0.0)[0]
        raise ValueError(
            f"Prompts {self.name}: label {missing[0]!r} is none of its {len(self.classes)} classes; the nearest is "
            f"{nearest!r}. Rename the label, or give all names in order with labels."
        )


def prompt_sets() -> list[str]:
    """List the names of the sets."""
    return sorted(file.name.removesuffix(".json") for file in FOLDER.iterdir() if file.name.endswith(".json"))


def load_prompt_set(name: str) -> PromptSet:
    """Load a set by its name.

    Raises:
        ValueError: there is none of that name; the message has the nearest, and all.
    """
    if name not in (known := prompt_sets()):
        nearest = get_close_matches(name.lower(), known, 1, cutoff=0.0)[0]
        raise ValueError(f"No prompts are called {name!r}; the nearest are {nearest!r}. There are {', '.join(known)}.")
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    classes: dict[str, list[str]] = {}
    for given in content["classes"]:
        names = [given] if isinstance(given, str) else given
        same = sum(own == names for own in classes.values())
        classes[f"{names[0]} ({same + 1})" if same else names[0]] = names
    return PromptSet(name, content["title"], content["metric"], template_set(content["templates"]), classes)


def plain(label: str) -> str:
    """Return a label in lower case, with blanks for underscores."""
    return label.replace("_", " ").strip().lower()
