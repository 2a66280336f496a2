"""Language models with media that end with their last hidden states, which a server scores itself."""

from functools import cache
from typing import Any, Unpack

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.image_text import Backbone, ImageTextModel
from hfvlm.modeling.keywords import SERVER_KEYWORDS, Keywords


def replace_output_layer(model: Any, instead: nn.Module | None) -> None:
    """Take a language model's output layer out, with what is tied to it and the rules for it in parallel plans."""
    gone = {name for name, module in model.named_children() if module is model.get_output_embeddings()}
    model.set_output_embeddings(instead)
    model._tied_weights_keys, model.all_tied_weights_keys = None, {}
    for plan in ("_tp_plan", "_pp_plan"):
        rules = getattr(model, plan) or {}
        setattr(model, plan, {name: rule for name, rule in rules.items() if name not in gone})


class Headless:
    """Makes an `ImageTextModel` end with the language model's last norm. Parameters keep their names; the output layer
    has none."""

    language_model: Any

    def post_init(self) -> None:
        """Take the output layer out before tied weights and parallel plans are gathered."""
        replace_output_layer(self.language_model, nn.Identity())
        super().post_init()  # type: ignore[misc]

    @property
    def base_model(self) -> Any:
        return self

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Return the language model without its output layer, which servers compile."""
        return self.language_model.get_decoder()

    def get_output_embeddings(self) -> None:
        """Return None: there is no output layer."""

    def further_keywords(self, method: str) -> frozenset[str]:
        further = frozenset[str](super().further_keywords(method))  # type: ignore[misc]
        return further | SERVER_KEYWORDS if method == "forward" else further

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPast:
        """Run the language model over `(B, N)` ids or `(B, N, D)` embeddings, and media, as the whole model's forward
        takes them -> `last_hidden_state`, `(B, N, D)`, first."""
        whole: Any = self
        return Backbone(whole)(input_ids, inputs_embeds, **kwargs)


@cache
def headless(kind: type[ImageTextModel]) -> type[ImageTextModel]:
    """Return the class of a model without its output layer: `HfvlmLLaVAModel` of
    `HfvlmLLaVAForConditionalGeneration`."""
    name = kind.__name__.removesuffix("ForConditionalGeneration") + "Model"
    about = {"__module__": kind.__module__, "__doc__": f"{kind.__name__} without its output layer."}
    return type(name, (Headless, kind), about)
