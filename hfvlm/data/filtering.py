"""The filter of noisy pairs of images and texts that ALIGN was trained on (https://arxiv.org/abs/2102.05918,
section 3)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfvlm.data.hashes import describe
from hfvlm.data.near import Near, Perceptual, TestSets
from hfvlm.data.procedure import SHARD_ROWS, Decision, Procedure, run_procedure
from hfvlm.data.reading import Source, as_source, content_of
from hfvlm.data.report import Report
from hfvlm.data.rules import RULES, Thresholds
from hfvlm.data.store import Store
from hfvlm.data.words import key_of, pairs_of, words_of
from hfvlm.inference.shards import Row
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image

__all__ = ["RULES", "Thresholds", "filter_pairs"]

# A rule that is broken, and a note on it.
Broken = tuple[str, str]


def filter_pairs(
    source: Source | str | Path,
    output: str | Path,
    thresholds: Thresholds | None = None,
    *,
    tests: Mapping[str, str] | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Report:
    """Filter pairs of images and texts by ALIGN's rules, but for that on pornography, which needs a classifier.

    Of a row with several texts, those that break a rule are taken out, and the row is dropped if none is left. For the
    output see `run_procedure`.

    Args:
        source: what `open_source` opened, or takes.
        output: a folder.
        thresholds: of the rules; by default the paper's.
        tests: data sets by name, of whose split "test" no near duplicate is kept; "folder::split" for another.
        shard_rows: rows that are read at a time.

    Raises:
        ValueError: there are no images or no texts, or see `run_procedure`.
    """
    opened = as_source(source, output)
    opened.needs("image", "text")
    procedure = Filter(opened, thresholds or Thresholds(), TestSets.open(tests or {}, Perceptual()))
    return run_procedure(procedure, output, shard_rows=shard_rows)


class Filter(Procedure):
    """ALIGN's filter: a pass counts texts, images and words, and another decides."""

    name, passes = "filter", ("count",)

    def __init__(self, source: Source, thresholds: Thresholds, tests: TestSets):
        super().__init__(source)
        self.thresholds, self.tests = thresholds, tests

    @property
    def settings(self) -> dict[str, Any]:
        return self.thresholds.settings() | {"tests": self.tests.settings}

    def begin(self, store: Store) -> None:
        store.create("pairs", "image INTEGER, text INTEGER", "image, text")
        store.counts("tokens")
        store.counts("words")
        self.near = Near(store, self.tests.likeness)
        self.tests.describe(self.near)
        self.near.prepare()

    def count(self, shard: Sequence[Row], store: Store) -> None:
        """Count the texts of each image, the images of each text, and words."""
        tokens: Counter[str] = Counter()
        words: Counter[str] = Counter()
        pairs = []
        for _, row in shard:
            texts = self.source.texts(row)
            for text in texts:
                own = words_of(text)
                words.update(own)
                tokens.update([*own, *pairs_of(own)])
            with suppress(MediaError):  # the rule "unreadable" finds it again
                image = key_of(content_of(self.source.media(row)))
                pairs += [(image, key_of(text)) for text in texts]
        store.connection.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?)", pairs)
        store.count("tokens", {key_of(token): (None, n) for token, n in tokens.items()})
        store.count("words", {key_of(word): (None, n) for word, n in words.items()})

    def ended(self, name: str, store: Store) -> None:
        for table, column, most in (("images", "image", "max_texts"), ("texts", "text", "max_images")):
            store.run(f"DROP TABLE IF EXISTS {table}")
            store.create(table, "key INTEGER, n INTEGER", "key")
            store.run(
                f"INSERT INTO {table} SELECT {column}, count(*) FROM pairs GROUP BY {column} HAVING count(*) > ?",
                getattr(self.thresholds, most),
            )
        # The count of the last token of the vocabulary; tokens that are as frequent as it are in it.
        last = store.one("SELECT n FROM tokens ORDER BY n DESC LIMIT 1 OFFSET ?", self.thresholds.vocabulary - 1)
        store.put("least", float(last or 0))

    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        for number, row in shard:
            broken = self.of_image(row, store)
            kept, broken_by_texts = self.texts(row, store)
            every = broken + ([] if kept else broken_by_texts)
            decision = Decision(number, reasons=[rule for rule, _ in every], text=self.source.shown(row))
            if every:
                decision.note = every[0][1]
            else:
                decision.rows = [row | self.only(row, kept)]
            yield decision

    def only(self, row: Mapping[str, Any], kept: list[str]) -> dict[str, Any]:
        """Return the column of a row's texts with those that are kept."""
        column = self.source.columns["text"]
        return {} if isinstance(row[column], str) else {column: kept}

    def of_image(self, row: Mapping[str, Any], store: Store) -> list[Broken]:
        """Return the rules that a row's image breaks, with notes."""
        media = self.source.media(row)
        try:
            image = read_image(media)
            hits = self.tests.hits(self.near, describe(image)) if self.tests.sources else []
            texts = store.one("SELECT n FROM images WHERE key = ?", key_of(content_of(media)))
        except MediaError as error:
            return [("unreadable", self.source.note(error))]
        found = self.thresholds.of_image(image)
        found += [("many-texts", f"{texts} texts")] if texts else []
        if hits:
            found.append(("test-duplicate", f"row {hits[0].row} of {self.tests.names[hits[0].group - 1]}"))
        return found

    def texts(self, row: Mapping[str, Any], store: Store) -> tuple[list[str], list[Broken]]:
        """Return the texts of a row that are kept, and the rules that its others break."""
        texts, kept, every = self.source.texts(row), [], []
        for text in texts:
            broken = self.of_text(text, store)
            kept += [] if broken else [text]
            every += broken
        return kept, every or ([] if texts else [("no-text", "")])

    def of_text(self, text: str, store: Store) -> list[Broken]:
        """Return the rules that a text breaks, with notes."""
        words = words_of(text)
        if not words:
            return [("no-text", "")]
        images = store.one("SELECT n FROM texts WHERE key = ?", key_of(text))
        found = [("boilerplate", f"{images} images")] if images else []
        rare = self.first_rare(store, "tokens", [*words, *pairs_of(words)], store.get("least"))
        found += [("rare-token", rare)] if rare else []
        rare = self.first_rare(store, "words", words, self.thresholds.min_count)
        found += [("rare-word", rare)] if rare else []
        return found + self.thresholds.of_length(len(words))

    @staticmethod
    def first_rare(store: Store, table: str, tokens: Sequence[str], least: float) -> str | None:
        """Return the first token that was counted fewer times than `least`."""
        if least <= 1:
            return None
        counted = (store.one(f"SELECT n FROM {table} WHERE key = ?", key_of(token)) for token in tokens)
        return next((token for token, n in zip(tokens, counted, strict=True) if (n or 0) < least), None)
