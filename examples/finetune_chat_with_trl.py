"""Fine-tune a model on conversations about images with TRL's SFTTrainer, on the tokens that its authors train on.

The file is JSON or JSON lines in TRL's form, `{"messages": [...], "images": ["cat.jpg"]}`. Options of the trainer are
those of TRL's `SFTConfig`; `--max_length` is that of the conversations, which are never cut in an image.

    python examples/finetune_chat_with_trl.py --model llava-v1.5-7b --data conversations.jsonl --pictures photos \\
        --output_dir tuned --lora_recipe language+projection --lora_rank 128 --four_bits

Needs `pip install 'hfvlm[train,trl]'`.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoProcessor, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hfvlm.training.chat import ChatCollator, length_of, read_examples
from hfvlm.training.recipe_models import load_model
from hfvlm.training.recipes import ModelArguments, finish


@dataclass
class Conversations:
    data: str = field(metadata={"help": "JSON or JSON lines of conversations."})
    pictures: str = field(default=".", metadata={"help": "The folder that the images' paths begin in."})


def main(model_arguments: ModelArguments, conversations: Conversations, arguments: SFTConfig) -> dict[str, float]:
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    rows = read_examples(conversations.data, conversations.pictures)
    arguments.remove_unused_columns = False
    trainer = SFTTrainer(
        load_model(model_arguments, arguments.seed),
        arguments,
        data_collator=ChatCollator(processor, max_length=arguments.max_length),
        train_dataset=Dataset.from_list([row | {"length": length_of(row)} for row in rows]),
        processing_class=processor,
    )
    return finish(trainer, arguments)


if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, Conversations, SFTConfig), description=__doc__)
    main(*parser.parse_args_into_dataclasses())
