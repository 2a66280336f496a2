"""The configuration every architecture builds on: fields all towers share, and their checks."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hfvlm.checks.messages import LONGEST_NAME, cut, shown

T = TypeVar("T")

# Called with the `model_type` of each configuration before it is made.
before_use: list[Callable[[str], None]] = []

if TYPE_CHECKING:
    from typing import Annotated

    SubConfig = Annotated[T, "a nested configuration"]
else:

    class SubConfig:
        """`SubConfig[X]` annotates a nested configuration: type checkers read `X`, loading accepts X's dictionary."""

        def __class_getitem__(cls, _):
            return PreTrainedConfig | dict | None  # in this order: a mismatch of huggingface_hub prints the value


class ConfigurationError(StrictDataclassError, ValueError):
    """A configuration that no model can be made of; the message names the field and what it may be."""

    def __init__(self, message: str = ""):
        super().__init__(cut(message))


class _Range(NamedTuple):
    """What numbers a field may be, the ends included."""

    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"from {self.lowest:g} to {self.highest:,.0f}"


COUNT, COUNT_OR_NONE, LAYERS, SHARE = _Range(1, 2**24), _Range(0, 2**24), _Range(1, 2**10), _Range(0, 1)
NUMBER, TOKEN = _Range(-(2**31), 2**31), _Range(0, 2**31)
# Beginnings and ends of fields' names, the first that fits. A count of layers may be zero where a release has none.
RANGES = {
    r"(type_vocab|queue)_size|num_hidden_layers|projector_depth": COUNT_OR_NONE,
    r"(.*_)?(depths?|num_block_repeats|.*_layers)": LAYERS,
    r".*_(size|sizes|dim|length|divisor|channels|frequency|embeddings|ratios)|num_.*|strides": COUNT,
    r".*_eps|.*dropout.*|.*_(rate|smoothing|share)|momentum|distillation": SHARE,
    r".*_token_id": TOKEN,
}
# As the Hub spells them: whose texts let anybody publish the weights, also for money and changed.
OPEN = frozenset(
    """
    apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc 0bsd zlib ncsa postgresql bsl-1.0 ms-pl
    unlicense wtfpl cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 pddl odc-by odbl
    cdla-permissive-1.0 cdla-permissive-2.0 mpl-2.0 epl-1.0 epl-2.0 ecl-2.0 eupl-1.1 eupl-1.2 afl-3.0 artistic-2.0
    osl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0
    """.split()  # noqa: SIM905
)
FOREIGN = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))


@cache
def _range_of(name: str) -> _Range:
    return next((allowed for pattern, allowed in RANGES.items() if re.fullmatch(pattern, name)), NUMBER)


def check_fields(config: PreTrainedConfig) -> None:
    """Refuse numbers that no model can have, and activations that there are not, by the field's name.

    Raises:
        ConfigurationError: it says what the field may be.
    """
    for field in dataclasses.fields(config):
        if field.name in FOREIGN:
            continue
        value, name = getattr(config, field.name), f"{type(config).__name__}: {field.name}"
        if isinstance(value, str) and field.name.endswith("_act"):
            check_activation(name, value)
        for number in value if isinstance(value, list | tuple) else (value,):
            allowed = _range_of(field.name)
            numeric = isinstance(number, int | float) and not isinstance(number, bool)
            if numeric and not allowed.lowest <= number <= allowed.highest:
                raise ConfigurationError(f"{name} must be {allowed}, not {shown(number)}.")


def check_activation(name: str, value: str) -> None:
    from transformers.activations import ACT2FN

    if value not in ACT2FN:
        near = difflib.get_close_matches(value[:LONGEST_NAME], ACT2FN, n=1, cutoff=0.0)
        raise ConfigurationError(
            f"{name} {shown(value)} is unknown. Did you mean {near[0]!r}? There are {', '.join(ACT2FN)}."
        )


def foreign(model_type: str, values: Mapping[str, Any]) -> Any:
    """Make a configuration of transformers' own, whose versions differ in declaring a switch as bool or as int."""
    kind = CONFIG_MAPPING[model_type]
    declared: dict[str, Any] = {each.name: each for each in dataclasses.fields(kind) if each.type in (bool, int)}
    for each in declared.values():
        if each.type is int and isinstance(each.default, bool):
            each.default = int(each.default)  # transformers 5.4 refuses this default of its own
    given = {name: value for name, value in values.items() if name in declared and value in (0, 1)}
    return kind(**dict(values) | {name: declared[name].type(value) for name, value in given.items()})


def joint_size(tower: Any) -> int:
    """Return the width of a tower's embeddings: of its projection, or without one of its pooled output."""
    width = getattr(tower, "projection_dim", None)
    return tower.pooled_size if width is None else width


class LicenceError(PermissionError):
    """Weights that must not be published without a decision of the user."""


