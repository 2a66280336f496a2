import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.training.recipes import run_recipe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    script = [sys.executable, str(EXAMPLES / "make_scenes.py"), "--output", str(folder), "--pictures", "2"]
    subprocess.run(script, check=True)
    return folder


@pytest.fixture
def changes(tmp_path, clip_folder, pictures):
    """What a run of a few steps on this machine needs."""
    names = {"model": clip_folder, "dataset": pictures, "output_dir": tmp_path / "out", "use_cpu": True}
    return [f"{name}={value}" for name, value in names.items()] + ["disable_tqdm=True"]


def test_a_small_model_learns_where_things_are(changes, tmp_path):
    """On pairs of shapes that it never saw together: by chance, one picture in a hundred is right."""
    metrics = run_recipe(EXAMPLES / "recipes" / "scenes.yaml", [*changes, "num_train_epochs=10"])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    recalls = [entry["eval_image_to_text_recall@1"] for entry in history if "eval_loss" in entry]
    assert recalls[0] < 0.3 < 0.6 < recalls[-1]
    assert metrics["eval_text_to_image_recall@5"] > 0.8
    assert (tmp_path / "out" / "curve.png").stat().st_size > 5000
    assert (tmp_path / "out" / "processor_config.json").exists()


def test_the_command_and_the_script_are_the_same_run(changes, tmp_path, clip_folder, pictures):
    options = {
        "per_device_train_batch_size": 32,
        "mini_batch_size": 16,
        "max_steps": 2,
        "lora_recipe": "vision+text",
        "save_strategy": "no",
        "report_to": "none",
        "crop_scale": 0.8,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options | {"model": "?", "dataset": "?"}))
    result = CliRunner().invoke(app, ["train", str(recipe), *changes])
    assert result.exit_code == 0, result.output
    script = [sys.executable, str(EXAMPLES / "train_contrastive.py"), "--model", str(clip_folder)]
    script += ["--dataset", str(pictures), "--output_dir", str(tmp_path / "script"), "--use_cpu", "True"]
    subprocess.run(script + [part for k, v in options.items() for part in (f"--{k}", str(v))], check=True)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "script")]
    assert files[0].read_bytes() == files[1].read_bytes()
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert torch.isfinite(torch.tensor(history[-1]["train_loss"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "a recipe is a list of `field: value`"),
        ("a: [", "not YAML"),
        ("model: x\ndataset: y\noutput_dir: z\nlerning_rate: 1", "lerning_rate"),
        ("dataset: y\noutput_dir: z", "model"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(recipe)
    assert "recipe.yaml" in str(error.value)
