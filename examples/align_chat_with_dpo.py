"""Align a model with preferences between answers about images, by DPO (https://arxiv.org/abs/2305.18290) in TRL.

The file is JSON or JSON lines of `{"prompt": ..., "chosen": ..., "rejected": ..., "images": ["cat.jpg"]}`, each a text
or a list of messages. With `--lora_recipe`, the model without its adapters is what it is compared with, and nothing
is loaded twice. Options of the trainer are those of TRL's `DPOConfig`. A recipe of the task "preferences" is the same.

    python examples/align_chat_with_dpo.py --model llava-v1.5-7b --data preferences.jsonl --pictures photos \\
        --output_dir aligned --lora_recipe language+projection --lora_rank 64 --learning_rate 5e-6 --beta 0.1

Needs `pip install 'hfvlm[train,trl]'`.
"""

from transformers import HfArgumentParser
from trl import DPOConfig

from hfvlm.training.alignment import train_preferences
from hfvlm.training.recipe_arguments import ModelArguments, PreferenceDataArguments


def main(model_arguments: ModelArguments, data: PreferenceDataArguments, arguments: DPOConfig) -> dict[str, float]:
    return train_preferences(model_arguments, data, arguments)


if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, PreferenceDataArguments, DPOConfig), description=__doc__)
    main(*parser.parse_args_into_dataclasses())
