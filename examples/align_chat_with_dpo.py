"""Align a model with preferences between answers about images, by DPO (https://arxiv.org/abs/2305.18290) in TRL.

The file is JSON or JSON lines of `{"prompt": ..., "chosen": ..., "rejected": ..., "images": ["cat.jpg"]}`, each a text
or a list of messages. With `--lora_recipe`, the model without its adapters is what it is compared with, and nothing
is loaded twice. Options of the trainer are those of TRL's `DPOConfig`.

    python examples/align_chat_with_dpo.py --model llava-v1.5-7b --data preferences.jsonl --pictures photos \\
        --output_dir aligned --lora_recipe language+projection --lora_rank 64 --learning_rate 5e-6 --beta 0.1

Needs `pip install 'hfvlm[train,trl]'`.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoProcessor, HfArgumentParser
from trl import DPOConfig, DPOTrainer

from hfvlm.training.chat import PreferenceCollator, read_examples
from hfvlm.training.recipes import ModelArguments, finish, load_model


@dataclass
class Preferences:
    data: str = field(metadata={"help": "JSON or JSON lines of pairs of answers."})
    pictures: str = field(default=".", metadata={"help": "The folder that the images' paths begin in."})


def main(model_arguments: ModelArguments, preferences: Preferences, arguments: DPOConfig) -> dict[str, float]:
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    model, adapted = load_model(model_arguments, arguments.seed), model_arguments.lora_recipe is not None
    arguments.remove_unused_columns = False
    trainer = DPOTrainer(
        model,
        None if adapted else load_model(model_arguments, arguments.seed),
        arguments,
        data_collator=PreferenceCollator(processor),
        train_dataset=Dataset.from_list(read_examples(preferences.data, preferences.pictures)),
        processing_class=processor,
    )
    return finish(trainer, arguments)


if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, Preferences, DPOConfig), description=__doc__)
    main(*parser.parse_args_into_dataclasses())
