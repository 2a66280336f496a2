"""Recipes as people write them, and where their runs write."""

import json
import logging

import datasets
import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.columns import training_columns
from hfvlm.training.outputs import run_output
from hfvlm.training.recipe_files import checked, parse_yaml, read_recipe, runs_on_cpu, value_of
from hfvlm.training.recipes import DataArguments, ModelArguments, find_task, run_recipe
from tests.support.paths import EXAMPLES
from tests.support.processes import run_alone

# Those with TRL's arguments are in test_trl.py.
OF_TRL = ("llava-dpo", "llava-rloo")
RECIPES = [path for path in sorted((EXAMPLES / "recipes").glob("*.yaml")) if path.stem not in OF_TRL]
KINDS = (ModelArguments, DataArguments, ContrastiveTrainingArguments)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4), ("1E3", 1000.0), (".5e-3", 5e-4), ("+1.e-2", 0.01), ("-3", -3), ("010", 10), ("1_000", 1000),
        ("no", "no"), ("off", "off"), ("yes", "yes"), ("true", True), ("False", False), ("~", None), ("null", None),
        ("1:30", "1:30"), ("2026-11-30", "2026-11-30"), ("0x10", "0x10"), ("v1.0", "v1.0"), ("1.2.3", "1.2.3"),
        ('"5e-4"', "5e-4"), ("[1e-3, no]", [1e-3, "no"]), ("{vision: 1e-6}", {"vision": 1e-6}), ("e5", "e5"),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "a: [", "!!python/object/apply:os.getcwd []", "[" * 5000, "? [a]\n: b"]
)
def test_what_is_no_recipe(text):
    with pytest.raises(ValueError, match="not YAML"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a #1 [b]/c", "a #1 [b]/c"), ("C: x", "C: x"), ("@home", "@home"), ("'no'", "no"), ("5e-4", 5e-4),
        ("{a: b}", {"a": "b"}), ("", None), ("*", "*"), ("a: b", {"a": "b"}),
    ],
)  # fmt: skip
def test_values_of_changes_need_no_quotes(text, value):
    if text in ("C: x", "a: b"):
        value = {text[0]: text[-1]}
    assert value_of(f"x={text}", text) == value


def test_changes_of_a_list_that_is_not_closed_are_named():
    with pytest.raises(ValueError, match=r"'columns=\{a: b': not YAML"):
        value_of("columns={a: b", "{a: b")


def arguments(**recipe):
    fields = {"model": "m", "dataset": "d", "output_dir": "o"} | recipe
    return HfArgumentParser(KINDS).parse_dict(checked(fields, KINDS))


@pytest.mark.parametrize("off", ["no", "off", "No", "false", False])
@pytest.mark.parametrize("field", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_strategies_can_be_off(field, off):
    assert getattr(arguments(**{field: off})[-1], field) == "no"


@pytest.mark.parametrize(("given", "value"), [("yes", True), ("off", False), ("True", True), (True, True)])
def test_switches(given, value):
    assert arguments(load_best_model_at_end=given, eval_strategy="steps")[-1].load_best_model_at_end is value
    assert arguments(four_bits=given)[0].four_bits is value


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("learning_rate", "5e-4", 5e-4), ("learning_rate", 1, 1), ("per_device_train_batch_size", "16", 16),
        ("max_steps", 1e3, 1000), ("mini_batch_size", None, None), ("frozen_towers", "vision", ["vision"]),
        ("output_dir", 2026, "2026"), ("seed", "7", 7), ("recall_at", 5, [5]), ("subset", "no", "no"),
        ("report_to", "none", []), ("warmup_steps", 0.05, 0.05),
    ],
)  # fmt: skip
def test_fields_have_their_types(field, given, value):
    (found,) = {repr(getattr(part, field)) for part in arguments(**{field: given}) if hasattr(part, field)}
    assert found == repr(value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", "fast", "learning_rate is 'fast'; it must be a number"),
        ("learning_rate", "nan", "learning_rate is 'nan'; it must be a number"),
        ("learning_rate", float("inf"), "must be a number"),
        ("learning_rate", -1e-4, "learning_rate must be a finite number of at least 0, not -0.0001"),
        ("learning_rate", True, "must be a number"),
        ("learning_rate", None, "learning_rate needs a value"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size must be an integer of at least 1"),
        ("per_device_train_batch_size", 2.5, "must be a whole number"),
        ("mini_batch_size", -1, "mini_batch_size must be an integer of at least 1, not -1"),
        ("lora_rank", 0, "lora_rank must be an integer of at least 1, not 0"),
        ("lora_dropout", 1.5, "lora_dropout must be a finite number from 0 to 1, not 1.5"),
        ("crop_scale", 0, "crop_scale must be a finite number above 0 to 1, not 0"),
        ("max_steps", 0, "max_steps must be -1"),
        ("dataloader_num_workers", -1, "dataloader_num_workers must be an integer of at least 0, not -1"),
        ("save_steps", 0, "save_steps must be a finite number above 0, not 0"),
        ("four_bits", "perhaps", "four_bits is 'perhaps'; it must be true or false"),
        ("columns", "caption", "columns is 'caption'; it must be a mapping"),
        ("dataset", ["a"], "dataset: entry 0 needs a path"),
        ("lerning_rate", 1, "there is no field 'lerning_rate'. Did you mean learning_rate"),
        ("eval_strategy", "yes", "yes"),
    ],
)
def test_what_means_nothing_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        arguments(**{field: value})


