"""Training on transformers' Trainer."""

from hfvlm.training.arguments import ContrastiveTrainingArguments
from hfvlm.training.augmentation import RandomCropAndFlip, RandomResizedCrop
from hfvlm.training.chat import ChatCollator, ChatTrainer, PreferenceCollator
from hfvlm.training.data import CaptionCollator, ContrastiveCollator
from hfvlm.training.duplicates import near_duplicates
from hfvlm.training.gradient_cache import cached_backward
from hfvlm.training.masking import MaskingCollator
from hfvlm.training.painting import PaintingCollator
from hfvlm.training.rewards import RewardFunction, RewardTrainer, load_reward
from hfvlm.training.row_trainer import RowTrainer
from hfvlm.training.short_runs import short_run
from hfvlm.training.trainer import ContrastiveTrainer

__all__ = [
    "CaptionCollator",
    "ChatCollator",
    "ChatTrainer",
    "ContrastiveCollator",
    "ContrastiveTrainer",
    "ContrastiveTrainingArguments",
    "MaskingCollator",
    "PaintingCollator",
    "PreferenceCollator",
    "RandomCropAndFlip",
    "RandomResizedCrop",
    "RewardFunction",
    "RewardTrainer",
    "RowTrainer",
    "cached_backward",
    "load_reward",
    "near_duplicates",
    "short_run",
]
