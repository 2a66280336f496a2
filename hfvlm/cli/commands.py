"""`hfvlm list|info|convert|export|verify|chat|card|push|embed|search|capfilt|eval|train|demo`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table

import hfvlm
from hfvlm.cli.console import stderr, stdout
from hfvlm.presets import Preset, list_presets, load_preset
from hfvlm.registry import architectures

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(help="A folder that convert or save_pretrained wrote.", exists=True)]
Output = Annotated[Path, typer.Option("--output", "-o", help="The new folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Vision-language models as transformers-native models."""
    if show:
        stdout.print(hfvlm.__version__)
        raise typer.Exit


@app.command("list")
def list_command(
    architecture: Annotated[str | None, typer.Argument(help="Show one architecture's alone.")] = None,
) -> None:
    """Show the released checkpoints that can be converted."""
    if architecture not in (None, *architectures()):
        raise ValueError(f"No architecture is called {architecture!r}; there are {', '.join(architectures())}.")
    table = Table("preset", "parameters", "pixels", "licence", box=None, pad_edge=False)
    for name in list_presets(architecture):
        preset = load_preset(name)
        table.add_row(name, millions(preset), pixels(preset), str(preset.licence.get("name", preset.licence["id"])))
    stdout.print(table)


@app.command()
def info(preset: Annotated[str, typer.Argument(help="A preset's name, as `hfvlm list` shows it.")]) -> None:
    """Show one checkpoint: sizes, source, licence and configuration."""
    known = load_preset(preset)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("preset", known.name),
        ("architecture", known.architecture),
        ("parameters", millions(known)),
        ("pixels", pixels(known)),
        ("files", " or ".join(known.source.get("files", ("none: sizes only",)))),
        ("source", known.source.get("url", "")),
        ("sha256", known.source.get("sha256", "not published")),
        ("parts", "; ".join(f"--part {part}=PATH: {what}" for part, what in known.source.get("parts", {}).items())),
        ("vocabulary", known.source.get("vocabulary", {}).get("url", "")),
        ("licence", licence_text(known)),
        ("notes", known.notes),
        ("configuration", json.dumps(known.config)),
        ("processor", json.dumps(known.processor)),
    ):
        table.add_row(name, str(value))
    stdout.print(table)


