"""`hfvlm eval`: a model measured on data, on several data sets, or next to another model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import line, note, print_json, print_table, print_text
from hfvlm.cli.options import (
    Columns,
    Device,
    Dtype,
    Json,
    Limit,
    Options,
    Quiet,
    checked_device,
    checked_dtype,
    chosen,
    pairs,
    processor_options,
)

# The tasks that an option goes with.
TASK_OPTIONS = {
    "templates": ("zero-shot",),
    "label": ("zero-shot",),
    "prompts": ("zero-shot",),
    "modality": ("zero-shot", "linear-probe", "few-shot"),
    "between": ("retrieval", "any-to-any"),
    "positives": ("any-to-any",),
    "judge": ("caption",),
    "question": ("hallucination",),
    "baseline": ("zero-shot",),
    "option": ("zero-shot", "retrieval", "linear-probe", "few-shot", "any-to-any"),
}


def evaluate(  # noqa: PLR0913 (options)
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="The model: a folder that convert, save_pretrained or train wrote.",
            exists=True,
            file_okay=False,
            readable=True,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="zero-shot, retrieval, linear-probe, few-shot, classification, caption, vqa, grounding, any-to-any, "
            "hallucination, clip-score, segmentation, depth or restoration."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DATA",
            help="A folder of media, tars, Parquet, or a Hub id; may be repeated, the original data first.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A folder for report.json and .html.")] = None,
    split: Annotated[str, typer.Option(help="The rows to evaluate on.")] = "test",
    train_split: Annotated[str, typer.Option(help="The rows that probes learn from.")] = "train",
    column: Columns = None,
    templates: Annotated[
        str | None, typer.Option(help="single, imagenet-7, imagenet, imagenet-zh, name, or 'a {}'.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="The classes' names, in order, for zero-shot.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Names and templates of a data set of CLIP's paper, as cifar10 or food101.")
    ] = None,
    limit: Limit = None,
    modality: Annotated[str | None, typer.Option(help="Of the media, for zero-shot and probes: image, ...")] = None,
    between: Annotated[str | None, typer.Option(help="For retrieval and any-to-any: audio,text, or any.")] = None,
    positives: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="For any-to-any: rows of equal value are positives."),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(help="For caption: a CLIP's folder, for CLIPScore.", exists=True, file_okay=False),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="For hallucination: 'Is there a {} in the image?', of objects.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="For zero-shot on several data: a CSV file of other models' accuracies.", dir_okay=False),
    ] = None,
    option: Options = None,
    against: Annotated[Path | None, typer.Option(help="A folder of another model's report, to compare.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Two models, or reports of them, side by side, in place of one model."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the numbers into the model's card.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that hfvlm did not write.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model, or two side by side; every number with its protocol."""
    from hfvlm.cli.outputs import check_card, report_folder
    from hfvlm.release.hub import write_card

    several = len(data or ()) > 1
    if compare is None:
        check_one(folder, several=several, baseline=baseline is not None, against=against is not None)
    else:
        check_two(compare, folder, {"--against": against, "--card": card, "--baseline": baseline}, several=several)
    options = task_options(
        task, templates=templates, label=label, prompts=prompts, modality=modality, between=between,
        positives=positives, judge=judge, question=question, baseline=baseline, option=option,
    )  # fmt: skip
    if card and folder is not None:
        check_card(folder, overwrite=overwrite)
    shared = {"split": split, "train_split": train_split, "columns": pairs(column, "--column") or None, "limit": limit}
    rows = named_data(data or (), shared | {"source_options": options.pop("option", {})})
    options |= {"device": checked_device(device)} | ({} if dtype == "auto" else {"dtype": checked_dtype(dtype)})
    with report_folder(output, overwrite=overwrite) as target:
        found = compared(compare, task, rows, options) if compare else measured(task, folder, rows, options)
        if target is not None:
            found.write(target)
    if as_json:
        print_json(found.as_json())
    else:
        print_found(found, against)
    if output is not None:
        note(output)
    if card and folder is not None:
        write_card(folder, results=found.for_card())


def check_one(folder: Path | None, *, several: bool, baseline: bool, against: bool) -> None:
    """Refuse what does not go with one model.

    Raises:
        typer.BadParameter: there is no model, or an option needs several data sets or only one.
    """
    if folder is None:
        raise typer.BadParameter("name a model's folder, or two with --compare.", param_hint="FOLDER")
    if baseline and not several:
        raise typer.BadParameter("it goes with --data twice or more, the original first.", param_hint="--baseline")
    if against and several:
        raise typer.BadParameter("it goes with one --data.", param_hint="--against")


