"""Base classes of the models."""

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import OutputRecorder

from hfvlm.modeling.compat import CACHE_NAMES
from hfvlm.modeling.keywords import StrictKeywords, Unlisted
from hfvlm.modeling.outputs import TowerOutput
from hfvlm.modules.transformer import Attention, GroundingLayer, PreNormLayer
from hfvlm.presets.licences import check_model


def loss_without_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward whose loss `return_loss` turns on, and whose labels only add to it.

    transformers' Trainer takes every parameter with "label" in its name for one that batches must have before it
    computes a loss in evaluations. Where labels alone turn on the loss, set `label_names=["labels"]`.
    """
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(name=Unlisted(name)) if "label" in name else parameter
        for name, parameter in signature.parameters.items()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def loss_in_evaluations(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward whose batches always have a loss, with or without `return_loss`: Trainer, which otherwise
    evaluates without one, takes the default that the signature lists."""
    signature = inspect.signature(forward)
    listed = dict(signature.parameters) | {"return_loss": signature.parameters["return_loss"].replace(default=True)}
    forward.__signature__ = signature.replace(parameters=list(listed.values()))  # type: ignore[attr-defined]
    return forward


def other_towers(own: str) -> list[str]:
    """Return patterns of the keys that a tower leaves unused in its composite's file."""
    return [rf"^(?!{own}\.)\w+_model\.", r"^(logit_scales?|classifier|projector|resampler|gates|score)\."]


# Attention weights of the layers of a tower, not those of its pooling head.
LAYER_ATTENTIONS = OutputRecorder(Attention, index=1, layer_name="layers")


HALF = (torch.float16, torch.bfloat16)


class EveryModule:
    """Makes transformers initialise every module. In what it calls custom code, it passes over those without
    parameters of their own, such as the layers of CLIP, or of a language model, which initialise their parts."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).requires_grad_()


class HfvlmPreTrainedModel(StrictKeywords, EveryModule, PreTrainedModel):
    """Base of every model and tower."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _no_split_modules = ["PreNormLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PreNormLayer, "attentions": LAYER_ATTENTIONS}
    # Of a tower: it pools one token, and its forward takes `pooled_only`, by which the last layer computes that alone.
    pools_one_token: ClassVar[bool] = False
    # Children that no loss trains: gradient checkpointing leaves them out.
    frozen_modules: tuple[str, ...] = ()

    def further_keywords(self, method: str) -> Collection[str]:
        return ("pooled_only",) if method == "forward" and self.pools_one_token else ()

    def features(self, *inputs: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed the inputs of a tower's forward, with the joint embedding where every `get_*_features` has it."""
        return as_features(self(*inputs, **kwargs), pooled_only=kwargs.get("pooled_only", False))

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in (module for name in self.frozen_modules for module in self.get_submodule(name).modules()):
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", False)  # noqa: B010  (nn.Module's own type)

    def enable_input_require_grads(self) -> None:
        """Do as transformers does, also for embeddings that return their grid beside their tokens, as Swin's."""
        models = (module for module in self.modules() if isinstance(module, PreTrainedModel))
        embeddings = {id(module): module for module in map(_input_embeddings, models) if module is not None}
        self._require_grads_hooks = [each.register_forward_hook(_require_grad) for each in embeddings.values()]
        self._require_grads_hook = self._require_grads_hooks[0]

    def post_init(self) -> None:
        """Initialise, with temperatures and what else is to stay exact in float32 from the start, as
        `from_pretrained` leaves it."""
        exact = tuple(self._keep_in_fp32_modules_strict or ())
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in exact and any(x.dtype in HALF for x in module.parameters()):
                module.float()
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module; parts with bare parameters do it themselves, in `init_own_weights`."""
        super()._init_weights(module)
        if hasattr(module, "init_own_weights"):
            getattr(module, "init_own_weights")(self.config.initializer_range)  # noqa: B009  (nn.Module's own type)

    # Set on a model whose licence was read, where the Trainer or PEFT push it.
    licence_accepted: bool = False

    def push_to_hub(self, repo_id: str, *, accept_licence: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Do what transformers' does, with hfvlm's card, if the licence of the weights allows it.

        Raises:
            LicenceError: it is non-commercial, special or unknown, and `accept_licence` is off.
        """
        check_model(self, accepted=accept_licence)
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,  # noqa: FBT001, FBT002 (transformers' signature)
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
        *args: Any,
        accept_licence: bool = False,
        **kwargs: Any,
    ) -> None:
        """Do what transformers' does; with `push_to_hub`, as `HfvlmPreTrainedModel.push_to_hub`.

        Raises:
            LicenceError: see `push_to_hub`.
        """
        if push_to_hub:
            check_model(self, accepted=accept_licence)
        super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Complete the card: the one step that all of transformers' uploads of a model share."""
        from hfvlm.presets.cards import complete_card

        complete_card(Path(working_dir) / "README.md", self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


class DepthScaledModel(HfvlmPreTrainedModel):
    """Base of models that begin as CLIP's: residual branches shrink with depth."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PreNormLayer | GroundingLayer):
            width, depth = self.config.hidden_size, self.config.num_hidden_layers
            for projection in (module.attention.q_proj, module.attention.k_proj, module.attention.v_proj):
                init.normal_(projection.weight, std=width**-0.5)
            init.normal_(module.mlp.fc1.weight, std=(2 * width) ** -0.5)
            for projection in (module.attention.out_proj, module.mlp.fc2):
                init.normal_(projection.weight, std=(2 * width * depth) ** -0.5)


def unit(features: Tensor | None) -> Tensor:
    """Normalise features `(B, D)` to length one."""
    if features is None:
        raise ValueError("The tower returned no embedding.")
    return F.normalize(features, dim=-1)


def records(config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a forward returns what its layers compute, by its keywords or by its configuration."""
    flags = ("output_hidden_states", "output_attentions")
    values = [value for flag in flags for value in (kwargs.get(flag), getattr(config, flag, None))]
    return any(value is not None and value is not False for value in values)


def for_pooled(tower: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Complete a tower's keywords where its tokens are not wanted: what only they need is left out, if it can be."""
    if getattr(tower, "pools_one_token", False) and not records(tower.config, kwargs):
        return kwargs | {"pooled_only": True}
    return kwargs


def as_features(output: TowerOutput, *, pooled_only: bool = False) -> BaseModelOutputWithPooling:
    """Return a tower's output with the joint embedding where every `get_*_features` has it; with `pooled_only` it has
    no tokens."""
    return BaseModelOutputWithPooling(
        last_hidden_state=None if pooled_only else output.last_hidden_state,
        pooler_output=output.embeds,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )
