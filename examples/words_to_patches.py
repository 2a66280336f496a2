"""Show which part of an image each word of a text is matched with, by FILIP.

    hfvlm convert filip.pth.tar --preset filip/filip_vitb32_yfcc15m -o filip
    python examples/words_to_patches.py filip cat.jpg "a cat on a sofa"

or, in Chinese, by FILIP's authors:

    hfvlm convert wukong_vit_b_f.ckpt --preset wukong/wukong_vit_b_f -o filip-zh
    python examples/words_to_patches.py filip-zh cat.jpg "沙发上的猫"

prints a row for each token: its cosine similarity with the patch that fits it best, and where that patch is, in rows
and columns from the top left. The last line is their mean, the score of the text for the image as the paper has it.
"""

import argparse
import math
import sys

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

import hfvlm  # noqa: F401  (registers FILIP and Wukong with transformers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a converted folder")
    parser.add_argument("picture")
    parser.add_argument("text")
    arguments = parser.parse_args()
    matches = match(arguments.model, arguments.picture, arguments.text)
    for token, similarity, row, column in matches:
        sys.stdout.write(f"{similarity:+.3f} row {row} column {column} {token}\n")
    sys.stdout.write(f"{sum(similarity for _, similarity, *_ in matches) / len(matches):+.3f} {arguments.text}\n")


@torch.inference_mode()
def match(folder: str, picture: str, text: str) -> list[tuple[str, float, int, int]]:
    """Each token of a text with its similarity to its best patch, and that patch's row and column."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=picture, text=text)
    ids, mask = inputs["input_ids"][0], inputs.get("attention_mask")
    # What follows is padding.
    length = ids.tolist().index(processor.tokenizer.eos_token_id) + 1 if mask is None else int(mask.sum())
    patches = F.normalize(model.get_image_features(inputs["pixel_values"]).pooler_output[0], dim=-1)
    if len(patches) != math.prod(model.config.vision_config.grid):
        raise SystemExit(f"{folder}: compares words with {len(patches)} sums of patches, which are at no place.")
    tokens = F.normalize(model.get_text_features(ids[None]).pooler_output[0, :length], dim=-1)
    similarity, place = (tokens @ patches.t()).max(dim=1)
    columns = model.config.vision_config.grid[1]
    names = processor.tokenizer.convert_ids_to_tokens(ids[:length].tolist())
    return [
        (name, s, p // columns, p % columns)
        for name, s, p in zip(names, similarity.tolist(), place.tolist(), strict=True)
    ]


if __name__ == "__main__":
    main()
