"""Reward models over images and texts: training by pairs of answers, and rewards for reinforcement learning in TRL."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from hfvlm.checks.ranges import check_integer
from hfvlm.inference.adapters import adapter_settings, config_of, load_model
from hfvlm.losses import preference_loss
from hfvlm.registry import architecture_of, find_class
from hfvlm.training.chat import ChatCollator, turns_of
from hfvlm.training.row_trainer import GuardedTrainer

AUTO = "AutoModelForSequenceClassification"


class RewardTrainer(GuardedTrainer):
    """`Trainer` of a reward by `preference_loss`, on batches of `PreferenceCollator`: the preferred answers of all
    pairs, then the others. It logs, and measures in evaluations, the share of pairs in the right order (`accuracy`)
    and by how much the preferred answers score more (`margin`).

    TRL's own takes texts alone. Arguments as `transformers.Trainer`; `remove_unused_columns=False` is needed.

    Raises:
        ValueError: the model has not one score a text, `num_labels=1`.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"compute_metrics": ordered} | options)
        given: Any = self.model
        if (labels := given.config.num_labels) != 1:
            raise ValueError(f"A reward is one number: load the model with num_labels=1, it has {labels}.")
        # The loss is a mean over pairs, which gradient accumulation divides by the number of parts.
        self.model_accepts_loss_kwargs = False
        self.label_names = []
        self.seen: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of a batch and, with `return_outputs`, the scores of its pairs, `(pairs, 2)`."""
        given = {name: value for name, value in inputs.items() if name != "completion_mask"}
        pairs = model(**given).logits.squeeze(-1).unflatten(0, (2, -1)).t()
        loss = preference_loss(pairs[:, 0], pairs[:, 1])
        if model.training:
            self.seen.append(pairs.detach().float())
        return (loss, pairs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001 (transformers' signature)
        ignore_keys: Any = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, pairs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        loss, pairs = loss.detach(), pairs.detach().float()
        return (loss, None, None) if prediction_loss_only else (loss, pairs, torch.zeros_like(pairs[:, 0]))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the training loss, what `ordered` says of the pairs since the last time."""
        if "loss" in logs and self.seen:
            logs |= measured(torch.cat(self.seen).cpu().numpy())
            self.seen = []
        super().log(logs, *args, **kwargs)


def ordered(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metrics of an evaluation of `RewardTrainer`."""
    return measured(np.asarray(prediction.predictions))


def measured(pairs: np.ndarray) -> dict[str, float]:
    """Compute the accuracy and the margin of scores `(pairs, 2)`; equal scores are in no right order."""
    difference = pairs[:, 0] - pairs[:, 1]
    return {"accuracy": float((difference > 0).mean()), "margin": float(difference.mean())}


class RewardFunction:
    """Reward of answers about images, as a function for TRL's `RLOOTrainer` and `GRPOTrainer`.

    TRL passes a reward model texts alone, without their images, so the model is called here, on conversations as its
    processor assembles them in training. In the logs it is `rewards/reward`.

    Args:
        model: of one score a text, such as `load_reward` returns.
        processor: of the model.
        batch_size: answers that are scored at once.
    """

    __name__ = "reward"

    def __init__(self, model: Any, processor: Any, batch_size: int = 16):
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.collate = ChatCollator(processor)
        self.batch_size = check_integer("batch_size", batch_size)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], images: Any = None, **columns: Any
    ) -> list[float]:
        """Score answers to prompts.

        Args:
            prompts: texts or lists of messages, with the images in their parts.
            completions: likewise, the answers.
            images: of each prompt a list of those that are in no part.
            **columns: others of the data set, and what else TRL passes; none has a part in the score.
        """
        given = [None] * len(prompts) if images is None else images
        rows = [
            {"messages": [*turns_of("user", prompt), *turns_of("assistant", answer)], "images": own}
            for prompt, answer, own in zip(prompts, completions, given, strict=True)
        ]
        return self.score(rows).tolist()

    @torch.no_grad()
    def score(self, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        """Score whole conversations, in a form that `ChatCollator` takes -> `(N,)`, on the CPU."""
        scores = []
        for start in range(0, len(examples), self.batch_size):
            batch = self.collate(examples[start : start + self.batch_size])
            inputs = {name: on_device(value, self.model) for name, value in batch.items() if name != "labels"}
            scores.append(self.model(**inputs).logits.squeeze(-1).float().cpu())
        return torch.cat(scores) if scores else torch.zeros(0)


def on_device(value: Any, model: Any) -> Any:
    """Put an input on a model's device, images in the model's precision."""
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def reward_class(folder: str) -> Any:
    """Return the class that scores texts, of the architecture of a chat model, a reward or an adapter of either.

    Raises:
        ValueError: hfvlm has none.
    """
    config = config_of(folder)
    for name in architecture_of(config.model_type).models.get(AUTO, ()):
        if (kind := find_class(name)).config_class is type(config):
            return kind
    raise ValueError(f"{folder}: hfvlm has no model of {type(config).__name__} that scores texts ({AUTO}).")


def load_reward(folder: str, **options: Any) -> Any:
    """Load a trained reward, an adapter merged into its base.

    Args:
        folder: as the task "reward" writes it, or a Hub id.
        **options: of `from_pretrained`.

    Raises:
        ValueError: it has no trained `score`, such as a chat model's folder.
    """
    model, problems = load_model(folder, reward_class(folder), num_labels=1, output_loading_info=True, **options)
    trained = (adapter_settings(folder) or {}).get("modules_to_save") or ()
    if "score.weight" in problems["missing_keys"] and "score" not in trained:
        raise ValueError(f"{folder}: has no score: train a reward of it first, with a recipe of the task `reward`.")
    return model
