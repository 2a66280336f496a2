"""Fine-tune a model on conversations about images: `hfvlm train` with `task: chat`, from a command line.

The file is JSON or JSON lines. An example is `{"messages": [...], "images": ["cat.jpg"]}` or, as LLaVA's own files,
`{"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...], "image": "cat.jpg"}`.

    python examples/finetune_chat.py --model llava-v1.5-7b --data conversations.json --pictures photos \\
        --output_dir tuned --lora_recipe language+projection --lora_rank 128 --four_bits
"""

from transformers import HfArgumentParser, TrainingArguments

from hfvlm.training.recipes import ChatDataArguments, ModelArguments, train_chat

if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, ChatDataArguments, TrainingArguments), description=__doc__)
    train_chat(*parser.parse_args_into_dataclasses())
