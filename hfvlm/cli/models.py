"""`hfvlm chat|draw|train|demo`: commands that run one model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import is_quiet, logs_to_stderr, print_json, print_piece, print_text, status
from hfvlm.cli.options import Columns, Device, Folder, Json, Quiet, checked_device, finite_number, pairs
from hfvlm.cli.outputs import check_place


def chat(  # noqa: PLR0913 (options)
    folder: Folder,
    image: Annotated[list[Path] | None, typer.Option(help="An image; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video, for models of videos; may be repeated.")] = None,
    ask: Annotated[str | None, typer.Option(help="Answer only this; without it, talk.")] = None,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite_number, help="Above 0, answers are drawn.")
    ] = 0.0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk with a model about images or videos.

    `/image PATH` and `/video PATH` show another one, `/reset` begins again, Ctrl-D ends.
    """
    from hfvlm.inference.chat import Chat

    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    with status(f"loading {folder}"):
        talk = Chat.from_pretrained(folder, system=system, device=checked_device(device), dtype="auto")
    given = {"/image": list(image or ()), "/video": list(video or ())}
    shown = {command: list(paths) for command, paths in given.items()}
    for text in [ask] if ask is not None else iter(ask_user, None):
        command, _, rest = text.partition(" ")
        if command in shown:
            shown[command].append(Path(rest.strip()))
        elif command == "/reset":
            talk.reset()
            shown = {command: list(paths) for command, paths in given.items()}
        else:
            for piece in talk.stream(text, *shown.values(), max_new_tokens=max_new_tokens, **drawn):
                print_piece(piece)
            print_text("")
            shown = {command: [] for command in given}


def ask_user() -> str | None:
    """Read what the user types; None for Ctrl-D."""
    try:
        return input("> ")
    except EOFError:
        return None


def draw(  # noqa: PLR0913 (the command's options)
    text: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[
        Path,
        typer.Option("--model", "-m", help="A folder of DALL-E mini.", exists=True, file_okay=False, readable=True),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, as grid.png.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1024, help="Images to draw.")] = 9,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, callback=finite_number, help="How far away from the empty text; by default the model's."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the likeliest codes; 0 for all.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=1e-3, callback=finite_number, help="Above 1, drawings vary more.")
    ] = 1.0,
    judge: Annotated[
        Path | None,
        typer.Option(
            help="A folder of CLIP or another dual encoder, which puts the best first.", exists=True, file_okay=False
        ),
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="With --judge: only the best.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of the draws.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the model draws at a time.")] = 16,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Draw images of a text, and write them as a grid."""
    from hfvlm.inference.text_to_image import ImageGenerator, image_grid
    from hfvlm.media.images import image_format
    from hfvlm.writing import replaced

    if output.is_file() and not overwrite:
        raise typer.BadParameter(f"{output} is there: --overwrite replaces it.", param_hint="--output")
    check_place(output)
    kind = image_format(output)
    if keep is not None and judge is None:
        raise typer.BadParameter("the best are known to a judge alone: give --judge.", param_hint="--keep")
    if keep is not None and keep > count:
        raise typer.BadParameter(f"{keep} of {count} images are no choice: give fewer.", param_hint="--keep")
    with status(f"loading {model}"):
        draws = ImageGenerator.from_pretrained(model, judge=judge, device=checked_device(device), dtype="auto")
    given = {} if guidance is None else {"guidance_scale": guidance}
    with status(f"drawing {count} images"):
        images = draws(text, count, batch_size=batch_size, seed=seed, top_k=top_k, temperature=temperature, **given)
    with replaced(output) as file:
        image_grid(images[:keep]).save(file, kind)
    print_text(str(output))


def train(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML file, as those in examples/recipes.", exists=True, dir_okay=False)
    ],
    changes: Annotated[list[str] | None, typer.Argument(help="field=value, instead of the file's.")] = None,
    column: Columns = None,
    text_column: Annotated[str | None, typer.Option(help="The column of the captions: --column text=COLUMN.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run wrote into output_dir.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from output_dir's newest checkpoint.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train as a recipe defines it."""
    from hfvlm.training.recipes import run_recipe

    if overwrite and resume:
        raise typer.BadParameter("an output is resumed or overwritten, not both.", param_hint="--resume")
    columns = pairs([*(column or ()), *([f"text={text_column}"] if text_column else ())], "--column")
    given = [*(changes or ()), *(f"columns.{name}={value}" for name, value in columns.items())]
    given += ["disable_tqdm=true"] if is_quiet() else []
    with logs_to_stderr():
        metrics: dict[str, Any] = run_recipe(recipe, given, overwrite=overwrite, resume=resume)
    if as_json:
        print_json(metrics)
        return
    for name, value in metrics.items():
        print_text(f"{name}: {value}")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; an earlier demo's is replaced.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the fine-tuning.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Convert, classify, fine-tune and save a small CLIP on real handwriting, in under three minutes."""
    from hfvlm.cli.demo import demo as run

    run(output, seed)
