"""Train the small CLIP that ships with hfvlm, from nothing, and store it as OpenAI would have released it.

Data: scikit-learn's handwritten digits without 8 and 9, and rendered scenes of coloured shapes, each with captions in
several phrasings. The contrastive objective and the cosine schedule are the paper's; every batch holds each of the 8
digits and each of the 48 kinds of scene once, so that no two of its captions fit one image. Two cores need about
five minutes.

    python examples/train_tiny_clip.py --output tiny-clip
"""

import argparse
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.clip import ARCHIVE_ENTRIES, keys_for, special_tokens
from hfvlm.models.clip import HfvlmCLIPConfig, HfvlmCLIPImageProcessor, HfvlmCLIPModel, HfvlmCLIPTokenizer
from hfvlm.samples import digits, scenes

PIXELS, PATCH, CONTEXT, MERGES = 32, 8, 24, 256
KNOWN = range(8)

log = logging.getLogger("train_tiny_clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    vocabulary = arguments.output / "bpe_simple_vocab.txt.gz"
    train_vocabulary(every_caption(), vocabulary)
    tokenizer = HfvlmCLIPTokenizer.from_vocabulary(vocabulary, model_max_length=CONTEXT)
    model = HfvlmCLIPModel(config(len(tokenizer)))
    train(model, tokenizer, arguments.steps, arguments.seed)
    save_as_openai(model, arguments.output / "clip-tiny.pt")


def every_caption() -> list[str]:
    known = [digits.caption(label, template) for label in KNOWN for template in digits.TEMPLATES]
    return known + [scene.caption(template) for scene in scenes.all_scenes() for template in scenes.TEMPLATES]


def train_vocabulary(texts: list[str], path: Path) -> None:
    """A list of merges in the format of OpenAI's `bpe_simple_vocab_16e6.txt.gz`."""
    engine = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2 * len(alphabet) + MERGES,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = json.loads(engine.to_str())["model"]["merges"][:MERGES]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def config(vocabulary: int) -> HfvlmCLIPConfig:
    """Heads of 64 channels, as in every CLIP of OpenAI: their files do not store the number."""
    return HfvlmCLIPConfig(
        vision_config={
            "image_size": PIXELS,
            "patch_size": PATCH,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "projection_dim": 64,
        },
        text_config={
            "vocab_size": vocabulary,
            "max_position_embeddings": CONTEXT,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "projection_dim": 64,
            **special_tokens(vocabulary),
        },
    )


def train(model: HfvlmCLIPModel, tokenizer: HfvlmCLIPTokenizer, steps: int, seed: int) -> None:
    random = np.random.RandomState(seed)
    pictures = {label: [d.image for d in digits.load_digits("train") if d.label == label] for label in KNOWN}
    kinds = scenes.all_scenes()
    process = HfvlmCLIPImageProcessor(size=PIXELS)
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        images = [digits.jitter(pictures[label][random.randint(len(pictures[label]))], random) for label in KNOWN]
        images += [kind.render(random, PIXELS) for kind in kinds]
        texts = [digits.caption(label, random.choice(digits.TEMPLATES)) for label in KNOWN]
        texts += [kind.caption(random.choice(scenes.TEMPLATES)) for kind in kinds]
        inputs = process(images, return_tensors="pt") | tokenizer(texts, return_tensors="pt")
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model.logit_scale.scale.data.clamp_(max=np.log(100))
        if step % 250 == 0 or step == steps - 1:
            log.info("step %d  loss %.4f  scale %.1f", step, loss.item(), model.logit_scale.exp().item())


def save_as_openai(model: HfvlmCLIPModel, path: Path) -> None:
    """OpenAI's names and precisions: float16 but for embeddings, norms and the temperature."""
    state = restore_keys(model.state_dict(), keys_for(model.config, "openai"))
    exact = ("embedding", "ln_", "logit_scale")
    state = {k: v if any(name in k for name in exact) else v.half() for k, v in state.items()}
    vision, text = model.config.vision_config, model.config.text_config
    sizes = (vision.image_size, text.max_position_embeddings, text.vocab_size)
    state |= {name: torch.tensor(size) for name, size in zip(ARCHIVE_ENTRIES, sizes, strict=True)}
    torch.save({key: tensor.detach().clone().contiguous() for key, tensor in state.items()}, path)
    log.info("%s: %.2f MB", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
