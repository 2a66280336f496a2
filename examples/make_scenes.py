"""Write a small data set of images with captions: pairs of shapes, side by side.

Some pairs are held out: they are in "test" alone. The folder is what `datasets.load_dataset` calls an imagefolder,
with several captions for each image.

    python examples/make_scenes.py --output scenes
"""

import argparse
import json
from pathlib import Path

import numpy as np

from hfvlm.samples import scenes
from hfvlm.writing import new_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=6, help="of each pair in the training set")
    parser.add_argument("--held-out", type=int, default=100, help="pairs of the test set")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.RandomState(arguments.seed)
    pairs = scenes.all_pairs()
    order = random.permutation(len(pairs))
    test, train = order[: arguments.held_out], order[arguments.held_out :]
    with new_folder(arguments.output) as folder:
        write(folder / "train", [pairs[i] for i in train for _ in range(arguments.pictures)], random)
        write(folder / "test", [pairs[i] for i in test], random)


def write(folder: Path, pairs: list[scenes.ScenePair], random: np.random.RandomState) -> None:
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i, pair in enumerate(pairs):
            name = f"{i:05}.png"
            pair.render(random).save(folder / name)
            captions = [pair.caption(template) for template in scenes.PAIR_TEMPLATES]
            metadata.write(json.dumps({"file_name": name, "captions": captions}) + "\n")


if __name__ == "__main__":
    main()
