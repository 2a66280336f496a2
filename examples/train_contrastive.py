"""Train a model whose rows are compared with one another: the same as `hfvlm train`, from a command line.

    python examples/train_contrastive.py --model clip-vit-b-32 --dataset images --output_dir tuned \\
        --per_device_train_batch_size 1024 --mini_batch_size 64 --lora_recipe vision+text+scale

`--help` lists everything; `torchrun --nproc_per_node 8 examples/train_contrastive.py ...` compares the rows of eight
processes with one another.
"""

from transformers import HfArgumentParser

from hfvlm.training import ContrastiveTrainingArguments
from hfvlm.training.recipes import DataArguments, ModelArguments, train_contrastive

if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, DataArguments, ContrastiveTrainingArguments), description=__doc__)
    train_contrastive(*parser.parse_args_into_dataclasses())
