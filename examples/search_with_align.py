"""Search images by a text, with ALIGN.

Kakao Brain's TensorFlow checkpoint becomes a folder once; TensorFlow is not needed:

    huggingface-cli download kakaobrain/coyo-align-b7-base --local-dir coyo-align-b7-base
    huggingface-cli download google-bert/bert-base-uncased vocab.txt --local-dir coyo-align-b7-base
    hfvlm convert coyo-align-b7-base --preset align/coyo-align-b7-base -o align --verify

Then

    python examples/search_with_align.py align "a dog on a beach" photos/*.jpg

prints the cosine similarity and the name of each image, the best one first.
"""

import argparse
import sys

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

import hfvlm  # noqa: F401  (registers ALIGN with transformers)

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a converted folder")
    parser.add_argument("query")
    parser.add_argument("pictures", nargs="+")
    arguments = parser.parse_args()
    for score, path in rank(arguments.model, arguments.query, arguments.pictures):
        sys.stdout.write(f"{score:.4f} {path}\n")


@torch.inference_mode()
def rank(folder: str, query: str, pictures: list[str]) -> list[tuple[float, str]]:
    """Cosine similarities with the query, the largest first."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    text = model.get_text_features(**processor(text=query)).pooler_output
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    images = [model.get_image_features(**processor(images=batch)).pooler_output for batch in batches]
    scores = F.cosine_similarity(torch.cat(images), text)
    return sorted(zip(scores.tolist(), pictures, strict=True), reverse=True)


if __name__ == "__main__":
    main()
