"""The configuration every architecture builds on: fields all towers share, and their checks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from hfvlm.licences import stricter
from hfvlm.registry import load_for

T = TypeVar("T")

if TYPE_CHECKING:
    from typing import Annotated

    SubConfig = Annotated[T, "a nested configuration"]
else:

    class SubConfig:
        """`SubConfig[X]` annotates a nested configuration: type checkers read `X`, loading accepts X's dictionary."""

        def __class_getitem__(cls, _):
            return dict | PreTrainedConfig | None


@strict
class HfvlmConfig(PreTrainedConfig):
    """Base of every configuration.

    A composite names its towers' configurations in `sub_configs`, each with the class that a dictionary without a
    `model_type` becomes; a dictionary that names another registered `model_type` becomes that type's class.

    Args:
        initializer_range: standard deviation of new weights where the architecture does not say another.
        licence: of the weights that a model was made from, as the Hub spells it. It travels with what is fine-tuned
            from them and with each tower, and `push_to_hub` reads it. None for a model of one's own.
        preset: name of the released checkpoint that the weights were converted from; it travels likewise.
    """

    initializer_range: float = 0.02
    licence: str | None = None
    preset: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        load_for(self.model_type)
        for name, default in self.sub_configs.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                model_type = value.get("model_type", default.model_type)
                kind = default if model_type == default.model_type else AutoConfig.for_model(model_type).__class__
                setattr(self, name, kind(**value))
        self.pass_on_origin()
        super().__post_init__(**kwargs)

    def pass_on_origin(self) -> None:
        """Write where the weights are from, and their licence, into the towers' configurations.

        A tower of another origin, or under a licence of its own that asks for more, keeps it.
        """
        for part in (getattr(self, name) for name in self.sub_configs):
            if isinstance(part, HfvlmConfig):
                part.licence = stricter(part.licence, self.licence)
                part.preset = self.preset if part.preset is None else part.preset
                part.pass_on_origin()

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; a tower's part of a composite's takes the composite's licence and preset."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        part = config.get(cls.base_config_key)
        if isinstance(part, dict):
            part["licence"] = stricter(part.get("licence"), config.get("licence"))
            part["preset"] = config.get("preset") if part.get("preset") is None else part["preset"]
        return config, kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


@strict
class MultiEncoderConfig(HfvlmConfig):
    """A composite of towers of which a model may have some: the configuration of each of the others is None.

    A subclass names its towers in `sub_configs`, and in `towers` which of them embeds a modality:
    `{"audio": "audio_model"}` for one with an `audio_config`.

    Args:
        modalities: the towers of which to keep; by default all. Not a field: what it leaves out is gone, so
            `from_pretrained(folder, modalities=["image", "audio"])` neither builds nor reads the other towers.
    """

    towers: ClassVar[dict[str, str]]

    def __post_init__(self, modalities: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if modalities is None:
            return
        if unknown := [name for name in modalities if name not in self.modalities]:
            raise ValueError(
                f"{type(self).__name__} embeds no {', '.join(unknown)}; modalities may name "
                f"{', '.join(self.modalities)}."
            )
        kept = {config_of(self.towers[name]) for name in modalities}
        for name in self.sub_configs:
            if name not in kept:
                setattr(self, name, None)

    def validate_joint_space(self) -> None:
        towers = [getattr(self, name) for name in self.sub_configs]
        widths = {tower.model_type: tower.projection_dim for tower in towers if tower is not None}
        if len(set(widths.values())) > 1:
            raise ValueError(f"projection_dim differs: {widths}; the towers share one space.")

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a model of this configuration embeds."""
        return tuple(name for name, tower in self.towers.items() if getattr(self, config_of(tower)) is not None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "modalities" in kwargs:
            config_dict = config_dict | {"modalities": kwargs.pop("modalities")}
        return super().from_dict(config_dict, **kwargs)


def config_of(tower: str) -> str:
    """The field of the configuration for a tower: "audio_config" for "audio_model"."""
    return tower.removesuffix("_model") + "_config"


@strict
class TowerConfig(HfvlmConfig):
    """Sizes of one transformer tower. Defaults are those of the base models of the field."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0

    def validate_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; each head takes an equal share of the width."
            )


@strict
class VisionConfig(TowerConfig):
    """A tower over square patches of an image. `image_size` is one edge in pixels, or (height, width);
    `patch_dropout` is the share of patches that is left out in training."""

    base_config_key = "vision_config"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    patch_dropout: float | int = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; pixels that do not fill a patch are cut off, as a strided convolution does."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch_size, width // self.patch_size

    def validate_patches(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(
                f"{type(self).__name__}: image_size {self.image_size} is smaller than patch_size {self.patch_size}."
            )

    def validate_patch_dropout(self) -> None:
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"{type(self).__name__}: patch_dropout {self.patch_dropout} is no share in 0..1.")


@strict
class TextConfig(TowerConfig):
    """A tower over token ids."""

    base_config_key = "text_config"

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


@strict
class BertTextConfig(TextConfig):
    """A BERT. Without `type_vocab_size` there are no token types; `hidden_dropout` is on every branch, in training."""

    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-12
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    pad_token_id: int | None = 0
