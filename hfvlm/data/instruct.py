"""Instructions written from captions and boxes, as LLaVA's (https://arxiv.org/abs/2304.08485, section 3), and from
notes on the key frames of videos, as Video-ChatGPT's semi-automatic ones (https://arxiv.org/abs/2306.05424,
section 4)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfvlm.checks.ranges import check_integer
from hfvlm.data.answers import CHECKS, Pairs, faults, read_pairs
from hfvlm.data.procedure import Decision, Procedure, run_procedure
from hfvlm.data.prompts import KINDS, VERSION, Kind, condensing, known_of_image, known_of_video, notes_on
from hfvlm.data.reading import Source, as_source
from hfvlm.data.report import ROWS, Report
from hfvlm.data.store import Store
from hfvlm.data.words import drawn, key_of
from hfvlm.data.writers import Writer
from hfvlm.inference.shards import Row
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image
from hfvlm.media.rows import path_of
from hfvlm.writing import replaced

__all__ = ["CHECKS", "KINDS", "instruct"]

EXAMPLES, MEDIA = "instruct.jsonl", "media"
# Rows whose texts a run that is killed asks for again.
SHARD_ROWS = 16
IMAGE_KINDS = tuple(name for name, kind in KINDS.items() if kind.modality == "image")


def instruct(
    source: Source | str | Path,
    output: str | Path,
    writer: Writer,
    *,
    kinds: Sequence[str] = IMAGE_KINDS,
    boxes: str | None = None,
    frames: str | None = None,
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
) -> Report:
    """Let a chat model write questions and answers about images or videos, from texts about them.

    The output is as `run_procedure` writes it, with a row for each text that passes the checks: its id, the image or
    video, `messages`, `kind`, and `origin`, the row, the model, the version of the prompts, the seed and what the
    model was given. `instruct.jsonl` has the same rows as `hfvlm train` with the task "chat" reads them; media that
    are in no file of their own are written next to it. A text that fails a check of `CHECKS` is dropped.

    Args:
        source: what `open_source` opened, or takes.
        output: a folder.
        writer: `ChatModel(folder)` or `Endpoint(url, model)`.
        kinds: of `KINDS`, all of images or all of videos.
        boxes: the column of boxes in an image: `[{"label": "dog", "box": [left, top, right, bottom]}, ...]`, pixels.
        frames: the column of a video's key frames: `[{"caption": "a dog", "regions": ["a red ball", ...], "tags":
            ["dog", "ball", ...]}, ...]`, each part optional.
        seed: of what is drawn; each row and kind has its own.
        shard_rows: rows after which what was written is stored.

    Raises:
        ValueError: there is no such kind, column or image, or see `run_procedure`.
        EndpointError: the endpoint does not answer; started again, the run continues.
    """
    check_integer("seed", seed, 0)
    chosen = chosen_kinds(kinds)
    opened = as_source(source, output)
    opened.needs(chosen[0].modality)
    for name, column in (("boxes", boxes), ("frames", frames)):
        if column is not None and column not in opened.schema.names:
            raise ValueError(f"{name}: {opened.location} has no column {column}; it has {opened.schema.names}.")
    if not any((boxes, frames, "text" in opened.columns)):
        raise ValueError(f"{opened.location}: has neither texts, boxes nor frames: there is nothing to write from.")
    report = run_procedure(
        Instruct(opened, writer, chosen, {"boxes": boxes, "frames": frames, "seed": seed}),
        output,
        shard_rows=shard_rows,
    )
    write_examples(Path(output), chosen[0].modality)
    return report


def chosen_kinds(names: Sequence[str]) -> list[Kind]:
    """Return kinds by name.

    Raises:
        ValueError: there is none, no such one, or they are of images and of videos.
    """
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"kind {unknown[0]!r} is none of {', '.join(KINDS)}.")
    chosen = [KINDS[name] for name in dict.fromkeys(names)]
    if len({kind.modality for kind in chosen}) != 1:
        raise ValueError(f"kinds must be of images or of videos, not {', '.join(names) or 'none'}.")
    return chosen


class Instruct(Procedure):
    """Instructions: one pass lets the model write, and checks.

    Args:
        source: the rows.
        writer: the model.
        kinds: what it is to write about each row, of one modality.
        options: {"boxes": the column or None, "frames": likewise, "seed": a number}.
    """

    name = "instruct"

    def __init__(self, source: Source, writer: Writer, kinds: Sequence[Kind], options: Mapping[str, Any]):
        super().__init__(source)
        self.writer, self.kinds, self.options = writer, list(kinds), dict(options)
        self.modality = self.kinds[0].modality

    @property
    def settings(self) -> dict[str, Any]:
        kinds = [kind.name for kind in self.kinds]
        return self.options | {"kinds": kinds, "prompts": VERSION, "writer": self.writer.settings}

    @property
    def schema(self) -> Any:
        import pyarrow as pa

        text, media = pa.string(), self.source.schema.field(self.source.columns[self.modality]).type
        message = pa.struct([("role", text), ("content", text)])
        origin = [("row", pa.int64()), ("writer", text), ("prompts", text), ("seed", pa.int64()), ("given", text)]
        fields = {"id": text, self.modality: media, "messages": pa.list_(message), "kind": text}
        return pa.schema(list((fields | {"origin": pa.struct(origin)}).items()))

    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        for number, row in shard:
            try:
                given = self.known(number, row)
            except (MediaError, ValueError) as error:
                yield Decision(
                    number, reasons=["unreadable"], note=self.source.note(error), text=self.source.shown(row)
                )
                continue
            for kind in self.kinds:
                yield self.written(number, row, kind, given)

    def seed(self, number: int, purpose: str) -> int:
        """Return the seed of one text."""
        return key_of(f"{self.options['seed']},{number},{purpose}") % 2**31

    def known(self, number: int, row: Mapping[str, Any]) -> str:
        """Describe what is known of a row's image or video, for the model.

        Raises:
            ValueError: there is nothing.
            MediaError: the size of its image, for its boxes, cannot be read.
        """
        texts = self.source.texts(row) if "text" in self.source.columns else []
        if self.modality == "image":
            boxes = records(row.get(self.options["boxes"])) if self.options["boxes"] else []
            given = known_of_image(texts, self.shares(row, boxes) if boxes else [])
        else:
            frames = records(row.get(self.options["frames"])) if self.options["frames"] else []
            condensed = self.writer(condensing(notes_on(frames)), self.seed(number, "notes"))[0] if frames else ""
            given = known_of_video(texts, condensed)
        if not given.strip():
            raise ValueError("there is neither a text, a box nor a frame")
        return given

    def shares(self, row: Mapping[str, Any], boxes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float]]]:
        """Return boxes as shares of the image's width and height.

        Raises:
            ValueError: one is no box.
        """
        width, height = read_image(self.source.media(row)).size
        found = []
        for each in boxes:
            edges = each.get("box")
            if not each.get("label") or not isinstance(edges, list | tuple) or len(edges) != 4:
                raise ValueError(f"{each!r} is not {{'label': ..., 'box': [left, top, right, bottom]}}")
            sides = zip(edges, (width, height, width, height), strict=True)
            found.append((str(each["label"]), [min(max(edge / side, 0.0), 1.0) for edge, side in sides]))
        return found

    def written(self, number: int, row: Mapping[str, Any], kind: Kind, given: str) -> Decision:
        """Let the model write one text about a row, and check it."""
        seed = self.seed(number, kind.name)
        text, complete = self.writer(kind.messages(given), seed)
        question = kind.questions[int(drawn(seed) * len(kind.questions))] if kind.questions else ""
        pairs: Pairs | None = [(question, text.strip())] if question else read_pairs(text, kind.pairs)
        reasons = ([] if complete else ["cut"]) + (["format"] if pairs is None else faults(pairs, kind.questions))
        if reasons or pairs is None:
            return Decision(number, reasons=reasons, note=kind.name, text=text)
        messages = [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        writer = str(self.writer.settings["model"])
        origin = {"row": number, "writer": writer, "prompts": VERSION, "seed": seed, "given": given}
        made: dict[str, Any] = {self.modality: row[self.source.columns[self.modality]], "messages": messages}
        made |= {"id": f"{self.source.name(number, row)}-{kind.name}", "kind": kind.name, "origin": origin}
        return Decision(number, [made])


def records(value: Any) -> list[dict[str, Any]]:
    """Return a list of records, which some files hold as a record of lists."""
    if isinstance(value, Mapping):
        return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    return list(value or ())


def write_examples(output: Path, modality: str) -> None:
    """Write the rows of an output as JSON lines, with paths of the media."""
    from pyarrow import parquet

    if (output / EXAMPLES).exists():
        return
    with replaced(output / EXAMPLES) as file, file.open("w", encoding="utf-8") as lines:
        for shard in sorted(output.glob(f"{ROWS}-*.parquet")):
            for i, row in enumerate(parquet.read_table(shard).to_pylist()):
                path = file_of(row[modality], output / MEDIA, f"{shard.stem}-{i}")
                lines.write(json.dumps(row | {modality: path}, ensure_ascii=False) + "\n")


def file_of(media: Any, folder: Path, name: str) -> str:
    """Return the path of media, written into `folder` if it is in no file of its own."""
    path = path_of(media)
    if isinstance(media, str) or (path and Path(path).is_file()):
        return str(path)
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}{Path(path or '').suffix}"
    with replaced(target) as file:
        file.write_bytes(media["bytes"] if isinstance(media, Mapping) else media)
    return str(target.resolve())
