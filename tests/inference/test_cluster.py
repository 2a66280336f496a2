"""`hfvlm embed --engine ray`: what one process gives, from actors, of which some are killed."""

import json
import threading
import time

import numpy as np
import psutil
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.inference.cluster import Cluster, Recipe, packed, unpacked
from hfvlm.inference.embed import count_rows, embed, read_vectors
from hfvlm.inference.pins import tower_hashes
from hfvlm.samples import scenes

ROWS, SHARD = 400, 20


@pytest.mark.parametrize("actors", [0, -1, 1.5, True, "2", float("nan")])
def test_a_number_of_actors_is_checked(actors):
    with pytest.raises(ValueError, match="actors must be an integer of at least 1"):
        Cluster(actors)


@pytest.mark.parametrize(
    ("actors", "device", "expected"),
    [
        (None, "auto", (8, {"num_gpus": 1})),
        (3, "auto", (3, {"num_gpus": 1})),
        (None, "cuda", (8, {"num_gpus": 1})),
        (None, "cpu", (64, {"num_cpus": 1})),
        (5, "cpu", (5, {"num_cpus": 1})),
    ],
)
def test_an_actor_has_a_gpu_or_a_core(actors, device, expected):
    assert Cluster(actors).resources({"CPU": 64.0, "GPU": 8.0}, device) == expected


@pytest.mark.parametrize(
    ("actors", "found", "device", "message"),
    [
        (9, {"CPU": 64.0, "GPU": 8.0}, "auto", "9 actors need a GPU each; the cluster has 8"),
        (3, {"CPU": 2.0}, "auto", "3 actors need a CPU each; the cluster has 2"),
        (None, {"CPU": 2.0}, "cuda", "actors need a GPU each; the cluster has 0"),
    ],
)
def test_actors_that_find_no_place_are_refused(actors, found, device, message):
    with pytest.raises(ValueError, match=message):
        Cluster(actors).resources(found, device)


def test_a_device_of_one_machine_is_none_of_a_cluster(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda on a cluster, not 'cuda:1'"):
        embed(tmp_path, tmp_path / "out", clip_folder, cluster=Cluster(), device="cuda:1")


def test_an_actor_with_other_weights_is_refused(clip_folder, imagebind_folder):
    recipe = Recipe(str(clip_folder), None, {"device": "cpu"}, {"image": "0"}, ({"image": "image"}, None, 4, {}))
    with pytest.raises(ValueError, match="are others than where the run began"):
        recipe.tables()
    known = Recipe(str(clip_folder), None, {"device": "cpu"}, tower_hashes(recipe_model(clip_folder)), recipe.how)
    assert known.tables().batch_size == 4


def recipe_model(folder):
    from hfvlm.inference.embedder import Embedder

    return Embedder.from_pretrained(folder, device="cpu").model


def test_several_processes_need_parquet_and_no_cluster(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in ({"cluster": Cluster()}, {"to": "lancedb"}):
        with pytest.raises(ValueError, match="Several processes share Parquet shards only"):
            embed(tmp_path, tmp_path / "out", clip_folder, **options)


def test_content_is_packed_whole():
    content = (3, [(60, {"image": {"bytes": b"\0" * 1000, "path": None}, "text": ["a", None]})])
    assert unpacked(packed(content)) == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actors", "2"], "it goes with --engine ray only"),
        (["--engine", "dask"], "'dask' is none of plain, ray"),
        (["--engine", "ray", "--actors", "0"], "greater than or equal to 1"),
        (["--engine", "ray", "--device", "cuda:1"], "'cuda:1' is none of auto, cpu, cuda"),
        (["--to", "csv"], "'csv' is none of parquet, lancedb, qdrant"),
    ],
)
def test_options_of_the_command_are_checked(options, message, tmp_path):
    result = CliRunner().invoke(app, ["embed", str(tmp_path), "-o", str(tmp_path / "out"), "-m", "model", *options])
    assert result.exit_code == 2
    assert message in result.output


