"""Concept balancing by noun phrases, by which LLaVA's 595K pairs were chosen out of CC3M
(https://arxiv.org/abs/2304.08485, appendix)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfvlm.checks.ranges import check_integer
from hfvlm.data.phrases import Extract, extractor
from hfvlm.data.procedure import SHARD_ROWS, Decision, Procedure, run_procedure
from hfvlm.data.reading import Source, as_source
from hfvlm.data.report import Report
from hfvlm.data.sampling import Samples
from hfvlm.data.store import Store
from hfvlm.data.words import key_of
from hfvlm.inference.shards import Row


def nouns(
    source: Source | str | Path,
    output: str | Path,
    *,
    least: int = 3,
    most: int = 100,
    by: str | None = None,
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
) -> Report:
    """Choose pairs by the noun phrases of their texts.

    Phrases in fewer than `least` rows are skipped; of each other one, all rows are taken, or `most` by chance. The
    authors begin with the rarest phrases; which rows are taken does not depend on the order, as each phrase draws
    from all its rows. For the output see `run_procedure`.

    Args:
        source: what `open_source` opened, or takes.
        output: a folder.
        least: rows of a phrase that is not skipped.
        most: rows that a phrase takes.
        by: what extracts phrases, see `hfvlm.data.phrases.extractor`.
        seed: of what is drawn.
        shard_rows: rows that are read at a time.

    Raises:
        ValueError: there are no texts, a number is out of its range, or see `run_procedure` and `extractor`.
        ImportError: spaCy is not installed.
    """
    numbers = {"least": check_integer("least", least), "most": check_integer("most", most)}
    numbers["seed"] = check_integer("seed", seed, 0)
    opened = as_source(source, output)
    opened.needs("text")
    return run_procedure(Nouns(opened, numbers, *extractor(by)), output, shard_rows=shard_rows)


class Nouns(Procedure):
    """Sampling by noun phrases: a pass counts the rows of each, and another decides."""

    name, passes = "nouns", ("count",)

    def __init__(self, source: Source, numbers: Mapping[str, int], extract: Extract, about: str):
        super().__init__(source)
        self.numbers, self.extract, self.about = dict(numbers), extract, about

    @property
    def settings(self) -> dict[str, Any]:
        return self.numbers | {"phrases by": self.about}

    def begin(self, store: Store) -> None:
        self.samples = Samples(
            store, most=self.numbers["most"], least=self.numbers["least"], seed=self.numbers["seed"]
        )

    def keys(self, shard: Sequence[Row]) -> Iterator[tuple[int, dict[int, str]]]:
        """Yield the phrases of each row, by key."""
        texts = [self.source.texts(row) for _, row in shard]
        found = iter(self.extract(text for own in texts for text in own))
        for (number, _), own in zip(shard, texts, strict=True):
            phrases = [phrase for _ in own for phrase in next(found)]
            yield number, {key_of(phrase): phrase for phrase in phrases}

    def count(self, shard: Sequence[Row], store: Store) -> None:
        """Count the rows of each phrase."""
        self.samples.count(list(self.keys(shard)))

    def ended(self, name: str, store: Store) -> None:
        self.samples.limit()

    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        for (number, keys), (_, row) in zip(self.keys(shard), shard, strict=True):
            known, taken = self.samples.take(number, keys)
            decision = Decision(number, text=self.source.shown(row))
            if taken:
                decision.rows = [row]
            else:
                decision.reasons = ["over-limit" if known else "rare-phrases" if keys else "no-phrase"]
                decision.note = ", ".join(list(keys.values())[:3])
            yield decision

    def details(self, store: Store, output: Path) -> dict[str, Any]:
        return {"phrases by": self.about} | self.samples.details("phrases")
