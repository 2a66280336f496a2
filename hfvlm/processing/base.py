"""Base classes of the processors: a part for each kind of input, side by side."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs

from hfvlm.checks.keywords import check_keywords, parameters
from hfvlm.processing.batches import is_empty
from hfvlm.processing.publishing import Published
from hfvlm.processing.settings import LOADING, STORED, Checked, Settings, sharing
from hfvlm.processing.tokenization import TOKENIZER_ARGUMENTS, HfvlmTokenizer

# transformers' names of the options of each kind of input.
GROUPS: dict[str, frozenset[str]] = {
    "text": frozenset(TextKwargs.__annotations__),
    "images": frozenset(ImagesKwargs.__annotations__),
    "videos": frozenset(VideosKwargs.__annotations__),
    "audio": frozenset(AudioKwargs.__annotations__),
}


def call_keywords(part: Any) -> frozenset[str]:
    """Return the keywords that a call of a part knows: hfvlm's, or transformers' own image processor or tokenizer."""
    if part is None:
        return frozenset()
    if isinstance(part, Settings):
        return part.call_keywords()
    if isinstance(part, PreTrainedTokenizerBase):
        return TOKENIZER_ARGUMENTS
    known = getattr(part, "valid_kwargs", None)
    return frozenset(known.__annotations__ if known else set().union(*GROUPS.values()))


class HfvlmProcessor(Published, Checked, ProcessorMixin):
    """Base of every processor: `parts` names the part that prepares a modality, and the constructor's other arguments
    are annotated with their checks."""

    parts: dict[str, str] = {"image": "image_processor", "text": "tokenizer"}

    def __init__(self, *parts: Any, **kwargs: Any):
        check_keywords(self, kwargs, self.arguments(), {*STORED, *LOADING})
        super().__init__(*parts, **{k: v for k, v in kwargs.items() if k not in {*STORED, *LOADING}})

    @classmethod
    def arguments(cls) -> frozenset[str]:
        """Return the names of the constructor's arguments."""
        return parameters(cls.__init__) | {"chat_template", "audio_tokenizer", *cls.get_attributes()}

    def set_arguments(self, **arguments: Any) -> None:
        """Set the arguments of a constructor.

        Raises:
            ValueError: naming the argument and what it must be.
        """
        for name, value in arguments.items():
            setattr(self, name, self.checked_value(name, value))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; settings of the parts may be given, too.

        Raises:
            TypeError: a keyword that neither the processor nor a part of it knows.
            ValueError: processor_config.json holds no settings, or wrong ones.
        """
        with sharing(kwargs):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if not kwargs.get("return_unused_kwargs"):
            parts = [getattr(loaded, name) for name in cls.get_attributes()]
            settings = {name for part in parts if isinstance(part, Settings) for name in part.SETTINGS}
            given = [name for name in kwargs if not name.endswith("_token")]
            standing = {*HfvlmTokenizer.known_settings(), "return_unused_kwargs"}
            check_keywords(cls, given, {*settings, *cls.arguments()}, standing)
        return loaded

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Read as transformers does.

        Raises:
            ValueError: processor_config.json is no JSON object.
        """
        try:
            fields, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError) as error:
            raise _no_object(pretrained_model_name_or_path) from error
        if not isinstance(fields, Mapping):
            raise _no_object(pretrained_model_name_or_path)
        return dict(fields), rest

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor as transformers does.

        Raises:
            TypeError: processor_config.json names an argument that the processor does not have.
        """
        name = f"{cls.__name__} (processor_config.json)"
        check_keywords(name, processor_dict, cls.arguments(), {*STORED, *LOADING})
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have a part."""
        return tuple(name for name, part in self.parts.items() if getattr(self, part, None) is not None)

    def prepare(self, modality: str, sources: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Prepare sources of one modality -> the inputs of the model's `get_<modality>_features`.

        Args:
            modality: one of `modalities`.
            sources: one or a list.
            return_tensors: "pt", "np", or None for lists.
            **options: of the part.

        Raises:
            ValueError: the processor has no part for the modality.
        """
        if modality not in self.modalities:
            raise ValueError(f"{type(self).__name__} prepares {', '.join(self.modalities)}, not {modality}.")
        part = getattr(self, self.parts[modality])
        return BatchFeature(dict(part(sources, **{"return_tensors": return_tensors} | options)))

    def options_of(
        self, kwargs: Mapping[str, Any], known: Mapping[str, Collection[str]], flat: Collection[str]
    ) -> dict[str, dict[str, Any]]:
        """Sort the keywords of a call by the group of inputs that they are options of.

        Args:
            kwargs: of the call. `<group>_kwargs` are one group's, `common_kwargs` those of all that know them; any
                other keyword is an option of the first of the groups `flat` that knows it.
            known: keywords by group ("images", "text", ...).
            flat: groups.

        Raises:
            TypeError: a keyword that no group knows, naming the nearest one.
            ValueError: a keyword that is given twice, by itself and among those of its group.
        """
        rest, name, options = dict(kwargs), type(self).__name__, dict[str, dict[str, Any]]()
        common = dict(rest.pop("common_kwargs", None) or {})
        for group in dict.fromkeys([*known, *GROUPS]):
            options[group] = dict(rest.pop(f"{group}_kwargs", None) or {})
            words = known[group] if group in known else GROUPS[group]
            check_keywords(f"{name}, {group}_kwargs", options[group], words)
        groups = [f"{group}_kwargs" for group in options]
        check_keywords(self, rest, {*(word for group in flat for word in known[group]), *groups})
        check_keywords(f"{name}, common_kwargs", common, set().union(*known.values()))
        for word, value in rest.items():
            first = next(group for group in flat if word in known[group])
            if word in options[first]:
                raise ValueError(f"{name} got {word} twice, by itself and in {first}_kwargs.")
            options[first][word] = value
        for group, words in known.items():
            options[group] = {word: value for word, value in common.items() if word in words} | options[group]
        return options

    def check_licence(self, *places: Any) -> None:
        """Check the licences of the processor's origins, and of its parts'.

        Raises:
            LicenceError: one is not open.
        """
        parts = [getattr(self, name, None) for name in self.get_attributes()]
        super().check_licence(*places, *(origin for part in parts for origin in getattr(part, "origins", ())))

    def asked(self, question: str) -> str:
        """Return the prompt of a question about one image, as the model was trained on it."""
        return question

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """Find the class behind a name in processor_config.json; transformers searches native classes only."""
        from hfvlm.registry import find_class

        return find_class(module_name) or ProcessorMixin.get_possibly_dynamic_module(module_name)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Do nothing: hfvlm is installed code, and a module of it copied next to the weights could not import."""


def _no_object(folder: Any) -> ValueError:
    return ValueError(f"{folder}/processor_config.json: no JSON object with a processor's settings; convert again.")


class DualEncoderProcessor(HfvlmProcessor):
    """An image processor and a tokenizer side by side."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both -> the model's inputs.

        Args:
            images: one image or a list; see `hfvlm.media.read_image` for what an image may be.
            text: one text or a list.
            **kwargs: `return_tensors`, "pt", "np", or None for lists; `images_kwargs`, settings of the image processor
                for this call; `text_kwargs`, arguments of the tokenizer; either of these, sorted by name;
                `common_kwargs` of both.

        Raises:
            MediaError: an image cannot be read; the message names it.
            TypeError: a keyword that neither part knows.
            ValueError: nothing is given, or an empty list.
        """
        for name in ("videos", "audio", "audios"):
            if not is_empty(kwargs.pop(name, None)):
                raise ValueError(f"{type(self).__name__} prepares images and text, not {name}.")
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} needs images, text or both.")
        return_tensors = kwargs.pop("return_tensors", "pt")
        known = {"images": call_keywords(self.image_processor), "text": call_keywords(self.tokenizer)}
        options = self.options_of(kwargs, known, flat=("images", "text"))
        data: dict[str, Any] = {}
        if text is not None:
            data |= self.tokenizer(text, **{"return_tensors": return_tensors} | options["text"])
        if images is not None:
            data |= self.image_processor(images, **{"return_tensors": return_tensors} | options["images"])
        return BatchFeature(data, tensor_type=return_tensors)


