"""`hfvlm data filter|dedupe|balance|nouns|instruct|capfilt`: procedures that make training data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import logs_to_stderr, note, print_json, print_text
from hfvlm.cli.options import (
    BatchSize,
    Columns,
    Device,
    Json,
    Output,
    Quiet,
    checked_device,
    chosen,
    finite_number,
    pairs,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make training data, with reports.")

Data = Annotated[
    str, typer.Argument(help="A folder of media, JSON lines, CSV, Parquet or tars, one such file, or a Hub id.")
]
Split = Annotated[str, typer.Option(help="Of the data set.")]
Id = Annotated[str | None, typer.Option("--id-column", help="The column that names the rows.")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn.")]
ShardRows = Annotated[int, typer.Option(min=1, help="Rows that are read at a time, and of a Parquet file.")]
Tests = Annotated[
    list[str] | None,
    typer.Option("--test", metavar="NAME=FOLDER", help="A test set, or FOLDER::SPLIT; may be repeated."),
]


def opened_source(location: str, output: Path, split: str, column: list[str] | None, id_column: str | None) -> Any:
    """Open the data set that a command reads."""
    from hfvlm.data.reading import open_source
    from hfvlm.inference.shards import earlier_data

    return open_source(location, split, pairs(column, "--column") or None, id_column, earlier_data(output))


def shown(report: Any, output: Path, *, as_json: bool) -> None:
    """Print a report."""
    if as_json:
        print_json(report.as_json())
    else:
        print_text(report.tables())
    note(output)


@app.command("filter")
def filter_command(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    split: Split = "train",
    column: Columns = None,
    id_column: Id = None,
    test: Tests = None,
    min_edge: Annotated[int, typer.Option(min=0, help="The shorter edge must have more pixels.")] = 200,
    max_aspect: Annotated[
        float, typer.Option(callback=finite_number, help="The longer edge divided by the shorter must be less.")
    ] = 3.0,
    max_texts: Annotated[int, typer.Option(min=1, help="Different texts that one image may have.")] = 1000,
    max_images: Annotated[int, typer.Option(min=1, help="Different images that one text may have.")] = 10,
    vocabulary: Annotated[
        int, typer.Option(min=1, help="Words and pairs of words, the most frequent, that are not rare.")
    ] = 100_000_000,
    min_count: Annotated[
        int, typer.Option(min=0, help="Times that a word must occur, for small data sets; 1 for no such rule.")
    ] = 1,
    min_words: Annotated[int, typer.Option(min=0, help="Words that a text must have.")] = 3,
    max_words: Annotated[int, typer.Option(min=1, help="Words that a text may have.")] = 20,
    shard_rows: ShardRows = 4096,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Filter images with texts by ALIGN's rules."""
    from hfvlm.data.filtering import Thresholds, filter_pairs

    thresholds = Thresholds(
        min_edge=min_edge, max_aspect=max_aspect, max_texts=max_texts, max_images=max_images, vocabulary=vocabulary,
        min_count=min_count, min_words=min_words, max_words=max_words,
    )  # fmt: skip
    opened = opened_source(source, output, split, column, id_column)
    tests = pairs(test, "--test", "NAME=FOLDER")
    report = filter_pairs(opened, output, thresholds, tests=tests, shard_rows=shard_rows)
    shown(report, output, as_json=as_json)


@app.command()
def dedupe(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    split: Split = "train",
    column: Columns = None,
    id_column: Id = None,
    test: Tests = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=REPORT", help="What `hfvlm eval -o` wrote on a test set; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Compare by the vectors of this model.")] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, callback=finite_number, help="With --model: least cosine of duplicates.")
    ] = 0.95,
    distance: Annotated[int, typer.Option(min=0, max=16, help="Without: bits of 64 that may differ.")] = 4,
    colour: Annotated[
        float, typer.Option(min=0, max=255, callback=finite_number, help="Without: how much colours may differ.")
    ] = 8.0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    shard_rows: ShardRows = 4096,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Drop near duplicates of images, within a data set and of test sets, and report the overlap."""
    from hfvlm.data.dedupe import dedupe as run
    from hfvlm.data.near import Embedded, Likeness, Perceptual

    likeness: Likeness = Perceptual(distance, colour)
    if model is not None:
        from hfvlm.inference.embedder import Embedder

        embedder = Embedder.from_pretrained(model, ["image"], device=checked_device(device))
        likeness = Embedded(embedder, threshold, batch_size)
    report = run(
        opened_source(source, output, split, column, id_column), output, likeness, shard_rows=shard_rows,
        tests=pairs(test, "--test", "NAME=FOLDER"), evaluations=pairs(evaluation, "--evaluation", "NAME=REPORT"),
    )  # fmt: skip
    shown(report, output, as_json=as_json)


@app.command()
def balance(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    split: Split = "train",
    column: Columns = None,
    id_column: Id = None,
    method: Annotated[
        str, typer.Option(help="clip: at most N pairs of a query; metaclip: each with the probability N / count.")
    ] = "metaclip",
    most: Annotated[int | None, typer.Option("--most", "-n", min=1, help="N; by default 20,000.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="A file with a query on each line.", exists=True, dir_okay=False)
    ] = None,
    min_count: Annotated[
        int, typer.Option(min=1, help="Without --queries: times that a word occurs that is one.")
    ] = 100,
    information: Annotated[
        float | None,
        typer.Option(callback=finite_number, help="Without --queries: pairs of words of as many bits are, too."),
    ] = None,
    seed: Seed = 0,
    shard_rows: ShardRows = 4096,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Balance images with texts by queries, as CLIP's data and MetaCLIP's."""
    from hfvlm.data.balance import METHODS
    from hfvlm.data.balance import balance as run
    from hfvlm.data.queries import FromWords, read_queries

    given = FromWords(min_count, information) if queries is None else read_queries(queries)
    opened = opened_source(source, output, split, column, id_column)
    method = chosen(method, METHODS, "--method")
    report = run(opened, output, method=method, most=most, queries=given, seed=seed, shard_rows=shard_rows)
    shown(report, output, as_json=as_json)


