"""How embedding and searching grow with the number of rows: the parts of the engine besides the model, and a cluster.

python -m benchmarks.scale reading|writing|searching|cluster [--most 100000]

Each line has CPU seconds, which other work on the machine disturbs least. `cluster` embeds 100,000 images through Ray
Data, kills an actor, and compares the shards with those of one process bit for bit.
"""

import argparse
import io
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow
from PIL import Image
from pyarrow import parquet

import hfvlm
from hfvlm.cli.console import print_text
from hfvlm.inference.cluster import Cluster, packed, unpacked
from hfvlm.inference.destinations import Destination, open_store
from hfvlm.inference.embed import count_rows, embed
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.index import FaissIndex, Index
from hfvlm.inference.search import nearest_rows
from hfvlm.inference.shards import missing_shards
from hfvlm.inference.stores import schema_of, vector_type
from hfvlm.media.rows import load_rows
from hfvlm.samples import scenes

SIZE, SHARD, SEED = 512, 4096, 0
# Rows of the largest local Qdrant, which commits each of them to disk.
LOCAL = 1_000


def timed(function: Callable[..., Any], *given: Any, **options: Any) -> tuple[float, float, Any]:
    """CPU seconds of this process, seconds, and the result."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = function(*given, **options)
    return time.process_time() - cpu, time.perf_counter() - wall, found


def show(what: str, rows: int, cpu: float, wall: float, more: str = "") -> None:
    times = f"{cpu:9.3f} s CPU  {wall:9.3f} s  {cpu / rows * 1e6:9.2f} us/row"
    print_text(f"{what:<44} {rows:>9,} rows  {times}  {more}")


def sizes(least: int, most: int) -> Iterator[int]:
    """Powers of ten."""
    while least <= most:
        yield least
        least *= 10


# Reading: rows of tables and of folders, and images to the model's inputs


def write_rows(folder: Path, rows: int, images: list[bytes]) -> None:
    """Write Parquet files of images with names, some of them damaged."""
    folder.mkdir()
    for start in range(0, rows, 20_000):
        table = [
            {"image": {"bytes": b"damaged" if i % 9973 == 0 else images[i % len(images)], "path": None},
             "name": f"row-{i:07}"}
            for i in range(start, min(start + 20_000, rows))
        ]  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{start:08}.parquet", row_group_size=2000)


def drawn(count: int, pixels: int, form: str) -> list[bytes]:
    random, kinds, found = np.random.RandomState(SEED), scenes.all_scenes(), []
    for i in range(count):
        image, file = kinds[i % len(kinds)].render(random, pixels), io.BytesIO()
        noisy = np.asarray(image, np.int16) + random.randint(-12, 13, (pixels, pixels, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, form, quality=90)
        found.append(file.getvalue())
    return found


def split(place: Path) -> int:
    """The rows of a data set, read as shards."""
    stream = load_rows(str(place), split="train", streaming=True)
    return sum(len(part) for _, part in missing_shards(stream, SHARD, ()))


def reading(most: int) -> None:
    small, large = drawn(480, 32, "PNG"), drawn(64, 400, "JPEG")
    with TemporaryDirectory() as folder:
        for rows in sizes(10_000, min(most, 100_000)):
            tables, depth = Path(folder) / f"tables-{rows}", Path(folder) / f"files-{rows}" / "depth"
            write_rows(tables, rows, small)
            depth.mkdir(parents=True)
            for i in range(rows):
                (depth / f"{i:07}.png").touch()
            for what, place in (("Parquet", tables), ("a folder of files", depth.parent)):
                cpu, wall, read = timed(split, place)
                assert read == rows
                show(f"a stream of {what} to shards", rows, cpu, wall)
        images = [large[i % len(large)] for i in range(512)]
        shard = [(i, {"image": {"bytes": image, "path": None}}) for i, image in enumerate(images)]
        cpu, wall, _ = timed(lambda: unpacked(packed((0, shard))))
        show(f"to an actor, {len(large[0]) // 1000} kB each", len(shard), cpu, wall)
        model = Path(folder) / "model"
        hfvlm.convert(files("hfvlm.samples") / "clip-tiny" / "clip-tiny.pt", "clip/tiny", model)
        processor = Embedder.from_pretrained(model, device="cpu").processor.image_processor
        processor.size, processor.crop_size = {"shortest_edge": 224}, {"height": 224, "width": 224}
        cpu, wall, _ = timed(lambda: [processor(images[i : i + 64], return_tensors="pt") for i in range(0, 512, 64)])
        show("JPEG of 400 x 400 to 224 x 224 inputs", len(shard), cpu, wall)


# Writing: shards of vectors


def table_of(number: int, rows: int) -> Any:
    """Rows of a shard of random vectors."""
    first = number * SHARD
    count = min(SHARD, rows - first)
    numbers = np.arange(first, first + count)
    vectors = pyarrow.array(unit(np.random.RandomState(number).randn(count, SIZE)).ravel())
    names = [f"images/{i:09}.jpg" for i in numbers]
    columns = [
        pyarrow.array(numbers), pyarrow.array(names), pyarrow.array(names), pyarrow.nulls(count, pyarrow.string()),
        pyarrow.FixedSizeListArray.from_arrays(vectors, type=vector_type(SIZE)),
    ]  # fmt: skip
    return pyarrow.Table.from_arrays(columns, schema=schema_of({"image": SIZE}))


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def filled(kind: str, folder: Path, rows: int) -> tuple[Any, float, float]:
    """A store of random vectors, with the seconds of its writes."""
    store, cpu, wall = open_store(folder, Destination(kind).settings(folder)), 0.0, 0.0
    folder.mkdir()
    for number in range(-(-rows // SHARD)):
        table = table_of(number, rows)
        more, longer, _ = timed(store.write, number, table)
        cpu, wall = cpu + more, wall + longer
    more, longer, _ = timed(store.finish)
    return store, cpu + more, wall + longer


def weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def writing(most: int) -> None:
    for kind in ("parquet", "lancedb", "qdrant"):
        for rows in sizes(1_000, min(most, LOCAL if kind == "qdrant" else most)):
            with TemporaryDirectory() as parent:
                folder = Path(parent) / "out"
                store, cpu, wall = filled(kind, folder, rows)
                store.close()
                show(f"{kind}, written", rows, cpu, wall, f"{weight(folder) / rows:.0f} bytes/row")


# Searching


def searching(most: int) -> None:
    queries = unit(np.random.RandomState(77).randn(5, SIZE))
    for rows in sizes(10_000, most):
        parts = [unit(np.random.RandomState(i).randn(10_000, SIZE)) for i in range(rows // 10_000)]
        indexes(np.concatenate(parts), queries)
        del parts
        for kind in ("parquet", "lancedb"):
            with TemporaryDirectory() as parent:
                store, *_ = filled(kind, Path(parent) / "out", rows)
                cpu, wall, _ = timed(answers, partial(nearest_rows, store, "image"), queries[:2])
                show(f"{kind}, every vector, a query", rows, cpu / 2, wall / 2)


def answers(search: Callable[..., Any], queries: np.ndarray) -> list[Any]:
    return [search(query, 10) for query in queries]


def indexes(vectors: np.ndarray, queries: np.ndarray) -> None:
    """Indexes in memory: exact, and by FAISS in as many lists as the root of the number of rows."""
    rows, lists = len(vectors), int(len(vectors) ** 0.5)
    cpu, wall, index = timed(Index, vectors)
    show("Index, made", rows, cpu, wall)
    cpu, wall, exact = timed(answers, index.search, queries)
    show("Index, a query", rows, cpu / len(queries), wall / len(queries))
    del index
    cpu, wall, index = timed(FaissIndex, vectors, factory=f"IVF{lists},Flat")
    show(f"FAISS IVF{lists},Flat, made", rows, cpu, wall)
    for probes in (lists // 32, lists // 4):
        index.index.nprobe = probes
        cpu, wall, found = timed(answers, index.search, queries)
        share = np.mean([len({i for i, _ in a} & {i for i, _ in b}) / 10 for a, b in zip(exact, found, strict=True)])
        show(f"FAISS, {probes} of {lists} lists, a query", rows, cpu / 5, wall / 5, f"recall@10 {share:.2f}")


# A cluster, of which an actor is killed


def kill_one(output: Path, killed: list[int], after: int) -> None:
    while len(list(output.glob("vectors-*.parquet"))) < after:
        time.sleep(0.02)
    found = [
        process for process in psutil.Process().children(recursive=True)
        if "MapBatches(Actor)" in " ".join(process.cmdline())
    ]  # fmt: skip
    found[0].kill()
    killed.append(len(list(output.glob("vectors-*.parquet"))))


def cluster(most: int) -> None:
    rows = min(most, 100_000)
    with TemporaryDirectory() as parent:
        source, model = Path(parent) / "rows", Path(parent) / "model"
        write_rows(source, rows, drawn(960, 32, "PNG"))
        hfvlm.convert(files("hfvlm.samples") / "clip-tiny" / "clip-tiny.pt", "clip/tiny", model)
        options = {"id_column": "name", "columns": {"image": "image"}, "shard_rows": 2048, "device": "cpu"}
        cpu, wall, plain = timed(embed, source, Path(parent) / "plain", model, **options)
        show("one process", rows, cpu, wall, f"{rows / wall:.0f} rows/s")
        killed: list[int] = []
        output = Path(parent) / "ray"
        thread = threading.Thread(target=kill_one, args=(output, killed, 10))
        thread.start()
        cpu, wall, _ = timed(embed, source, output, model, cluster=Cluster(2), **options)
        thread.join()
        show("two actors, one killed", rows, cpu, wall, f"{rows / wall:.0f} rows/s, killed after {killed[0]} shards")
        names, equal = [], True
        for path in sorted(plain.glob("*.parquet")):
            expected, found = parquet.read_table(path), parquet.read_table(output / path.name)
            equal = equal and found.equals(expected)
            names += found["id"].to_pylist()
        good, errors = count_rows(output)
        twice = len(names) - len(set(names))
        print_text(f"{good:,} rows, {errors} errors, {len(set(names)):,} names, {twice} twice; files equal: {equal}")
        assert equal
        assert len(set(names)) == len(names) == good + errors == rows


WORKLOADS = {"reading": reading, "writing": writing, "searching": searching, "cluster": cluster}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--most", type=int, default=100_000, help="rows of the largest")
    arguments = parser.parse_args()
    WORKLOADS[arguments.workload](arguments.most)