@app.command()
def convert(  # noqa: PLR0913 (options)
    source: Annotated[Path, typer.Argument(help="The released file, or the folder that holds it.")],
    preset: Annotated[str, typer.Option(help="A preset's name; or an architecture's, for other checkpoints of it.")],
    output: Output,
    base: Annotated[
        Path | None, typer.Option(help="The language model that an adapter, a projector or a difference belongs to.")
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="A difference to the base, where a release builds on it.")] = None,
    vision: Annotated[Path | None, typer.Option(help="The vision tower, where the release leaves it out.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Any other part, as `info` names it; may be repeated."),
    ] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="The tokenizer's original file; 'none' leaves the tokenizer out.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as released.")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Write weights that are NaN or infinite, too.")
    ] = False,
    check: Annotated[bool, typer.Option("--verify", help="Run `hfvlm verify` on the result.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert an authors' checkpoint to a transformers folder."""
    known = Preset(name=preset, architecture=preset) if preset in architectures() else load_preset(preset)
    stderr.print(Panel(licence_text(known), title=f"Licence of {known.name}", title_align="left", expand=False))
    with stderr.status(f"converting {source}"):
        given = {"base": base, "delta": delta, "vision": vision}
        parts = {name: str(path) for name, path in given.items() if path} | named_paths(part or ())
        options: dict[str, Any] = {"dtype": dtype, "allow_nonfinite": allow_nonfinite, "overwrite": overwrite}
        hfvlm.convert(source, preset, output, parts=parts, vocabulary=vocabulary, **options)
    record = json.loads((output / "conversion.json").read_text())
    say(f"{output}: all {record['keys']['read']} tensors of {record['source']['name']} accounted for")
    if check:
        verify(output)


def named_paths(options: Iterable[str]) -> dict[str, str]:
    """Of options like "audio=LanguageBind_Audio_FT"."""
    pairs = [option.partition("=") for option in options]
    if wrong := [name for name, _, path in pairs if not path]:
        raise ValueError(f"--part takes NAME=PATH, not {', '.join(wrong)}.")
    return {name: path for name, _, path in pairs}


@app.command()
def export(
    folder: Folder,
    output: Output,
    to: Annotated[str, typer.Option(help="Whose classes shall load it: transformers.")] = "transformers",
    overwrite: Overwrite = False,
) -> None:
    """Write a folder that transformers' own classes load."""
    say(f"{hfvlm.export(folder, output, to=to, overwrite=overwrite)}: for {to}' own classes")


@app.command()
def verify(folder: Folder) -> None:
    """Check that a folder is whole and consistent."""
    table = Table("check", "", "", box=None, pad_edge=False)
    with stderr.status(f"verifying {folder}"):
        checks = hfvlm.verify(folder)
    for check in checks:
        table.add_row(check.name, "[green]yes[/green]" if check.passed else "[red]NO[/red]", check.detail)
    stdout.print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
def chat(
    folder: Folder,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A film, for models of films; may be repeated.")] = None,
    ask: Annotated[str | None, typer.Option(help="Answer this alone; without it, talk.")] = None,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Above 0, answers are drawn.")] = 0.0,
) -> None:
    """Talk with a model about pictures or films. `/image PATH` and `/video PATH` show another one, `/reset` begins
    anew, Ctrl-D ends."""
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    with stderr.status(f"loading {folder}"):
        talk = hfvlm.Chat.from_pretrained(folder, system=system, dtype="auto")
    given = {"/image": list(image or ()), "/video": list(video or ())}
    shown = {command: list(paths) for command, paths in given.items()}
    for line in [ask] if ask is not None else iter(ask_user, None):
        command, _, rest = line.partition(" ")
        if command in shown:
            shown[command].append(Path(rest.strip()))
        elif command == "/reset":
            talk.reset()
            shown = {command: list(paths) for command, paths in given.items()}
        else:
            for piece in talk.stream(line, *shown.values(), max_new_tokens=max_new_tokens, **drawn):
                stdout.print(piece, end="", soft_wrap=True, highlight=False, markup=False)
            stdout.print()
            shown = {command: [] for command in given}


def ask_user() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


@app.command()
def card(folder: Folder) -> None:
    """Write the folder's model card (README.md) anew."""
    from hfvlm.hub import write_card

    say(str(write_card(folder)))


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    licence_read: Annotated[
        bool, typer.Option("--i-have-read-the-licence", help="For non-commercial, special and unknown licences.")
    ] = False,
    stub: Annotated[bool, typer.Option(help="Add the auto_map stub for trust_remote_code=True.")] = False,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
) -> None:
    """Upload a folder with its card to the Hub."""
    say(hfvlm.push(folder, repository, accept_licence=licence_read, stub=stub, private=private))


@app.command()
def embed(  # noqa: PLR0913 (an option each)
    source: Annotated[str, typer.Argument(help="A folder of media, webdataset tars, Parquet, or a Hub id.")],
    output: Output,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's folder or Hub id.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    column: Annotated[list[str] | None, typer.Option(help="modality=column, as image=photo.")] = None,
    id_column: Annotated[str | None, typer.Option(help="What rows are called.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that the model takes at a time.")] = 64,
    shard_rows: Annotated[int, typer.Option(help="Rows of a Parquet file.")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
) -> None:
    """Embed a data set to Parquet shards; a run that was killed goes on where it was."""
    from hfvlm.inference.embed import embed as run

    columns = dict(pair.split("=", 1) for pair in checked_pairs(column)) or None
    folder = run(
        source, output, model, split=split, columns=columns, id_column=id_column, batch_size=batch_size,
        shard_rows=shard_rows, device=device, dtype=dtype,
    )  # fmt: skip
    say(str(folder))


@app.command()
def capfilt(
    source: Annotated[str, typer.Argument(help="A folder of pictures, webdataset tars, Parquet, or a Hub id.")],
    output: Output,
    captioner: Annotated[str, typer.Option(help="The folder of a model that writes captions.")],
    judge: Annotated[str, typer.Option(help="The folder of a model that says whether texts match pictures.")],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    column: Annotated[list[str] | None, typer.Option(help="modality=column, as image=photo.")] = None,
    threshold: Annotated[float, typer.Option(help="Probability of a match from which on a text is kept.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the sampling of captions.")] = 0,
) -> None:
    """Write captions of pictures, and keep those, written or given, that match (BLIP's bootstrapping)."""
    from hfvlm.inference.capfilt import capfilt as run

    columns = dict(pair.split("=", 1) for pair in checked_pairs(column)) or None
    say(str(run(source, output, captioner, judge, split=split, columns=columns, threshold=threshold, seed=seed)))


@app.command()
def search(  # noqa: PLR0913 (an option each)
    index: Annotated[Path, typer.Argument(help="A folder that `hfvlm embed` wrote.", exists=True)],
    text: Annotated[list[str] | None, typer.Option(help="A query; `words::0.5` weighs it.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="A picture to search with.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="A sound to search with.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="A film to search with.")] = None,
    among: Annotated[str, typer.Option(help="The modality that is searched.")] = "image",
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write the hits to a page.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write the hits to one picture.")] = None,
) -> None:
    """Search what was embedded; several queries are added up."""
    from hfvlm.inference.embed import read_settings, read_vectors
    from hfvlm.inference.embedder import Embedder
    from hfvlm.inference.pages import draw_grid, write_page
    from hfvlm.inference.search import query_vector

    given = {"text": text or [], "image": image or [], "audio": audio or [], "video": video or []}
    used = [modality for modality, queries in given.items() if queries]
    embedder = Embedder.from_pretrained(read_settings(index)["model"], used or None)
    vectors, paths = read_vectors(index, among)
    hits = vectors.search(query_vector(embedder, given), k)
    for name, score in hits:
        say(f"{score:.4f}  {name}")
    if html is not None:
        write_page(hits, paths, " + ".join(query for queries in given.values() for query in queries), html)
    if grid is not None:
        draw_grid(hits, paths, grid)


@app.command("eval")
def evaluate(  # noqa: PLR0913 (an option each)
    folder: Folder,
    task: Annotated[str, typer.Option(help="zero-shot, retrieval, linear-probe, few-shot, caption or vqa.")],
    data: Annotated[str, typer.Option(help="A folder of pictures, tars, Parquet, or a Hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A folder for report.json and .html.")] = None,
    split: Annotated[str, typer.Option(help="The rows that are judged.")] = "test",
    train_split: Annotated[str, typer.Option(help="The rows that probes learn from.")] = "train",
    column: Annotated[list[str] | None, typer.Option(help="name=column, as image=photo, label=species.")] = None,
    templates: Annotated[str | None, typer.Option(help="single, imagenet-7, imagenet, name, or 'a {}'.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="The classes' names, in order, for zero-shot.")] = None,
    limit: Annotated[int | None, typer.Option(help="No more rows than these.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the numbers into the model's card.")] = False,
) -> None:
    """Measure what a model can do; every number with its protocol."""
    from hfvlm.evaluation.tasks import Data
    from hfvlm.evaluation.tasks import evaluate as run
    from hfvlm.hub import write_card
    from hfvlm.writing import new_folder

    columns = dict(pair.split("=", 1) for pair in checked_pairs(column)) or None
    options = {name: value for name, value in (("templates", templates), ("labels", label)) if value}
    if options and task != "zero-shot":
        raise ValueError(f"--{next(iter(options))} goes with zero-shot alone.")
    report = run(task, folder, Data(data, split, train_split, columns, limit), device=device, **options)
    for result in report.results:
        say(str(result))
    if output is not None:
        with new_folder(output, overwrite=True) as target:
            report.write(target)
        say(str(output))
    if card:
        write_card(folder, results=report.for_card())


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as those in examples/recipes.", exists=True)],
    changes: Annotated[list[str] | None, typer.Argument(help="field=value, in place of the file's.")] = None,
) -> None:
    """Train as a recipe says."""
    from hfvlm.training.recipes import run_recipe

    for name, value in run_recipe(recipe, changes or []).items():
        say(f"{name}: {value}")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write, replaced if it is there.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of the fine-tuning.")] = 0,
) -> None:
    """Convert, classify, fine-tune and save a small CLIP on real handwriting, in under three minutes."""
    from hfvlm.cli.demo import demo as run

    run(output, seed)


def checked_pairs(pairs: list[str] | None) -> list[str]:
    """Options written as name=value."""
    if wrong := [pair for pair in pairs or [] if "=" not in pair]:
        raise ValueError(f"{wrong[0]!r}: write modality=column.")
    return pairs or []


def say(text: str) -> None:
    """A line that may be copied: paths are not broken or coloured."""
    stdout.print(text, soft_wrap=True, highlight=False)


def millions(preset: Preset) -> str:
    return f"{preset.parameters / 1e6:,.1f} M" if preset.parameters else "?"


def pixels(preset: Preset) -> str:
    config = preset.make_config()
    towers = (getattr(config, name) for name in config.sub_configs)
    size = next((tower.image_size for tower in towers if hasattr(tower, "image_size")), "any")
    return str(size) if isinstance(size, int | str) else " x ".join(map(str, size))


def licence_text(preset: Preset) -> str:
    licence = preset.licence
    parts = (str(licence.get("name", licence["id"])), licence.get("link", ""), licence.get("note", ""))
    return "\n".join(part for part in parts if part)
