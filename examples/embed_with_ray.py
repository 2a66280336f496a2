"""Embed images on a cluster: `hfvlm.Embedder` in Ray Data's `map_batches` (needs `pip install "ray[data]"`).

    python examples/embed_with_ray.py --model clip-vit-b-32 --pictures photos --output vectors --workers 8 --gpus 1

Each worker loads the model once. Without a cluster, Ray starts on this machine.
"""

import argparse
from pathlib import Path
from typing import Any

import ray

from hfvlm import Embedder


class EmbedPictures:
    """A worker: paths of images -> their vectors; images that cannot be read get none, and the reason."""

    def __init__(self, model: str):
        self.embedder = Embedder.from_pretrained(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [str(path) for path in batch["path"]]
        found, errors = self.embedder.encode_readable("image", paths)
        vectors = iter(found)  # float32, and so is the column
        return {
            "path": paths,
            "image": [None if i in errors else next(vectors) for i in range(len(paths))],
            "error": [errors.get(i, "") for i in range(len(paths))],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder that every worker sees")
    parser.add_argument("--output", type=Path, required=True, help="a folder for Parquet files")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    paths = sorted(str(path.resolve()) for path in arguments.pictures.rglob("*") if path.suffix in (".jpg", ".png"))
    rows = ray.data.from_items([{"path": path} for path in paths])
    rows.map_batches(
        EmbedPictures,
        fn_constructor_args=(arguments.model,),
        batch_size=arguments.batch_size,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_gpus=arguments.gpus,
    ).write_parquet(str(arguments.output.resolve()))


if __name__ == "__main__":
    main()