def test_the_field_s_new_name_is_used_where_there_is_one():
    found = arguments(gradient_checkpointing=True)[-1]
    known = getattr(TrainingArguments, "__dataclass_fields__", {})
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    assert getattr(found, name) is True


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)


def test_auto_is_decided_by_the_device(no_accelerator, monkeypatch):
    found = arguments(bf16="auto", dataloader_num_workers="auto")[-1]
    assert found.bf16 is False
    assert 0 <= found.dataloader_num_workers <= 8
    with pytest.raises(ValueError, match="bf16 is on, and this machine has no accelerator: write bf16=auto"):
        arguments(bf16=True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for supported in (True, False):
        monkeypatch.setattr("hfvlm.training.recipe_files.has_bf16", lambda supported=supported: supported)
        assert checked({"bf16": "auto"}, KINDS)["bf16"] is supported
        assert checked({"bf16": "auto", "use_cpu": "yes"}, KINDS)["bf16"] is False


def test_a_recipe_says_what_holds_on_a_cpu(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: pairs\nper_device_train_batch_size: 1024\non_cpu: {per_device_train_batch_size: 8}\n")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert read_recipe(path) == {"task": "pairs", "per_device_train_batch_size": 1024}
    assert read_recipe(path, ["use_cpu=yes"])["per_device_train_batch_size"] == 8
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert read_recipe(path)["per_device_train_batch_size"] == 8
    assert read_recipe(path, ["per_device_train_batch_size=2"])["per_device_train_batch_size"] == 2
    assert read_recipe(path, ["columns.text=a", "columns.image=b"])["columns"] == {"text": "a", "image": "b"}
    with pytest.raises(ValueError, match="changes are written as field=value"):
        read_recipe(path, ["lr"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_a_cpu_as_shipped(path, no_accelerator):
    recipe = read_recipe(path)
    kinds, _ = find_task(recipe.pop("task"))
    assert runs_on_cpu(recipe)
    training = HfArgumentParser(kinds).parse_dict(checked(recipe, kinds))[-1]
    assert training.device.type == "cpu"
    assert training.bf16 is False
    assert (getattr(training, "mini_batch_size", None) or training.per_device_train_batch_size) <= 64
    assert training.dataloader_num_workers <= 8
    assert training.dataloader_pin_memory is False


IMAGE, TEXT = datasets.Image(decode=False), datasets.Value("string")
SPREAD = {"needed": ("image", "text"), "modalities": ("image", "text"), "source": "data"}


def rows_of(**features):
    return datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))


@pytest.mark.parametrize(
    ("features", "given", "columns"),
    [
        ({"image": IMAGE, "caption": TEXT}, None, {"image": "image", "text": "caption"}),
        ({"image": IMAGE, "description": TEXT, "url": TEXT}, None, {"image": "image", "text": "description"}),
        ({"photo": IMAGE, "words": datasets.List(TEXT)}, None, {"image": "photo", "text": "words"}),
        ({"image": IMAGE, "a": TEXT, "b": TEXT}, {"text": "b"}, {"image": "image", "text": "b"}),
        ({"image": IMAGE, "text": TEXT, "b": TEXT}, {"text": "b"}, {"image": "image", "text": "b"}),
        ({"x": IMAGE, "y": IMAGE, "t": TEXT}, {"image": "y", "text": "t"}, {"image": "y", "text": "t"}),
    ],
)
def test_columns_are_found(features, given, columns):
    assert training_columns(rows_of(**features), given, **SPREAD) == columns


@pytest.mark.parametrize(
    ("features", "given", "message"),
    [
        (
            {"image": IMAGE, "a": TEXT, "b": TEXT},
            None,
            r"2 columns may hold the text; it has image \(image\), a \(text\)",
        ),
        (
            {"image": IMAGE, "label": datasets.ClassLabel(names=["x"])},
            None,
            "no column is known to hold the text.*--column",
        ),
        ({"image": IMAGE, "text": TEXT}, {"text": "caption"}, "has no column 'caption' for text; it has image"),
        ({"image": IMAGE, "text": TEXT}, {"words": "text"}, "'words' is no modality; there are image"),
    ],
)
def test_columns_are_asked_for(features, given, message):
    with pytest.raises(ValueError, match=message):
        training_columns(rows_of(**features), given, **SPREAD)


@pytest.fixture
def run(tmp_path):
    """A folder with a run, and with something that is none of it."""
    folder = tmp_path / "out"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "model.safetensors").write_text("old")
    (folder / "trainer_state.json").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_asks_first(run):
    before = contents(run)
    with (
        pytest.raises(FileExistsError, match=r"has checkpoint-2, of an earlier run: .*--resume.*--overwrite"),
        run_output(run, overwrite=False, resume=False),
    ):
        pass
    with run_output(run, overwrite=False, resume=True):
        assert contents(run) == before
    assert contents(run) == before


def test_a_run_in_place_of_another(run):
    with run_output(run, overwrite=True, resume=False):
        assert {name for name in contents(run) if not name.startswith(".earlier")} == {"notes.txt"}
        (run / "trainer_state.json").write_text("new")
    assert contents(run) == {"notes.txt": "mine", "trainer_state.json": "new"}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_that_fails_costs_nothing(run, checkpoint):
    before = contents(run)

    def fail():
        with run_output(run, overwrite=True, resume=False):
            (run / "config.json").write_text("new")
            if checkpoint:
                (run / "checkpoint-1").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    if checkpoint:
        (aside,) = run.glob(".earlier-*")
        assert contents(aside) == {name: text for name, text in before.items() if name != "notes.txt"}
        assert (run / "config.json").read_text() == "new"
    else:
        assert contents(run) == before


def test_what_no_run_wrote_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="which no run wrote"),
        run_output(tmp_path, overwrite=True, resume=False),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="no checkpoint"), run_output(tmp_path, overwrite=False, resume=True):
        pass
    with pytest.raises(FileExistsError, match="is a file"):
        run_output(tmp_path / "config.json", overwrite=True, resume=False).__enter__()
    assert contents(tmp_path) == {"config.json": "mine"}


