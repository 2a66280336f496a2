"""Training towers of images without labels or texts: two views of an image belong together (SimCLR,
https://arxiv.org/abs/2002.05709)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.losses import nt_xent_loss
from hfvlm.losses.processes import all_processes
from hfvlm.modeling.base import unit
from hfvlm.modeling.vision import ImageClassifier
from hfvlm.training.data import ContrastiveCollator
from hfvlm.training.row_trainer import RowTrainer

View = Callable[[Any, np.random.Generator], Any]


class TwoViewCollator(ContrastiveCollator):
    """Collator of images to two views of each. Evaluations draw the same changes for every image.

    Args:
        processor: an image processor, or one that has one.
        column: of the images.
        view: makes a view of an image, by the random numbers that it is given, as `SimCLRAugmentation`.
    """

    def __init__(self, processor: Any, column: str, view: View):
        super().__init__(processor, {"image": column})
        self.image_processor, self.view = getattr(processor, "image_processor", processor), view

    def read(self, row: Mapping[str, Any], random: np.random.Generator | None) -> dict[str, Any]:
        """Read a row: both views of its image."""
        image = super().read(row, None)["image"]
        random = np.random.default_rng(0) if random is None else random
        return {"views": [self.view(image, random) for _ in range(2)]}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `Rows` to `pixel_values` `(B, 2, C, H, W)`."""
        pixels = self.image_processor([view for row in rows for view in row["views"]], return_tensors="pt")
        return {
            "pixel_values": pixels["pixel_values"].unflatten(0, (-1, 2)),
            "replaced": torch.tensor([row["replaced"] for row in rows]),
        }


@dataclass
class TwoViewOutput(ModelOutput):
    """Both views of images.

    Args:
        loss: scalar.
        embeds: `(B, 2, D)`, behind the head, of unit length.
    """

    loss: Tensor | None = None
    embeds: Tensor | None = None


class TwoViewModel(nn.Module):
    """A tower of images behind which a head of two layers makes what is compared; the tower alone is the result.

    Args:
        classifier: an image classifier, whose last layer stays unused.
        size: of the head's output.
        temperature: what similarities are divided by.
    """

    def __init__(self, classifier: ImageClassifier, size: int = 128, temperature: float = 0.1):
        super().__init__()
        check_integer("size", size)
        check_number("temperature", temperature, 0, open_low=True)
        self.model, self.scale = classifier.requires_grad_(requires_grad=True), 1 / temperature
        self.model.classifier.requires_grad_(requires_grad=False)
        width = classifier.classifier.in_features
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size))

    @property
    def config(self) -> Any:
        """The configuration of the tower's classifier."""
        return self.model.config

    def forward(self, pixel_values: Tensor) -> TwoViewOutput:
        """`(B, 2, C, H, W)` -> the loss over the batch, in training that of all processes."""
        pooled = self.model.vision_model(pixel_values.flatten(0, 1)).pooler_output
        embeds = unit(self.head(pooled)).unflatten(0, (-1, 2))
        group = all_processes() if self.training else None
        scale = torch.tensor(self.scale, device=embeds.device)
        return TwoViewOutput(nt_xent_loss(embeds[:, 0], embeds[:, 1], scale, group=group), embeds)


class TwoViewTrainer(RowTrainer):
    """Trainer of a `TwoViewModel`. Checkpoints hold the head too; what it saves at the end is the tower in its
    classifier, without the head, for a linear probe or fine-tuning."""

    training_inputs = {}

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.can_return_loss, self.label_names = True, []
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("Two views are trained with data parallelism alone, not with FSDP or DeepSpeed.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir or ".")
        if _internal_call or not self.args.should_save:
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        collator: Any = self.data_collator
        model.model.save_pretrained(folder)
        collator.image_processor.save_pretrained(folder)
