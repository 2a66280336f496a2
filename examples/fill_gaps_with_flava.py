"""Fill the gaps of a sentence, first by the sentence alone, then with the image that it is about, with FLAVA.

    hfvlm convert flava_for_pretraining_unified_text_encoder.pt \
        --preset flava/flava_for_pretraining_unified_text_encoder -o flava   # BERT's vocab.txt beside it
    python examples/fill_gaps_with_flava.py flava cat.jpg "a [MASK] on a sofa"

prints the likeliest words for each [MASK], of either, and how sure the model is that both belong together.
"""

import argparse
import sys

import torch
from transformers import AutoModel, AutoProcessor

import hfvlm  # noqa: F401  (registers FLAVA with transformers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a converted folder of the pretraining model")
    parser.add_argument("picture")
    parser.add_argument("text", help="with [MASK] where words are missing")
    parser.add_argument("--best", type=int, default=5, help="words for each gap")
    arguments = parser.parse_args()
    alone, together, match = fill(arguments.model, arguments.picture, arguments.text, arguments.best)
    for name, gaps in (("text alone", alone), ("with the image", together)):
        for words in gaps:
            sys.stdout.write(f"{name}: {', '.join(f'{word} {share:.0%}' for word, share in words)}\n")
    sys.stdout.write(f"they belong together: {match:.0%}\n")


@torch.inference_mode()
def fill(
    folder: str, picture: str, text: str, best: int
) -> tuple[list[list[tuple[str, float]]], list[list[tuple[str, float]]], float]:
    """The best words for each gap by the text encoder and by the multimodal encoder, and the share of a match."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=picture, text=text)
    gaps = inputs["input_ids"][0] == processor.tokenizer.mask_token_id
    if not gaps.any():
        raise SystemExit(f"{text!r} has no [MASK].")
    text_alone = model(input_ids_masked=inputs["input_ids"])
    together = model(**inputs, input_ids_masked=inputs["input_ids"])

    def words(logits: torch.Tensor) -> list[list[tuple[str, float]]]:
        shares, ids = logits[0, gaps].softmax(dim=-1).topk(best)
        return [
            list(zip(processor.tokenizer.convert_ids_to_tokens(row.tolist()), share.tolist(), strict=True))
            for row, share in zip(ids, shares, strict=True)
        ]

    match = together.itm_logits[0].softmax(dim=-1)[1].item()
    return words(text_alone.mlm_logits), words(together.mmm_text_logits), match


if __name__ == "__main__":
    main()