# On a cluster of one machine, which takes some seconds to start


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="comes with hfvlm[ray]")
    # As other processes, so that they get their share of a machine that others use.
    settings = {"worker_niceness": 0}
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False, _system_config=settings)
    yield Cluster(2)
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with captions, of which three are damaged."""
    folder = tmp_path_factory.mktemp("images")
    kinds, random = scenes.all_scenes(), np.random.RandomState(0)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i in range(ROWS):
            kinds[i % len(kinds)].render(random).save(folder / f"{i:04}.png")
            caption = kinds[i % len(kinds)].caption()
            metadata.write(json.dumps({"file_name": f"{i:04}.png", "text": caption}) + "\n")
    for i in (7, 123, 399):
        (folder / f"{i:04}.png").write_bytes(b"damaged")
    return folder


@pytest.fixture(scope="module")
def plain(folder, clip_folder, tmp_path_factory):
    return embed(folder, tmp_path_factory.mktemp("plain") / "out", clip_folder, batch_size=8, shard_rows=SHARD)


def files(output):
    return {path.name: parquet.read_table(path) for path in sorted(output.glob("*.parquet"))}


def actors():
    """The processes of this test's actors, below this one."""
    return [
        process for process in psutil.Process().children(recursive=True)
        if "MapBatches(Actor)" in " ".join(process.cmdline())
    ]  # fmt: skip


def kill_one(output, killed, after):
    """Kill an actor once some shards are there."""
    deadline = time.monotonic() + 120
    while len(list(output.glob("vectors-*.parquet"))) < after and time.monotonic() < deadline:
        time.sleep(0.01)
    if found := actors():
        found[0].kill()
        killed.append((found[0].pid, len(list(output.glob("vectors-*.parquet")))))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_a_killed_actor_loses_nothing(cluster, folder, clip_folder, plain, tmp_path):
    killed = []
    thread = threading.Thread(target=kill_one, args=(tmp_path, killed, 3))
    thread.start()
    embed(folder, tmp_path, clip_folder, batch_size=8, shard_rows=SHARD, cluster=cluster)
    thread.join()
    ((pid, shards),) = killed
    assert not psutil.pid_exists(pid)
    assert shards < ROWS // SHARD
    expected, found = files(plain), files(tmp_path)
    assert list(found) == list(expected)
    assert all(found[name].equals(expected[name]) for name in expected)  # bit for bit
    assert count_rows(tmp_path) == (ROWS - 3, 3)
    settings = [json.loads((each / "embed.json").read_text()) for each in (plain, tmp_path)]
    assert settings[0] == settings[1]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["parquet", "lancedb"])
def test_either_engine_goes_on_with_the_other(cluster, folder, clip_folder, plain, tmp_path, to):
    if to == "lancedb":
        pytest.importorskip("lancedb", reason="comes with hfvlm[lancedb]")
    options = {"batch_size": 8, "shard_rows": SHARD, "to": to}
    embed(folder, tmp_path, clip_folder, cluster=cluster, **options)
    suffix = "parquet" if to == "parquet" else "json"
    times = {}
    for number in range(ROWS // SHARD):
        path = tmp_path / f"vectors-{number:05}.{suffix}"
        if number in (0, 4, 5, 19):
            path.unlink()
        else:
            times[path] = path.stat().st_mtime_ns
    embed(folder, tmp_path, clip_folder, **options, cluster=cluster if to == "parquet" else None)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for modality in ("image", "text"):
        (expected, paths), (found, found_paths) = (read_vectors(each, modality) for each in (plain, tmp_path))
        assert found.ids == expected.ids
        assert found_paths == paths
        assert (found.vectors == expected.vectors).all()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_errors_in_actors_are_those_of_one_process(cluster, folder, clip_folder, tmp_path):
    with pytest.raises(TypeError, match="colour"):
        embed(folder, tmp_path / "out", clip_folder, cluster=cluster, source_options={"image": {"colour": 1}})
    assert not (tmp_path / "out").exists()
    output = embed(folder, tmp_path / "out", clip_folder, shard_rows=200, cluster=cluster)
    with pytest.raises(ValueError, match="begun with another shard_rows"):
        embed(folder, output, clip_folder, shard_rows=100, cluster=cluster)
    embed(folder, output, clip_folder, shard_rows=200, cluster=cluster)  # nothing is missing
    assert count_rows(output) == (ROWS - 3, 3)
