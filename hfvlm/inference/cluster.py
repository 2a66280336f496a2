"""The embedding of shards by actors of Ray Data, on one machine or many."""

import logging
import os
import pickle
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers.utils.logging import disable_progress_bar

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.pins import tower_hashes
from hfvlm.inference.shards import Result, Run, missing_shards, write_shards
from hfvlm.inference.vector_tables import VectorTables
from hfvlm.media.rows import load_rows
from hfvlm.media.sources import import_extra

DEVICES = ("auto", "cpu", "cuda")
# Times that a shard is begun again when the actor that embeds it dies, and shards that wait for an actor.
RETRIES, WAITING = 3, 2


@dataclass(frozen=True)
class Cluster:
    """Actors of Ray Data (`pip install 'hfvlm[ray]'`), each with the whole model.

    The cluster is the one of the environment variable RAY_ADDRESS, or one that is started on this machine. The source
    and the model have the same paths on all of its machines, with hfvlm; shards are written by this process.

    Args:
        actors: how many; None for one for each GPU of the cluster, or, where it has none, for each core.

    Raises:
        ValueError: it is no number of actors.
    """

    actors: int | None = None

    def __post_init__(self) -> None:
        if self.actors is not None:
            check_integer("actors", self.actors)

    def here(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with which this process, which may have no GPU, loads the model to describe it.

        Raises:
            ValueError: the device is one of a single machine's.
            ImportError: Ray is not installed.
        """
        import_extra("ray", "ray", "A cluster")
        if (device := str(options.get("device", "auto"))) not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)} on a cluster, not {device!r}.")
        return {**options, "device": "cpu"}

    def resources(self, found: Mapping[str, float], device: str) -> tuple[int, dict[str, int]]:
        """Decide the number of actors, and what each has to itself.

        Args:
            found: {"CPU": 64.0, "GPU": 8.0}, those of the cluster.
            device: one of DEVICES.

        Raises:
            ValueError: the cluster has fewer GPUs or cores than actors.
        """
        cores, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        kind = "GPU" if device == "cuda" or (device == "auto" and gpus) else "CPU"
        there = gpus if kind == "GPU" else cores
        actors = self.actors or there
        if not 0 < actors <= there:
            raise ValueError(
                f"{actors or 'Its'} actors need a {kind} each; the cluster has {there}: lower actors, or add machines."
            )
        return actors, {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}


@dataclass(frozen=True)
class Recipe:
    """What an actor makes its embedder of.

    Args:
        model: a folder or a Hub id.
        modalities: those that are read.
        options: of `Embedder.from_pretrained`.
        weights: their hashes, as `tower_hashes` gives them here.
        how: further arguments of `VectorTables`.
    """

    model: str
    modalities: Sequence[str] | None
    options: Mapping[str, Any]
    weights: Mapping[str, str]
    how: tuple[Any, ...] = field(default=())

    def tables(self) -> VectorTables:
        """Load the model.

        Raises:
            ValueError: its weights are others than on the machine that began the run.
        """
        embedder = Embedder.from_pretrained(self.model, self.modalities, **self.options)
        if tower_hashes(embedder.model) != self.weights:
            raise ValueError(f"{self.model}: its weights on {platform.node()} are others than where the run began.")
        return VectorTables(embedder, *self.how)


class Actor:
    """An actor: shards of rows -> their tables."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @cached_property
    def tables(self) -> VectorTables:
        """The embedding, which is made for the first shard: its errors are then those of the run."""
        disable_progress_bar()
        return self.recipe.tables()

    def __call__(self, block: Any) -> Any:
        number, shard = unpacked(block)
        return packed((number, len(shard), *self.tables(shard, number)))


def embed_on(cluster: Cluster, run: Run, recipe: Recipe) -> None:
    """Write every shard that is missing, in the order in which actors return them.

    One task reads the data set as a stream; it waits while the actors have shards enough. A shard whose actor dies is
    given to another.

    Args:
        cluster: the actors.
        run: the output, and what it depends on.
        recipe: what actors load.

    Raises:
        RuntimeError: the actors of a shard died again and again.
        Exception: what was raised in an actor, as it would have been here.
    """
    write_shards(run, results(cluster, run, recipe))


def results(cluster: Cluster, run: Run, recipe: Recipe) -> Iterator[Result]:
    """Yield shards as actors return them."""
    ray = import_extra("ray", "ray", "A cluster")
    import_extra("ray.data", "ray", "A cluster")
    with started(ray), quiet(ray):
        device = str(recipe.options.get("device", "auto"))
        actors, each = cluster.resources(ray.cluster_resources(), device)
        shards = ray.data.read_datasource(source_of(ray, run), override_num_blocks=1, num_cpus=0).map_batches(
            Actor,
            fn_constructor_args=(recipe,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=WAITING),
            max_task_retries=RETRIES,
            **each,
        )
        try:
            for block in shards.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                yield unpacked(block)
        except ray.exceptions.RayTaskError as error:  # which wraps what the task raised
            raise (error.cause or error) from None
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(
                f"{run.output}: the actors that embed a shard died {RETRIES + 1} times, as they do without memory: "
                f"lower batch_size or actors, and start again; complete shards stay. Ray's reason: {error}"
            ) from error


def source_of(ray: Any, run: Run) -> Any:
    """Return the shards that are missing as a source of Ray Data, which one task reads."""
    from ray.data.block import BlockMetadata

    source, split, shard_rows = run.settings["source"], run.settings["split"], run.shard_rows
    complete = frozenset(run.store.shards())

    def read() -> Iterator[Any]:
        rows = load_rows(source, split=split, streaming=True)
        return (packed(shard) for shard in missing_shards(rows, shard_rows, complete))

    class Shards(ray.data.Datasource):
        """The shards of a data set that streams."""

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[Any]:
            return [ray.data.ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None))]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    return Shards()


def packed(content: Any) -> Any:
    """Return content of this run's own processes as a table of one row, whose size Ray knows."""
    import pyarrow

    data = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
    return pyarrow.table({"content": pyarrow.array([data], pyarrow.large_binary())})


def unpacked(block: Any) -> Any:
    """Return the content of `packed`."""
    return pickle.loads(block["content"][0].as_buffer())


@contextmanager
def started(ray: Any) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, or start one here, for the block, unless one is there already."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported
    ray.init(include_dashboard=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet(ray: Any) -> Iterator[None]:
    """Keep Ray Data's own bars and notes off the terminal, and have a block for each shard."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = 1
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
