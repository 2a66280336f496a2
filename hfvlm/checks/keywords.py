"""Keyword arguments that no one understands are errors: nothing is swallowed."""

import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from typing import Any


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keywords in a function's signature, `self` apart."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in named if p.kind in kinds and p.name != "self")


def check_keywords(
    owner: object, given: Iterable[str], known: Collection[str], standing: Collection[str] = ()
) -> None:
    """Refuse keywords that `owner`, an object, a class or a name, does not know.

    Args:
        owner: whose keywords they are.
        given: keywords.
        known: its own, of which the error names the nearest.
        standing: others, of transformers.

    Raises:
        TypeError: naming the first of them and the nearest known one.
    """
    for name in sorted(set(given) - set(known) - set(standing)):
        title = owner if isinstance(owner, str) else (owner if isinstance(owner, type) else type(owner)).__name__
        nearest = get_close_matches(name, sorted(known), 1, cutoff=0.0)
        hint = f" The nearest that it knows is {nearest[0]!r}." if nearest else ""
        raise TypeError(f"{title} got an unexpected keyword argument {name!r}.{hint}")
