"""`hfvlm embed|capfilt|search|eval`: commands that go through a data set."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import line, note, print_json, print_text, status
from hfvlm.cli.options import (
    BatchSize,
    Columns,
    Device,
    Dtype,
    Folder,
    Json,
    Limit,
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


def embed(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's folder or Hub id.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    column: Columns = None,
    id_column: Annotated[str | None, typer.Option(help="The column that names the rows.")] = None,
    option: Options = None,
    batch_size: BatchSize = 64,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a Parquet file.")] = 4096,
    device: Device = "auto",
    dtype: Dtype = "auto",
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Pack the weights where this machine is faster so; results are equal.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Embed a data set to Parquet shards; a run that was killed continues."""
    from hfvlm.inference.embed import count_rows
    from hfvlm.inference.embed import embed as run

    settings: dict[str, Any] = {"device": checked_device(device), "dtype": checked_dtype(dtype)}
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that hfvlm did not write.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search a folder of embeddings; several queries are added."""
    from hfvlm.cli.outputs import check_image, check_page
    from hfvlm.inference.embed import read_captions, read_embedder, read_settings, read_vectors
    from hfvlm.inference.pages import draw_grid, write_page
    from hfvlm.inference.search import query_vector

    given = {"text": text, "image": image, "audio": audio, "video": video, "depth": depth, "thermal": thermal}
    queries = {modality: list(values) for modality, values in (given | {"imu": imu}).items() if values}
    check_page(html, overwrite=overwrite)
    check_image(grid, overwrite=overwrite)
    known = list(read_settings(index)["columns"])
    among = chosen(among, known, "--among") if among else "image" if "image" in known else known[0]
    vectors, paths = read_vectors(index, among)
    if not len(vectors):
        raise ValueError(f"{index}: no {among} was embedded: its run was stopped, or every row had an error.")
    options = {"device": checked_device(device)} | ({} if dtype == "auto" else {"dtype": checked_dtype(dtype)})
    with status(f"searching {index}"):
        embedder = read_embedder(index, list(queries) or None, **options)
        hits = vectors.search(query_vector(embedder, queries, processor_options(option)), k)
    captions = read_captions(index)
    if as_json:
        print_json([
            {"id": name, "score": score, "path": paths.get(str(name)), "text": captions.get(str(name))}
            for name, score in hits
        ])  # fmt: skip
    else:
        for name, score in hits:
            print_text(f"{score:.4f}  {line(name)}")
    if html is not None:
        title = " + ".join(query for values in queries.values() for query in values)
        write_page(hits, paths, title, html, modality=among, captions=captions, queries=queries)
    if grid is not None:
        draw_grid(hits, paths, grid, modality=among)


def evaluate(  # noqa: PLR0913 (options)
    folder: Folder,
    task: Annotated[
        str,
        typer.Option(
            help="zero-shot, retrieval, linear-probe, few-shot, caption, vqa, grounding, segmentation, depth or "
            "restoration."
        ),
    ],
    data: Annotated[str, typer.Option(help="A folder of media, tars, Parquet, or a Hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A folder for report.json and .html.")] = None,
    split: Annotated[str, typer.Option(help="The rows to evaluate on.")] = "test",
    train_split: Annotated[str, typer.Option(help="The rows that probes learn from.")] = "train",
    column: Columns = None,
    templates: Annotated[
        str | None, typer.Option(help="single, imagenet-7, imagenet, imagenet-zh, name, or 'a {}'.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="The classes' names, in order, for zero-shot.")] = None,
    limit: Limit = None,
    modality: Annotated[str | None, typer.Option(help="Of the media, for zero-shot and probes: image, ...")] = None,
    between: Annotated[str | None, typer.Option(help="For retrieval: audio,text, or any.")] = None,
    against: Annotated[Path | None, typer.Option(help="A folder of another model's report, to compare.")] = None,
    device: Device = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the numbers into the model's card.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that hfvlm did not write.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model; every number with its protocol."""
    from hfvlm.cli.outputs import check_card, report_folder
    from hfvlm.evaluation.tasks import TASKS
    from hfvlm.evaluation.tasks import Data as Rows
    from hfvlm.evaluation.tasks import evaluate as run
    from hfvlm.release.hub import write_card

    chosen(task, TASKS, "--task")
    options = task_options(task, templates=templates, label=label, modality=modality, between=between)
    if card:
        check_card(folder, overwrite=overwrite)
    rows = Rows(data, split, train_split, pairs(column, "--column") or None, limit)
    with report_folder(output, overwrite=overwrite) as target:
        report = run(task, folder, rows, device=checked_device(device), **options)
        if target is not None:
            report.write(target)
    if as_json:
        print_json(report.as_json())
    else:
        print_report(report)
        if against is not None:
            from hfvlm.evaluation.report import compare

            for difference in compare(against, report):
                print_text(f"{against}: {difference}")
    if output is not None:
        note(output)
    if card:
        write_card(folder, results=report.for_card())


# The tasks that an option goes with.
TASK_OPTIONS = {
    "templates": ("zero-shot",),
    "label": ("zero-shot",),
    "modality": ("zero-shot", "linear-probe", "few-shot"),
    "between": ("retrieval",),
}


def task_options(task: str, **given: Any) -> dict[str, Any]:
    """Select the options that a task takes.

    Raises:
        typer.BadParameter: one belongs to other tasks.
    """
    used = {name: value for name, value in given.items() if value}
    for name in used:
        if task not in TASK_OPTIONS[name]:
            known = ", ".join(TASK_OPTIONS[name])
            raise typer.BadParameter(f"it goes with --task {known} only.", param_hint=f"--{name}")
    if "between" in used and used["between"] != "any":
        used["between"] = used["between"].split(",")
    return {"labels" if name == "label" else name: value for name, value in used.items()}


def print_report(report: Any) -> None:
    """Print the numbers, and the rows that were left out."""
    for result in report.results:
        print_text(result)
    if report.errors:
        print_text(
            f"{len(report.errors)} of {report.rows + len(report.errors)} rows could not be read and are left out:"
        )
        for row, error in list(report.errors.items())[:5]:
            print_text(f"  row {row}: {line(error)}")
