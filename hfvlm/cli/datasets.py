"""`hfvlm embed|capfilt|search`: commands that go through a data set."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import line, note, print_json, print_text, status
from hfvlm.cli.options import (
    BatchSize,
    Columns,
    Device,
    Dtype,
    Json,
    Options,
    Output,
    Quiet,
    checked_device,
    checked_dtype,
    chosen,
    finite_number,
    pairs,
    processor_options,
)

Data = Annotated[str, typer.Argument(help="A folder of media, webdataset tars, Parquet, or a Hub id.")]
Url = Annotated[
    str | None, typer.Option(help="A Qdrant server, as http://localhost:6333; its key is in QDRANT_API_KEY.")
]
ENGINES = ("plain", "ray")


def embed(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's folder or Hub id.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    column: Columns = None,
    id_column: Annotated[str | None, typer.Option(help="The column that names the rows.")] = None,
    option: Options = None,
    batch_size: BatchSize = 64,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard, the unit that is written.")] = 4096,
    engine: Annotated[str, typer.Option(help="plain, or ray: actors of Ray Data, on one machine or many.")] = "plain",
    actors: Annotated[
        int | None, typer.Option(min=1, help="Of --engine ray; by default one for each GPU, or else for each core.")
    ] = None,
    to: Annotated[str, typer.Option(help="Where vectors go: parquet, lancedb or qdrant.")] = "parquet",
    url: Url = None,
    collection: Annotated[
        str | None, typer.Option(help="On that server; by default the output folder's name.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Pack the weights where this machine is faster so; results are equal.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Embed a data set, to Parquet or a database; a run that was killed continues."""
    from hfvlm.inference.cluster import DEVICES, Cluster
    from hfvlm.inference.destinations import KINDS, Destination
    from hfvlm.inference.embed import count_rows
    from hfvlm.inference.embed import embed as run

    cluster = Cluster(actors) if chosen(engine, ENGINES, "--engine") == "ray" else None
    if actors is not None and cluster is None:
        raise typer.BadParameter("it goes with --engine ray only.", param_hint="--actors")
    device = chosen(device, DEVICES, "--device") if cluster else checked_device(device)
    settings: dict[str, Any] = {"device": device, "dtype": checked_dtype(dtype), "cluster": cluster}
    settings["to"] = Destination(chosen(to, KINDS, "--to"), url, collection)
    options = processor_options(option)
    try:
        folder = run(
            source, output, model, split=split, columns=pairs(column, "--column") or None, id_column=id_column,
            batch_size=batch_size, shard_rows=shard_rows, source_options=options, optimize=optimize, **settings,
        )  # fmt: skip
    except TypeError as error:  # of a setting that the processor does not know
        if not options:
            raise
        raise typer.BadParameter(str(error), param_hint="--option") from error
    rows, errors = count_rows(folder)
    note(f"{folder}: {rows} rows embedded" + (f", {errors} errors: see errors-*.parquet" if errors else ""), err=False)
    if not rows:
        raise ValueError(f"{folder}: no row could be embedded; see errors-*.parquet.")


def capfilt(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    captioner: Annotated[str, typer.Option(help="The folder of a model that generates captions.")],
    judge: Annotated[str, typer.Option(help="The folder of the filter, a model that matches texts with images.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    column: Columns = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=finite_number, help="Least probability of a match with which a text is selected."
        ),
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling of captions.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Generate captions of images, and select those, generated or given, that match (BLIP's bootstrapping)."""
    from hfvlm.inference.capfilt import capfilt as run

    columns = pairs(column, "--column") or None
    note(
        run(source, output, captioner, judge, split=split, columns=columns, threshold=threshold, seed=seed), err=False
    )


def search(  # noqa: PLR0913 (options)
    index: Annotated[Path, typer.Argument(help="A folder that `hfvlm embed` wrote.", exists=True, file_okay=False)],
    text: Annotated[list[str] | None, typer.Option(help="A query; `text::0.5` weighs it.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="An image to search with.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="An audio clip to search with.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="A video to search with.")] = None,
    depth: Annotated[list[str] | None, typer.Option(help="A depth map to search with.")] = None,
    thermal: Annotated[list[str] | None, typer.Option(help="A thermal image to search with.")] = None,
    imu: Annotated[list[str] | None, typer.Option(help="An IMU recording to search with.")] = None,
    among: Annotated[
        str | None, typer.Option(help="The modality to search; by default image, or the first one.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write the hits to a page.", dir_okay=False)] = None,
    grid: Annotated[Path | None, typer.Option(help="Write the hits to one image.", dir_okay=False)] = None,
    option: Options = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    url: Url = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that hfvlm did not write.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search a folder of embeddings, wherever its vectors are; several queries are added."""
    from hfvlm.cli.outputs import check_image, check_page
    from hfvlm.inference.embed import nothing, open_vectors, read_embedder, read_settings
    from hfvlm.inference.pages import draw_grid, write_page
    from hfvlm.inference.search import nearest_rows, query_vector

    given = {"text": text, "image": image, "audio": audio, "video": video, "depth": depth, "thermal": thermal}
    queries = {modality: list(values) for modality, values in (given | {"imu": imu}).items() if values}
    check_page(html, overwrite=overwrite)
    check_image(grid, overwrite=overwrite)
    known = list(read_settings(index)["columns"])
    among = chosen(among, known, "--among") if among else "image" if "image" in known else known[0]
    options = {"device": checked_device(device)} | ({} if dtype == "auto" else {"dtype": checked_dtype(dtype)})
    with closing(open_vectors(index, among, url)) as store, status(f"searching {index}"):
        embedder = read_embedder(index, list(queries) or None, **options)
        found = nearest_rows(store, among, query_vector(embedder, queries, processor_options(option)), k)
    if not found:
        raise nothing(index, among)
    if as_json:
        print_json([{"id": hit.id, "score": hit.score, "path": hit.path, "text": hit.caption} for hit in found])
    else:
        for hit in found:
            print_text(f"{hit.score:.4f}  {line(hit.id)}")
    hits = [(hit.id, hit.score) for hit in found]
    paths = {hit.id: hit.path for hit in found if hit.path}
    captions = {hit.id: hit.caption for hit in found if hit.caption}
    if html is not None:
        title = " + ".join(query for values in queries.values() for query in values)
        write_page(hits, paths, title, html, modality=among, captions=captions, queries=queries)
    if grid is not None:
        draw_grid(hits, paths, grid, modality=among)