@app.command()
def nouns(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    split: Split = "train",
    column: Columns = None,
    id_column: Id = None,
    least: Annotated[int, typer.Option(min=1, help="Rows of a phrase that is not skipped.")] = 3,
    most: Annotated[int, typer.Option("--most", "-n", min=1, help="Rows that a phrase takes.")] = 100,
    by: Annotated[
        str | None, typer.Option(help="rules, spacy or spacy:MODEL; by default spaCy's where it is installed.")
    ] = None,
    seed: Seed = 0,
    shard_rows: ShardRows = 4096,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose images with texts by noun phrases, as LLaVA's 595K."""
    from hfvlm.data.nouns import nouns as run

    opened = opened_source(source, output, split, column, id_column)
    report = run(opened, output, least=least, most=most, by=by, seed=seed, shard_rows=shard_rows)
    shown(report, output, as_json=as_json)


@app.command()
def instruct(  # noqa: PLR0913 (options)
    source: Data,
    output: Output,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A chat model's folder or Hub id, or an endpoint's name.")
    ],
    split: Split = "train",
    column: Columns = None,
    id_column: Id = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="conversation, description, reasoning, video-summary or video-questions; may be repeated; by default "
            "the first three."
        ),
    ] = None,
    boxes: Annotated[str | None, typer.Option(help="The column of boxes.")] = None,
    frames: Annotated[str | None, typer.Option(help="The column of a video's key frames.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, as https://HOST/v1.")] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="The variable of the environment that holds the server's key.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, callback=finite_number, help="0 for greedy decoding.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most that is written at a time.")] = 512,
    seed: Seed = 0,
    device: Device = "auto",
    shard_rows: ShardRows = 16,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a chat model write questions and answers about images or videos from their captions."""
    from hfvlm.data.endpoint import Endpoint
    from hfvlm.data.instruct import IMAGE_KINDS
    from hfvlm.data.instruct import instruct as run
    from hfvlm.data.writers import ChatModel, Writer

    if endpoint is None and key_variable is not None:
        raise typer.BadParameter("it goes with --endpoint only.", param_hint="--key-variable")
    if endpoint is None:
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        writer: Writer = ChatModel(
            model, device=checked_device(device), generate=sampling | {"max_new_tokens": max_new_tokens}
        )
    else:
        options = {"temperature": temperature, "max_tokens": max_new_tokens}
        writer = Endpoint(endpoint, model, key_variable=key_variable, options=options)
    opened = opened_source(source, output, split, column, id_column)
    report = run(
        opened, output, writer, kinds=kind or IMAGE_KINDS, boxes=boxes, frames=frames, seed=seed, shard_rows=shard_rows
    )
    shown(report, output, as_json=as_json)


def by_recipe(recipe: Path) -> Any:
    """Return a function that trains a model on pairs as a recipe defines it, unless a complete run did."""

    def train(model: Path, rows: Path, output: Path) -> None:
        from hfvlm.training.recipes import run_recipe

        given = {"model": model, "dataset": rows, "output_dir": output}
        run_recipe(recipe, [f"{name}={value}" for name, value in given.items()], overwrite=True)

    return train


@app.command()
def capfilt(  # noqa: PLR0913 (options)
    source: Annotated[str, typer.Argument(help="A folder of media, webdataset tars, Parquet, or a Hub id.")],
    output: Output,
    captioner: Annotated[Path, typer.Option(help="The folder of a model that generates captions.", exists=True)],
    judge: Annotated[Path, typer.Option(help="The folder of a model that matches texts with images.", exists=True)],
    captioner_recipe: Annotated[
        Path | None, typer.Option(help="How the captioner is trained after each round.", exists=True, dir_okay=False)
    ] = None,
    judge_recipe: Annotated[
        Path | None, typer.Option(help="How the filter is trained after each round.", exists=True, dir_okay=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often captions are bootstrapped.")] = 1,
    split: Split = "train",
    column: Columns = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=finite_number, help="Least probability of a match with which a text is kept."
        ),
    ] = 0.5,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bootstrap captions (BLIP), train the captioner and the filter on what is kept, and repeat."""
    from hfvlm.data.bootstrapping import bootstrap

    recipes = {"captioner": captioner_recipe, "judge": judge_recipe}
    trains = {name: by_recipe(path) for name, path in recipes.items() if path is not None}
    with logs_to_stderr():
        opened = opened_source(source, output / "round-1" / "pairs", split, column, None)
        options: dict[str, Any] = {"threshold": threshold, "seed": seed, "batch_size": batch_size}
        reports = bootstrap(opened, output, captioner, judge, trains, rounds=rounds, **options)
    if as_json:
        print_json([report.as_json() for report in reports])
    for number, report in enumerate(reports, start=1):
        if not as_json:
            print_text(f"Round {number}\n\n{report.tables()}")
    note(output)
