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

from hfvlm.samples import scenes
from tests.support.paths import EXAMPLES, ROOT

pytestmark = pytest.mark.integration
STEPS, ROWS = 4, 24
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
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(commands), "\n".join(outputs)[-6000:]


def losses(output):
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def alone(clip_folder, dataset, tmp_path_factory):
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone")
    finished(script(clip_folder, dataset, output, ROWS, "--use_cpu"))
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


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_are_as_one_process(launcher, clip_folder, dataset, alone, tmp_path):
    port = free_port()
    commands = []
    for rank in range(2):
        if launcher == "torchrun":
            launch = ["-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 2,
                      "--master_addr", "127.0.0.1", "--master_port", port]  # fmt: skip
        else:
            launch = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / "ddp.yaml",
                      "--num_processes", 4, "--machine_rank", rank, "--main_process_ip", "127.0.0.1",
                      "--main_process_port", port, "--mixed_precision", "no"]  # fmt: skip
        run = script(clip_folder, dataset, tmp_path, ROWS // 4, "--use_cpu", "--ddp_backend", "gloo")
        commands.append([*launch, *run])
    finished(*commands)
    same(tmp_path, alone)


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_sharded_parameters_are_as_one_process(mini_batch_size, clip_folder, dataset, alone, tmp_path):
    """FSDP2 by accelerate's configuration; then on from its sharded checkpoint."""
    more = ["--mini_batch_size", mini_batch_size] if mini_batch_size else []

    def launched(*further):
        finished([
            "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / "fsdp2.yaml",
            "--num_machines", 1, "--num_processes", 4, "--main_process_ip", "127.0.0.1", "--main_process_port",
            free_port(), "--mixed_precision", "no", "-m", "tests.support.sharded_on_cpus",
            *script(clip_folder, dataset, tmp_path, ROWS // 4, *more, *further),
        ])  # fmt: skip

    launched()
    same(tmp_path, alone)
    shards = tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0"
    assert len(list(shards.glob("*.distcp"))) == 4
    before = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    launched("--resume_from_checkpoint", tmp_path / "checkpoint-2")
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
