"""Training on several machines as docs/training.md launches it; here two "machines" of two processes each, on gloo."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

import hfvlm
from hfvlm.samples import scenes
from tests.support.paths import EXAMPLES, ROOT

pytestmark = pytest.mark.integration
STEPS, ROWS, SECONDS = 3, 24, 400
OPTIONS = {
    "--max_steps": STEPS, "--optim": "sgd", "--learning_rate": 0.1, "--logging_steps": 1, "--save_steps": 2,
    "--lr_scheduler_type": "constant", "--max_grad_norm": 0, "--report_to": "none", "--seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "train"
    folder.mkdir()
    random, kinds = np.random.RandomState(0), scenes.all_scenes()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i in range(4 * ROWS):
            kinds[i % len(kinds)].render(random).save(folder / f"{i:03}.png")
            row = {"file_name": f"{i:03}.png", "text": kinds[i % len(kinds)].caption()}
            metadata.write(json.dumps(row) + "\n")
    return folder.parent


@pytest.fixture(scope="module")
def begun(clip_folder, tmp_path_factory):
    """A model that learned nothing yet: a trained one's temperature magnifies the rounding of its small loss."""
    folder = tmp_path_factory.mktemp("begun")
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(clip_folder)).save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def script(model, dataset, output, rows, *more):
    """The command of the documented script, that compares `rows` on each process."""
    options = OPTIONS | {
        "--model": model, "--dataset": dataset, "--output_dir": output, "--per_device_train_batch_size": rows,
    }  # fmt: skip
    return [EXAMPLES / "train_contrastive.py", *(part for pair in options.items() for part in pair), *more]


def finished(*commands):
    """Run commands at the same time until all have ended well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command in commands
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.terminate()  # a launcher ends its processes
            process.wait(60)
    assert [process.returncode for process in running] == [0] * len(commands), "\n".join(outputs)[-6000:]


def losses(output):
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def alone(begun, dataset, tmp_path_factory):
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone")
    finished(script(begun, dataset, output, ROWS, "--use_cpu"))
    return output


def same(output, alone):
    """The losses and the final weights are those of one process."""
    assert len(losses(alone)) == STEPS
    assert len(set(losses(alone))) == STEPS
    assert losses(output) == pytest.approx(losses(alone), rel=1e-5)
    expected, found = (load_file(each / "model.safetensors") for each in (alone, output))
    assert set(found) == set(expected)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def launch(configuration, machines, processes, *more):
    """`accelerate launch` with one of the documented configurations."""
    return [
        "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / f"{configuration}.yaml",
        "--num_machines", machines, "--num_processes", processes, "--main_process_ip", "127.0.0.1",
        "--mixed_precision", "no", *more,
    ]  # fmt: skip


def test_two_machines_are_as_one_process(begun, dataset, alone, tmp_path):
    port, run = free_port(), script(begun, dataset, tmp_path, ROWS // 4, "--use_cpu", "--ddp_backend", "gloo")
    finished(*([*launch("ddp", 2, 4, "--machine_rank", rank, "--main_process_port", port), *run] for rank in range(2)))
    same(tmp_path, alone)


def test_sharded_parameters_are_as_one_process(begun, dataset, alone, tmp_path):
    """FSDP2, with gradients cached; then on from its sharded checkpoint, to the same weights."""

    def run(*further):
        sharded = launch("fsdp2", 1, 2, "--main_process_port", free_port(), "-m", "tests.support.sharded_on_cpus")
        command = script(begun, dataset, tmp_path, ROWS // 2, "--mini_batch_size", 4, *further)
        finished([*sharded, *command])
        return load_file(tmp_path / "model.safetensors")

    before = run()
    same(tmp_path, alone)
    assert len(list((tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    (tmp_path / "model.safetensors").unlink()
    after = run("--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hfvlm.Embedder.from_pretrained(tmp_path).encode(text="a red circle").shape == (64,)
