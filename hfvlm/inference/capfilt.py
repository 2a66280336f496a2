"""BLIP's bootstrapping: a captioner generates a caption of every image, and a filter selects the captions that match,
among these and those from the web (https://arxiv.org/abs/2201.12086, section 3.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hfvlm.checks.ranges import check_generation, check_integer, check_number
from hfvlm.inference.adapters import load_model, processor_of
from hfvlm.inference.captioner import Captioner
from hfvlm.inference.pins import content_hash, pinned_data
from hfvlm.inference.shards import Row, Run, Tables, absolute, earlier_data, named, open_rows, run_shards
from hfvlm.inference.stores import ParquetStore
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image
from hfvlm.media.rows import first_caption
from hfvlm.modules.context import Context

SETTINGS, CAPTIONS = "capfilt.json", "captions"
# Nucleus sampling, as the authors': its captions are more varied than a beam's, and noisier.
GENERATE = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 20, "min_new_tokens": 5}


def capfilt(  # noqa: PLR0913 (each defines the content)
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
    """Generate and filter captions of a data set of images.

    The output holds `captions-<n>.parquet`: the row's number, id and path, `given`, its own text, and `written`, the
    generated one, the probability that each matches, and `kept`, the list of those that do. `errors-<n>.parquet` has
    the rows whose images cannot be read. Killed and started again, a run continues, with the same content.

    Args:
        source: what `datasets` reads.
        output: the folder.
        captioner: a folder of a model that generates captions.
        judge: a folder of the filter, a model with `match`, as `HfvlmBLIPForImageTextRetrieval`.
        split: of the data set.
        columns: {"image": "photo", "text": "alt"}; by default by their usual names. Rows may come without texts.
        id_column: by default webdataset's `__key__`, or the image's path, or the row's number.
        threshold: least probability of a match with which a text is selected.
        batch_size: images that the models take at a time.
        shard_rows: rows of a shard.
        generate: options of `generate`, instead of the paper's nucleus sampling.
        seed: of the sampling; each shard has its own.

    Raises:
        ValueError: there are no images, the filter cannot match, a number is out of its range, or the output was
            made of other files, by other weights or with other settings.
    """
    check_integer("batch_size", batch_size)
    check_integer("shard_rows", shard_rows)
    check_integer("seed", seed, 0)
    check_number("threshold", threshold, 0, 1)
    check_generation(dict(generate or {}))
    source = absolute(source)
    rows, found = open_rows(source, split, columns, id_column)
    if "image" not in found:
        raise ValueError(f"{source}: no column of it holds images: name one with columns.")
    models = CapFilt(captioner, judge, dict(generate or GENERATE))
    settings = {
        "source": source, "split": split, "columns": found, "id_column": id_column, "threshold": threshold,
        "generate": models.options, "seed": seed, "shard_rows": shard_rows,
        # Sampling draws for a batch at a time.
        "batch_size": batch_size,
        "captioner_weights": content_hash(models.captioner.model), "judge_weights": content_hash(models.filter),
    }  # fmt: skip
    about = {"captioner": str(captioner), "judge": str(judge)}

    def tables(shard: list[Row], number: int) -> Tables:
        torch.manual_seed(seed * 1_000_003 + number)
        return models.shard(shard, found, id_column, batch_size, threshold)

    output = Path(output)
    data = pinned_data(source, split, earlier_data(output))
    run = Run(output, ParquetStore(output, CAPTIONS), SETTINGS, shard_rows, settings, data, about)
    run_shards(rows, run, tables)
    return output


def caption_or_none(value: Any) -> str | None:
    """Return the first caption of a row, if it has one."""
    caption = first_caption(value)
    return caption if isinstance(caption, str) and caption else None


class CapFilt:
    """A captioner and a filter."""

    def __init__(self, captioner: str | Path, filter_folder: str | Path, options: dict[str, Any]):
        self.captioner, self.options = Captioner.from_pretrained(captioner), options
        self.filter: Any = load_model(filter_folder).eval().to(self.captioner.model.device)
        if not hasattr(self.filter, "match"):
            raise ValueError(f"{filter_folder}: {type(self.filter).__name__} cannot match texts with images.")
        self.processor = processor_of(filter_folder)

    def shard(
        self, shard: list[Row], columns: Mapping[str, str], id_column: str | None, batch_size: int, threshold: float
    ) -> Tables:
        """Return the captions of a shard's rows, and its errors."""
        import pyarrow

        types = {"row": pyarrow.int64(), "id": pyarrow.string(), "path": pyarrow.string()}
        for kind in ("given", "written"):
            types |= {kind: pyarrow.string(), f"{kind}_match": pyarrow.float32()}
        types["kept"] = pyarrow.list_(pyarrow.string())
        captions: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        for start in range(0, len(shard), batch_size):
            readable: list[tuple[dict[str, Any], Any]] = []
            for number, row in shard[start : start + batch_size]:
                name, path = named(number, row, [columns["image"]], id_column)
                about = {"row": number, "id": name}
                try:
                    image = read_image(row.get(columns["image"]))
                except MediaError as error:
                    errors.append(about | {"error": str(error)})
                    continue
                text = row.get(columns["text"]) if "text" in columns else None
                readable.append((about | {"path": path, "given": caption_or_none(text)}, image))
            captions += self.filtered(readable, threshold)
        return pyarrow.Table.from_pylist(captions, pyarrow.schema(list(types.items()))), errors

    def filtered(self, readable: Sequence[tuple[dict[str, Any], Any]], threshold: float) -> list[dict[str, Any]]:
        """Return rows with both texts, the probabilities that they match, and the texts that are selected."""
        if not readable:
            return []
        images = [image for _, image in readable]
        generated = self.captioner(images, batch_size=len(images), **self.options)
        texts = [(about["given"] or "", text) for (about, _), text in zip(readable, generated, strict=True)]
        shares = self.matches(images, [text for pair in texts for text in pair])
        rows = []
        for i, (about, _) in enumerate(readable):
            given, found = float(shares[i, 0]), float(shares[i, 1])
            values = about | {"written": generated[i], "written_match": found}
            values["given_match"] = given if about["given"] else None
            both = ((about["given"], given), (generated[i], found))
            rows.append(values | {"kept": [text for text, share in both if text and share >= threshold]})
        return rows

    @torch.inference_mode()
    def matches(self, images: list[Any], texts: list[str]) -> torch.Tensor:
        """Return the probabilities that the two texts of each image match it; `(B, 2)`."""
        inputs = self.processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True)
        inputs = inputs.to(self.filter.device)
        context = Context(self.filter.vision_model(inputs["pixel_values"]).last_hidden_state)
        logits = self.filter.match(inputs["input_ids"], inputs.get("attention_mask"), context)
        return logits.float().softmax(dim=-1)[:, 1].view(len(images), 2).cpu()