def is_open(licence: Any) -> bool:
    """Whether a licence, in any case and spelling, is known to let anybody publish."""
    return isinstance(licence, str) and "-".join(licence.casefold().replace("_", " ").split()) in OPEN


def stricter(part: str | None, whole: str | None) -> str | None:
    """Return the whole's licence for one of its parts, or the part's own where that is not open and the whole's is."""
    return part if whole is None or (part is not None and not is_open(part) and is_open(whole)) else whole


def check_licence(licence: str | None, *, accepted: bool, source: str = "") -> None:
    """Let own weights and those of open licences pass; others only if the user says to have read the licence.

    Args:
        licence: as the Hub spells it; None for weights of one's own.
        accepted: the user has read what came with the weights.
        source: what names the licence, for the message.

    Raises:
        LicenceError: the licence is non-commercial, special or unknown, and `accepted` is off.
    """
    if accepted or licence is None or is_open(licence):
        return
    said = f" ({source})" if source else ""
    raise LicenceError(
        f"The weights' licence is {licence!r}{said}: read what came with them, then say so with accept_licence=True "
        "(--i-have-read-the-licence on the command line, model.licence_accepted = True for a Trainer)."
    )


@strict
class HfvlmConfig(PreTrainedConfig):
    """Base of every configuration.

    A composite names its towers' configurations in `sub_configs`, each with the class that a dictionary without a
    `model_type` becomes; a dictionary that names another registered `model_type` becomes that type's class. Where a
    tower may be any model of transformers, `trunks` has the class that its configuration becomes part of.

    Args:
        initializer_range: standard deviation of new weights where the architecture does not say another.
        licence: of the weights that a model was made from, as the Hub spells it. It travels with what is fine-tuned
            from them and with each tower, and `push_to_hub` reads it. None for a model of one's own.
        preset: name of the released checkpoint that the weights were converted from; it travels likewise.
    """

    trunks: ClassVar[Mapping[str, Any]] = {}

    initializer_range: float = 0.02
    licence: str | None = None
    preset: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for action in before_use:
            action(self.model_type)
        check_fields(self)
        for name, default in self.sub_configs.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                model_type = value.get("model_type", default.model_type)
                own = model_type == default.model_type
                setattr(self, name, default(**value) if own else foreign(model_type, value))
        self.make_towers()
        self.pass_on_origin()
        super().__post_init__(**kwargs)

    def make_towers(self) -> None:
        """Make each configuration of transformers' own that of a tower, as wide as the other towers' joint space."""
        parts = {name: getattr(self, name) for name in self.sub_configs if self.trunks}
        widths = [joint_size(part) for part in parts.values() if isinstance(part, HfvlmConfig)] or [512]
        for name, kind in self.trunks.items():
            if not isinstance(parts[name], HfvlmConfig):
                setattr(self, name, kind(trunk_config=parts[name], projection_dim=widths[0]))

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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' configurations; what makes no sense is refused by a `ConfigurationError`."""
        try:
            return super().from_dict(config_dict, **kwargs)
        except ConfigurationError:
            raise
        except Exception as error:  # foreign values can make no sense in every way
            reason = " ".join(cut(str(error), 600).split()) or type(error).__name__
            raise ConfigurationError(f"config.json, as {cls.__name__}: {reason}") from error

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


@strict
class DualEncoderConfig(HfvlmConfig):
    """A composite of a vision tower and a text tower whose `projection_dim` is the width of their joint space.

    Args:
        logit_scale_init_value: logarithm of the temperature's inverse before training.
    """

    # Each architecture has defaults of its own; transformers 5.4 needs one here as well.
    vision_config: Any = None
    text_config: Any = None
    logit_scale_init_value: float = 2.6592

    def validate_joint_space(self) -> None:
        image, text = joint_size(self.vision_config), joint_size(self.text_config)
        if image != text:
            raise ValueError(f"projection_dim differs: {image} in vision_config, {text} in text_config.")


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
        self.check_heads("hidden_size", "num_attention_heads")

    def check_heads(self, width: str, heads: str) -> None:
        """Refuse a width that heads cannot share.

        Raises:
            ValueError: naming both fields.
        """
        if getattr(self, heads) < 1 or getattr(self, width) % getattr(self, heads):
            raise ValueError(
                f"{type(self).__name__}: {width} {getattr(self, width)} is not a multiple of {heads} "
                f"{getattr(self, heads)}; each head takes an equal share of the width."
            )

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output that a classifier takes."""
        return self.hidden_size

    def check_layer(self, index: int) -> None:
        """Raise a ValueError where a language model cannot attend to this hidden state: there is none."""
        if not -self.num_hidden_layers - 1 <= index <= self.num_hidden_layers:
            raise ValueError(
                f"vision_feature_layer {index} is no hidden state of a tower of {self.num_hidden_layers} layers."
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

    @property
    def patch_count(self) -> int:
        """Patches of an image."""
        rows, columns = self.grid
        return rows * columns

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
