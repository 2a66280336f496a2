"""Fine-tunes a model that answers about pictures, by LoRA, on a file of conversations.

The file is JSON or JSON lines. An example is `{"messages": [...], "images": ["cat.jpg"]}` or, as LLaVA's own files,
`{"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...], "image": "cat.jpg"}`; pictures are
paths under `--pictures`.

    python examples/finetune_chat.py llava-v1.5-7b conversations.json --pictures photos --output tuned
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Trainer, TrainingArguments

import hfvlm
from hfvlm.training.chat import ChatCollator


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model that hfvlm converted")
    parser.add_argument("data", type=Path)
    parser.add_argument("--pictures", type=Path, default=Path())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", help="what trains, as in 'language+projection', the default, or 'vision+language'")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--four-bits", action="store_true", help="QLoRA: the frozen language model in 4 bits")
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=2048)
    options = parser.parse_args(arguments)

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    four_bits = {"quantization_config": quantised} if options.four_bits else {}
    model = AutoModelForImageTextToText.from_pretrained(options.folder, dtype="auto", **four_bits)
    processor = AutoProcessor.from_pretrained(options.folder)
    tuned = hfvlm.lora(model, options.recipe, r=options.rank)
    training = TrainingArguments(
        options.output,
        max_steps=options.steps,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    collate = ChatCollator(processor, max_length=options.max_length)
    Trainer(tuned, training, data_collator=collate, train_dataset=examples(options.data, options.pictures)).train()
    tuned.save_pretrained(options.output)  # the adapter, and the projector with it
    processor.save_pretrained(options.output)


def examples(data: Path, pictures: Path) -> list[dict[str, Any]]:
    text = data.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    for row in rows:
        for name in ("image", "images"):
            if name in row:
                row[name] = [str(pictures / path) for path in ([row[name]] if name == "image" else row[name])]
    return rows


if __name__ == "__main__":
    main()