class MultiEncoderProcessor(HfvlmProcessor):
    """A part for each modality, side by side; a modality without one is refused."""

    parts = {
        "image": "image_processor",
        "video": "video_feature_extractor",
        "text": "tokenizer",
        "audio": "feature_extractor",
        "depth": "depth_feature_extractor",
        "thermal": "thermal_feature_extractor",
        "imu": "imu_feature_extractor",
    }

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        depth: Any = None,
        thermal: Any = None,
        imu: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare inputs of any modalities -> the model's inputs.

        Args:
            images: one or a list, as `hfvlm.media.read_image` reads them.
            text: one or a list.
            videos: one or a list, see `read_video`.
            audio: one or a list, see `read_audio`.
            depth: one or a list, see `read_depth`.
            thermal: one or a list, see `read_thermal`.
            imu: one or a list, see `read_imu`.
            **kwargs: `return_tensors`, "pt", "np", or None for lists; `allow_urls`, to fetch `http(s)` URLs: True for
                every public host, or the names of the hosts; `images_kwargs`, `text_kwargs`, `videos_kwargs`,
                `audio_kwargs`, `depth_kwargs`, `thermal_kwargs` and `imu_kwargs`, options of each part for this call:
                `audio_kwargs={"sampling_rate": 44_100}`; `common_kwargs`, of all. All else goes to the tokenizer.

        Raises:
            MediaError: a source cannot be read; the message names it.
            TypeError: a keyword that no part knows.
            ValueError: nothing is given, or an empty list, or an input that the processor has no part for.
        """
        names = ("images", "text", "videos", "audio", "depth", "thermal", "imu")
        given = dict(zip(names, (images, text, videos, audio, depth, thermal, imu), strict=True))
        if all(sources is None for sources in given.values()):
            raise ValueError(f"{type(self).__name__} needs one of {', '.join(names)}.")
        modalities = {name: name.removesuffix("s") for name in names}
        known = {name: call_keywords(getattr(self, self.parts[modalities[name]], None)) for name in names}
        return_tensors, allow_urls = kwargs.pop("return_tensors", "pt"), kwargs.pop("allow_urls", False)
        options = self.options_of(kwargs, known, flat=("text",))
        data: dict[str, Any] = {}
        for name, sources in given.items():
            if sources is not None:
                shared = {"return_tensors": return_tensors} | ({} if name == "text" else {"allow_urls": allow_urls})
                data |= self.prepare(modalities[name], sources, **shared | options[name])
        return BatchFeature(data)