def check_two(models: tuple[Path, Path], folder: Path | None, alone: Mapping[str, Any], *, several: bool) -> None:
    """Refuse what does not go with two models.

    Raises:
        typer.BadParameter: a model is not there, or there is an option of one model, which are `alone`.
    """
    if folder is not None or several:
        what = "one --data" if several else "no other model: give both to it"
        raise typer.BadParameter(f"it goes with {what}.", param_hint="--compare")
    if given := [name for name, value in alone.items() if value]:
        raise typer.BadParameter("it goes with one model.", param_hint=given[0])
    for path in models:
        if not path.exists():
            raise typer.BadParameter(f"{line(path)}: no such model or report.", param_hint="--compare")


def task_options(task: str | None, **given: Any) -> dict[str, Any]:
    """Select the options that a task takes.

    Raises:
        typer.BadParameter: there is no such task, or an option belongs to other tasks.
    """
    from hfvlm.evaluation.tasks import TASKS

    if task is not None:
        chosen(task, TASKS, "--task")
    used = {name: value for name, value in given.items() if value}
    for name in used:
        if task not in TASK_OPTIONS[name]:
            known = ", ".join(TASK_OPTIONS[name])
            raise typer.BadParameter(f"it goes with --task {known} only.", param_hint=f"--{name}")
    if "between" in used and used["between"] != "any":
        used["between"] = used["between"].split(",")
    if "option" in used:
        used["option"] = processor_options(used["option"])
    return {"labels" if name == "label" else name: value for name, value in used.items()}


def named_data(given: Sequence[str], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to evaluate on, by name: the one before a `=`, or that of the folder.

    Raises:
        typer.BadParameter: two have the same name.
    """
    from hfvlm.evaluation.tasks import Data

    found: dict[str, Any] = {}
    for text in given:
        name, equals, source = text.partition("=")
        name, source = (name, source) if equals and not Path(text).exists() else (Path(text).name, text)
        if name in found:
            raise typer.BadParameter(f"two are called {line(name)}: name them, NAME=DATA.", param_hint="--data")
        found[name] = Data(source, **shared)
    return found


def measured(task: str | None, folder: Any, rows: Mapping[str, Any], options: dict[str, Any]) -> Any:
    """Evaluate a model on one data set or several.

    Raises:
        typer.BadParameter: the task or the data are not given, or an option is unknown to the processor.
    """
    from hfvlm.evaluation.several import evaluate_several
    from hfvlm.evaluation.tasks import evaluate as run

    for name, value in (("--task", task), ("--data", rows)):
        if not value:
            raise typer.BadParameter("it is needed to evaluate a model.", param_hint=name)
    task = str(task)
    try:
        if len(rows) > 1:
            return evaluate_several(task, folder, rows, **options)
        return run(task, folder, next(iter(rows.values())), **options)
    except TypeError as error:  # of a setting that the processor does not know
        if not any(own.source_options for own in rows.values()):
            raise
        raise typer.BadParameter(str(error), param_hint="--option") from error


def compared(models: tuple[Path, Path], task: str | None, rows: Mapping[str, Any], options: dict[str, Any]) -> Any:
    """Put two models side by side; a report that is there is read, a model is evaluated."""
    from hfvlm.evaluation.comparison import is_report, side_by_side

    first, second = (path if is_report(path) else measured(task, path, rows, options) for path in models)
    return side_by_side(first, second)


def print_found(found: Any, against: Path | None) -> None:
    """Print tables, the other results, the rows that were left out, and the differences to another report."""
    from hfvlm.evaluation.comparison import compare
    from hfvlm.evaluation.report import Report

    for table in found.tables:
        print_text(table.title)
        print_table(table.rows, table.heads)
    if isinstance(found, Report):
        print_report(found)
        for difference in compare(against, found) if against is not None else ():
            print_text(f"{against}: {difference}")


def print_report(report: Any) -> None:
    """Print the numbers that are in no table, and the rows that were left out."""
    shown = {metric for table in report.tables for metric in table.metrics}
    for result in report.results:
        if result.metric not in shown:
            print_text(result)
    if report.errors:
        count = report.about.get("of", report.rows + len(report.errors))
        print_text(f"{len(report.errors)} of {count} rows could not be read and are left out:")
        for row, error in list(report.errors.items())[:5]:
            print_text(f"  row {row}: {line(error)}")
