"""BLIP's bootstrapping: a captioner writes a caption for every picture, and of these and of those that came with the
pictures, a filter keeps the ones that match (https://arxiv.org/abs/2201.12086, section 3.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hfvlm.checks.ranges import check_generation, check_integer, check_number
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.inference.captioner import Captioner
from hfvlm.inference.embed import absolute
from hfvlm.inference.pins import content_hash, pinned_data
from hfvlm.inference.shards import Columns, Row, Run, append, earlier_data, named, run_shards
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image
from hfvlm.media.rows import columns_by_name, first_caption, load_rows
from hfvlm.modules.context import Context

SETTINGS, CAPTIONS = "capfilt.json", "captions"
# Nucleus sampling, as the authors': its captions are more varied than a beam's, and noisier.
GENERATE = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 20, "min_new_tokens": 5}


def capfilt(  # noqa: PLR0913 (each says what the content is)
    source: str | Path,
    output: str | Path,
    captioner: str | Path,
    judge: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    id_column: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 16,
    shard_rows: int = 1024,
    generate: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write and filter captions of a data set of pictures.

    The output holds `captions-<n>.parquet`: the row's number, id and path, the text that came with it and the one that
    was written, the probability that each matches, and `kept`, the list of those that do. `errors-<n>.parquet` has the
    rows whose pictures cannot be read. Killed and started again, a run goes on where it was, with the same content.

    Args:
        source: what `datasets` reads.
        output: the folder.
        captioner: a folder of a model that writes captions.
        judge: a folder of a model with `match`, as `HfvlmBLIPForImageTextRetrieval`.
        split: of the data set.
        columns: {"image": "photo", "text": "alt"}; by default by their usual names. Rows may come without texts.
        id_column: by default webdataset's `__key__`, or the picture's path, or the row's number.
        threshold: probability of a match from which on a text is kept.
        batch_size: pictures that the models take at a time.
        shard_rows: rows of a shard.
        generate: options of `generate`, in place of the paper's nucleus sampling.
        seed: of the sampling; each shard has its own.

    Raises:
        ValueError: there are no pictures, the judge cannot match, a number is out of its range, or the output was
            made of other files, by other weights or with other settings.
    """
    check_integer("batch_size", batch_size)
    check_integer("shard_rows", shard_rows)
    check_integer("seed", seed, 0)
    check_number("threshold", threshold, 0, 1)
    check_generation(dict(generate or {}))
    source = absolute(source)
    rows = load_rows(source, split=split, streaming=True)
    names = list(rows.features or next(iter(rows), {}))
    found = dict(columns or columns_by_name(names))
    if missing := [name for name in (*found.values(), *filter(None, [id_column])) if name not in names]:
        raise ValueError(f"{source}: has no column {', '.join(missing)}; it has {', '.join(names)}.")
    if "image" not in found:
        raise ValueError(f"{source}: no column of it holds pictures: name one with columns.")
    filter_ = CapFilt(captioner, judge, dict(generate or GENERATE))
    settings = {
        "source": source, "split": split, "columns": found, "id_column": id_column, "threshold": threshold,
        "generate": filter_.options, "seed": seed, "shard_rows": shard_rows,
        # Sampling draws for a batch at a time.
        "batch_size": batch_size,
        "captioner_weights": content_hash(filter_.captioner.model), "judge_weights": content_hash(filter_.judge),
    }  # fmt: skip
    about = {"captioner": str(captioner), "judge": str(judge)}

    def tables(shard: list[Row], number: int) -> tuple[Any, Columns]:
        torch.manual_seed(seed * 1_000_003 + number)
        return filter_.shard(shard, found, id_column, batch_size, threshold)

    data = pinned_data(source, split, earlier_data(Path(output)))
    run_shards(rows, Run(Path(output), CAPTIONS, SETTINGS, shard_rows, settings, data, about), tables)
    return Path(output)


def caption_or_none(value: Any) -> str | None:
    """The first caption of a row, if it has one."""
    caption = first_caption(value)
    return caption if isinstance(caption, str) and caption else None


class CapFilt:
    """A captioner and a judge."""

    def __init__(self, captioner: str | Path, judge: str | Path, options: dict[str, Any]):
        self.captioner, self.options = Captioner.from_pretrained(captioner), options
        self.judge: Any = load_model(judge).eval().to(self.captioner.model.device)
        if not hasattr(self.judge, "match"):
            raise ValueError(f"{judge}: {type(self.judge).__name__} cannot tell whether a text matches a picture.")
        self.processor = processor_of(judge)

    def shard(
        self, shard: list[Row], columns: Mapping[str, str], id_column: str | None, batch_size: int, threshold: float
    ) -> tuple[Any, Columns]:
        """What became of a shard's rows, and its errors."""
        import pyarrow

        types = {"row": pyarrow.int64(), "id": pyarrow.string(), "path": pyarrow.string()}
        for kind in ("given", "written"):
            types |= {kind: pyarrow.string(), f"{kind}_match": pyarrow.float32()}
        types["kept"] = pyarrow.list_(pyarrow.string())
        kept: Columns = {name: [] for name in types}
        errors: Columns = {name: [] for name in ("row", "id", "error")}
        for start in range(0, len(shard), batch_size):
            readable: list[tuple[dict[str, Any], Any]] = []
            for place, row in shard[start : start + batch_size]:
                name, path = named(place, row, [columns["image"]], id_column)
                about = {"row": place, "id": name}
                try:
                    picture = read_image(row.get(columns["image"]))
                except MediaError as error:
                    append(errors, about | {"error": str(error)})
                    continue
                text = row.get(columns["text"]) if "text" in columns else None
                readable.append((about | {"path": path, "given": caption_or_none(text)}, picture))
            for values in self.judged(readable, threshold):
                append(kept, values)
        return pyarrow.table(kept, pyarrow.schema(list(types.items()))), errors

    def judged(self, readable: Sequence[tuple[dict[str, Any], Any]], threshold: float) -> list[dict[str, Any]]:
        """Rows with both texts, whether they match, and those that are kept."""
        if not readable:
            return []
        pictures = [picture for _, picture in readable]
        written = self.captioner(pictures, batch_size=len(pictures), **self.options)
        texts = [(about["given"] or "", text) for (about, _), text in zip(readable, written, strict=True)]
        shares = self.matches(pictures, [text for pair in texts for text in pair])
        rows = []
        for i, (about, _) in enumerate(readable):
            given, found = float(shares[i, 0]), float(shares[i, 1])
            values = about | {"written": written[i], "written_match": found}
            values["given_match"] = given if about["given"] else None
            both = ((about["given"], given), (written[i], found))
            rows.append(values | {"kept": [text for text, share in both if text and share >= threshold]})
        return rows

    @torch.inference_mode()
    def matches(self, pictures: list[Any], texts: list[str]) -> torch.Tensor:
        """`(B, 2)`: the probabilities that the two texts of each picture match it."""
        inputs = self.processor(images=pictures, text=texts, return_tensors="pt", padding=True, truncation=True)
        inputs = inputs.to(self.judge.device)
        context = Context(self.judge.vision_model(inputs["pixel_values"]).last_hidden_state)
        logits = self.judge.match(inputs["input_ids"], inputs.get("attention_mask"), context)
        return logits.float().softmax(dim=-1)[:, 1].view(len(pictures), 2).cpu()
