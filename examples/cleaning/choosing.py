"""The trials of the procedures that choose rows, each on pairs with the noise that it is for."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from cleaning.trials import Trial, names_of_kinds
from hfvlm.data.balance import balance
from hfvlm.data.dedupe import dedupe
from hfvlm.data.filtering import Thresholds, filter_pairs
from hfvlm.data.nouns import nouns
from hfvlm.data.queries import FromWords
from hfvlm.data.report import Report
from hfvlm.samples.noisy_pairs import noisy_pairs, write_pairs

JUNK = ("boilerplate", "gibberish", "short", "long", "tiny", "elongated", "damaged")


def with_noise(shares: Mapping[str, float], skew: float = 0.0) -> Callable[[Path, argparse.Namespace], None]:
    """Return a function that writes pairs."""

    def write(folder: Path, options: argparse.Namespace) -> None:
        write_pairs(folder, noisy_pairs(options.rows, shares, skew=skew, seed=options.seed))

    return write


def filtered(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    """ALIGN's thresholds, where images have 32 pixels and captions of 192 kinds repeat."""
    return filter_pairs(rows, output, Thresholds(min_edge=9, max_images=options.rows // 50, min_count=2))


def deduplicated(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    return dedupe(rows, output)


def balanced(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    """A query for each kind of scene would be too kind: single words and pairs of neighbours are what a user has."""
    return balance(
        rows, output, method="clip", most=options.rows // 60, queries=FromWords(2, information=0.0), seed=options.seed
    )


def by_phrases(rows: Path, output: Path, options: argparse.Namespace) -> Report:
    return nouns(rows, output, most=options.rows // 200, by="rules", seed=options.seed)


TRIALS = {
    "filter": Trial(with_noise(dict.fromkeys(JUNK, 0.1)), filtered, names_of_kinds, chooses=True),
    "dedupe": Trial(with_noise({"duplicate": 0.85}), deduplicated, names_of_kinds, chooses=True),
    "balance": Trial(with_noise({}, skew=2.0), balanced, names_of_kinds, chooses=True),
    "nouns": Trial(with_noise({}, skew=2.0), by_phrases, names_of_kinds, chooses=True),
}
