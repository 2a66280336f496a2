"""The embeddings of labels, cached by the zero-shot pipelines between calls."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hfvlm.modeling.dual_encoder import ContrastiveModel

MOST_BYTES = 2**28
# Fields of a tower's output that no score depends on.
PER_TOKEN = ("last_hidden_state", "hidden_states", "attentions")


class RecentlyUsed:
    """Mappings of tensors by key; the least recently used make room for others when all exceed `MOST_BYTES`."""

    def __init__(self) -> None:
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the entry of a key, made where there is none."""
        if key not in self.entries:
            self.entries[key] = make()
        self.entries.move_to_end(key)
        while len(self.entries) > 1 and sum(map(nbytes, self.entries.values())) > MOST_BYTES:
            self.entries.popitem(last=False)
        return self.entries[key]


class LabelCache(RecentlyUsed):
    """Features of texts by their token ids, of one state of a model's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Hashable = None

    def features(self, model: Any, inputs: Mapping[str, Tensor]) -> BaseModelOutputWithPooling | None:
        """Return a model's features of tokenized texts, without those of each token; None if it is not `cacheable`."""
        if not cacheable(model):
            return None
        state = weights_state(model)
        if state != self.state:
            self.entries.clear()
            self.state = state
        return self.get(content(inputs), lambda: pooled(model.embed_texts(**inputs)))


def cacheable(model: Any) -> bool:
    """Decide whether texts' features depend on inputs and weights alone, and no one observes how they are computed.

    Training, gradients, autocast, hooks, replaced or compiled forwards, adapters and weights that are elsewhere or
    quantised are reasons against it.
    """
    dual = isinstance(model, ContrastiveModel)
    if (
        not dual
        or "text" not in model.towers
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(model.device.type)
    ):
        return False
    modules = [model, *text_modules(model)]
    return all(map(is_plain_module, modules)) and all(map(is_plain_tensor, tensors(modules)))


def text_modules(model: Any) -> list[nn.Module]:
    """Return a model's modules but the towers of other modalities and itself."""
    others = set(model.towers.values()) - {model.towers["text"]}
    return [part for name, child in model.named_children() if name not in others for part in child.modules()]


def is_plain_module(module: nn.Module) -> bool:
    """Decide whether a call of a module is its class's forward, and nothing more."""
    observed = module._forward_hooks or module._forward_pre_hooks
    changed = "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None
    return not (module.training or observed or changed or type(module).__module__.startswith("peft."))


def is_plain_tensor(tensor: Tensor) -> bool:
    """Decide whether `weights_state` can read a tensor."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() and tensor.device.type != "meta"


def tensors(modules: list[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of modules."""
    return [x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]


def weights_state(model: Any) -> Hashable:
    """Describe the weights that texts' features depend on; equal while they are unchanged.

    Fused optimizers and `parameter.data` change values without a new version, so the bits are added up as well, which
    takes a hundredth of a second for the text tower of CLIP ViT-B/32.
    """
    weights = tensors([model, *text_modules(model)])
    versions = tuple((x._version, x.data_ptr(), x.dtype, x.device, x.shape) for x in weights)
    sums: dict[torch.device, list[Tensor]] = {}
    for x in weights:
        sums.setdefault(x.device, []).append(bits(x).sum())
    return versions, tuple(value for group in sums.values() for value in torch.stack(group).tolist())


def bits(tensor: Tensor) -> Tensor:
    """View a tensor's values as integers, as wide as its size allows."""
    flat = tensor.detach().reshape(-1)
    aligned = flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0
    return flat.view(torch.int64 if aligned else torch.uint8)


def content(inputs: Mapping[str, Tensor]) -> Hashable:
    """Return a key of tensors by name: their shapes and values."""
    return tuple((name, x.dtype, x.shape, as_bytes(x)) for name, x in sorted(inputs.items()))


def as_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def pooled(features: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
    """Copy the fields of features that scores depend on."""
    return type(features)(**{name: x.clone() for name, x in features.items() if name not in PER_TOKEN})


def nbytes(entry: Mapping[str, Tensor]) -> int:
    """Count the bytes of the tensors in an entry."""
    return sum(x.nbytes for x in entry.values())
