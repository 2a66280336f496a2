"""BLIP's bootstrapping as one loop (https://arxiv.org/abs/2201.12086, section 3.3): a captioner and a filter clean the
captions, both are trained on what they kept, and they clean the captions again."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfvlm.checks.ranges import check_integer
from hfvlm.data.procedure import SHARD_ROWS, Decision, Procedure, run_procedure
from hfvlm.data.reading import Source, as_source
from hfvlm.data.report import Report
from hfvlm.data.store import Store
from hfvlm.inference.capfilt import CAPTIONS, capfilt
from hfvlm.inference.capfilt import SETTINGS as CAPFILT
from hfvlm.inference.shards import Row, read_json
from hfvlm.writing import replaced

SETTINGS = "rounds.json"
MATCHES = ("given_match", "written_match")
# A model's folder, the folder of the pairs, and the folder of the trained model, which it writes.
Train = Callable[[Path, Path, Path], None]


def bootstrap(
    source: Source | str | Path,
    output: str | Path,
    captioner: str | Path,
    judge: str | Path,
    trains: Mapping[str, Train],
    *,
    rounds: int = 1,
    **options: Any,
) -> list[Report]:
    """Bootstrap captions, train on them, and repeat.

    The output has a folder `round-<n>` for each round, with `captions`, what `capfilt` wrote; `pairs`, the rows with
    the texts that were kept; `captioner` and `judge`, the models that were trained on them, with which the next round
    goes on. A run that was killed continues; a training that was killed is repeated.

    Args:
        source: what `open_source` opened, or takes; a folder or a Hub id.
        output: a folder.
        captioner: a folder of a model that generates captions.
        judge: a folder of a model that matches texts with images.
        trains: {"captioner": function, "judge": function}: how either is trained; one that is left out stays as it is.
        rounds: how many.
        **options: of `capfilt`, as `threshold`, `seed`, `batch_size`.

    Returns:
        The reports of the rounds: which rows are left without any text, and how many texts of either origin are kept.

    Raises:
        ValueError: see `capfilt` and `run_procedure`, or the folder was begun with other settings.
    """
    check_integer("rounds", rounds)
    source = as_source(source, Path(output) / "round-1" / "pairs")
    if unknown := sorted(set(trains) - {"captioner", "judge"}):
        raise ValueError(f"trains: {unknown[0]!r} is neither 'captioner' nor 'judge'.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    begun = {"captioner": str(captioner), "judge": str(judge), "trained": sorted(trains)} | options
    check_begun(output, begun)
    models, reports = {"captioner": Path(captioner), "judge": Path(judge)}, []
    for number in range(1, rounds + 1):
        folder = output / f"round-{number}"
        given = {"split": source.split, "columns": source.columns, "id_column": source.id_column}
        capfilt(source.location, folder / "captions", **models, **given, **options)  # type: ignore[arg-type]
        kept = Kept(source, folder / "captions")
        reports.append(run_procedure(kept, folder / "pairs", shard_rows=SHARD_ROWS))
        for name, train in trains.items():
            mark = folder / f"{name}.trained"
            if not mark.exists():
                train(models[name], folder / "pairs", folder / name)
                mark.touch()
            models[name] = folder / name
    return reports


def check_begun(output: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that was begun with other settings; the number of rounds may grow.

    Raises:
        ValueError: the message names them.
    """
    path = output / SETTINGS
    if path.exists():
        earlier = read_json(path)
        if other := [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]:
            raise ValueError(f"{path}: was begun with another {', '.join(other)}: choose another output.")
        return
    if any(output.iterdir()):
        raise ValueError(f"{output}: holds files of something else: choose another output.")
    with replaced(path) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class Kept(Procedure):
    """The rows whose images have a text that matches.

    Args:
        source: the rows.
        captions: the folder that `capfilt` wrote.
    """

    name = "bootstrapping"

    def __init__(self, source: Source, captions: Path):
        super().__init__(source)
        self.captions, self.about = captions, read_json(captions / CAPFILT)
        self.text = source.columns.get("text", "text")

    @property
    def settings(self) -> dict[str, Any]:
        return {"captions": self.about}

    @property
    def schema(self) -> Any:
        import pyarrow

        kinds = {field.name: field.type for field in self.source.schema}
        return pyarrow.schema(list((kinds | {self.text: pyarrow.list_(pyarrow.string())}).items()))

    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        captions = self.captions_of(shard[0][0], shard[-1][0])
        for number, row in shard:
            found = captions.get(number)
            if found is None:
                yield Decision(number, reasons=["unreadable"], note="see captions/errors-*.parquet")
                continue
            for kind in ("given", "written"):
                store.add(f"{kind} texts", found[kind] is not None)
                store.add(f"{kind} texts kept", found[kind] in found["kept"])
            decision = Decision(number, text=found["given"] or found["written"])
            if found["kept"]:
                decision.rows = [row | {self.text: found["kept"]}]
            else:
                decision.reasons = ["no-match"]
                decision.note = ", ".join(f"{found[k]:.2f}" for k in MATCHES if found[k] is not None)
            yield decision

    def captions_of(self, first: int, last: int) -> dict[int, dict[str, Any]]:
        """Read what `capfilt` found about rows, by number."""
        from pyarrow import parquet

        size = self.about["shard_rows"]
        shards = range(first // size, last // size + 1)
        files = (self.captions / f"{CAPTIONS}-{number:05}.parquet" for number in shards)
        return {row["row"]: row for file in files for row in parquet.read_table(file).to_pylist()}

    def details(self, store: Store, output: Path) -> dict[str, Any]:
        names = ("given texts", "given texts kept", "written texts", "written texts kept")
        return {name: int(store.get(name)) for name in names}
