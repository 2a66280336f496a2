"""Layers of transformers' language models whose inputs are changed before them: the models have no argument for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# Where transformers' models name how their modules are split among devices.
PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")


class WrappedLayer(nn.Module):
    """A layer that is unchanged, but within `before_layers`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.before: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(x if self.before is None else self.before(x), *args, **kwargs)


@contextmanager
def before_layers(model: PreTrainedModel, functions: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Apply functions to the inputs of wrapped layers, by the layers' indices, within this context."""
    layers: Any = decoder_layers(model)
    try:
        for i, function in functions.items():
            layers[i].before = function
        yield
    finally:
        for layer in layers:
            layer.before = None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a language model of transformers: its first list that is as long as the model is deep."""
    depth = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    return next(lists)


def wrap_layers(model: PreTrainedModel) -> None:
    """Wrap each layer of a language model, and rename the modules inside in its plans for several devices."""
    layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        layers[i] = WrappedLayer(layer)
    path = next(name for name, module in model.named_modules() if module is layers)
    for owner, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and f".{path}".startswith(f".{owner}." if owner else "."):
            inside = path.removeprefix(f"{owner}.") if owner else path
            for plan in PLANS:
                entries: dict[str, Any] = getattr(module, plan, None) or {}
                setattr(module, plan, {_within_wrapped(key, inside): value for key, value in entries.items()})


def _within_wrapped(key: str, layers: str) -> str:
    """Name a module inside a layer, such as `layers.*.mlp`, as it is called in the wrapped layer."""
    within = f"{layers}.*."
    return f"{within}layer.{key.removeprefix(within)}" if key.startswith(within) else key