def test_other_processes_leave_the_folder_alone(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    before = contents(run)
    with run_output(run, overwrite=True, resume=False):
        assert contents(run) == before


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Images whose captions are in a column that nobody knows."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "train").mkdir(parents=True)
    rows = []
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(folder / "train" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "description": f"red {i}"})
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run_as_users(described, clip_folder, out):
    """A shipped recipe, few images, captions elsewhere, a number with an exponent, a strategy that is `no`; twice."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hfvlm").addHandler(handler)
    (path,) = (path for path in RECIPES if path.stem == "clip-lora")
    changes = [f"model={clip_folder}", f"dataset={described}", f"output_dir={out}", "num_train_epochs=2"]
    changes += ["learning_rate=5e-4", "eval_split=null", "eval_strategy=no", "use_cpu=yes", "disable_tqdm=true"]
    metrics = run_recipe(path, changes)
    assert metrics["epoch"] == 2
    assert any("'description' is taken for text" in message for message in messages)
    assert any("more than the number of rows: it becomes 6" in message for message in messages)
    assert "library_name: peft" in (out / "README.md").read_text()
    assert "Adapters (LORA" in (out / "README.md").read_text()
    assert (out / "processor_config.json").exists()
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_recipe(path, changes)
    run_recipe(path, [*changes, "num_train_epochs=3"], resume=True)
    run_recipe(path, [*changes, "max_steps=1"], overwrite=True)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 1
    with pytest.raises(ValueError, match="is an adapter; another one begins from a whole model"):
        run_recipe(path, [*changes, f"model={out}", f"output_dir={out.parent / 'other'}"])
    with pytest.raises(ValueError, match="eval_split 'test' cannot be read"):
        run_recipe(path, [*changes, "eval_split=test", f"output_dir={out.parent / 'other'}"])


def test_a_run_as_users_have_it(described, clip_folder, tmp_path):
    """In a process of its own: its loader forks it, and one that has run many tests has threads of many libraries."""
    run_alone(run_as_users, described, clip_folder, tmp_path / "out")


def test_the_command_takes_the_column(described, clip_folder, tmp_path):
    from typer.testing import CliRunner

    from hfvlm.cli.commands import app

    recipe = {"task": "contrastive", "per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no"}
    recipe |= {"model": str(clip_folder), "dataset": str(described), "output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"use_cpu": True, "report_to": "none"}))
    command = ["train", str(tmp_path / "recipe.yaml"), "--text-column"]
    result = CliRunner().invoke(app, [*command, "words"])
    assert "no column 'words' for text; it has image (image), description (text)" in str(result.exception)
    result = CliRunner().invoke(app, [*command, "description", "--json"])
    assert json.loads(result.stdout)["train_loss"] > 0
    result = CliRunner().invoke(app, [*command, "description"])
    assert "--overwrite" in str(result.exception)
    result = CliRunner().invoke(app, [*command, "description", "--overwrite", "-q"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*command, "description", "--overwrite", "--resume"])
    assert result.exit_code == 2
