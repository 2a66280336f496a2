"""Whether what hfvlm computes is right with the packages that are installed: a small random model of each architecture
that generates, in a few seconds.

A model is right if it generates the same ids with a cache as without one, if these are what one forward over the whole
text predicts, if its attention implementations agree, and if it is the same after saving and loading.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from hfvlm.modeling.captioning import CaptioningModel
from hfvlm.presets import load_preset

NEW_TOKENS = 3
# Of the largest value, in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A class of an architecture, in the sizes of its preset `tiny`, with changes of the parts' configurations."""

    name: str
    architecture: str
    model_class: str
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


CAPTIONER = {"text_config": {"vocab_size": 60, "bos_token_id": 58, "encoder_token_id": 59, "eos_token_id": 3}}
FIRST_STAGE = {"qformer_config": {"vocab_size": 60, "bos_token_id": 59, "eos_token_id": 3, "projection_dim": 32}}
T5 = {
    "model_type": "t5",
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
ONE_LAYER = {"num_hidden_layers": 1}
CASES = (
    Case("blip", "blip", "HfvlmBLIPForConditionalGeneration", CAPTIONER),
    Case("blip2 (first stage)", "blip2", "HfvlmBLIP2ForPreTraining", FIRST_STAGE),
    Case("blip2 (OPT)", "blip2", "HfvlmBLIP2ForConditionalGeneration"),
    Case("blip2 (T5)", "blip2", "HfvlmBLIP2T5ForConditionalGeneration", {"text_config": T5}),
    Case("coca", "coca", "HfvlmCoCaModel"),
    Case("dalle_mini", "dalle_mini", "HfvlmDALLEMiniForConditionalGeneration"),
    Case("flamingo", "flamingo", "HfvlmFlamingoForConditionalGeneration", {"resampler_config": ONE_LAYER}),
    Case("llava", "llava", "HfvlmLLaVAForConditionalGeneration"),
    Case("mammut", "mammut", "HfvlmMaMMUTModel"),
    Case("pali", "pali", "HfvlmPaLIForConditionalGeneration"),
    Case("paligemma", "paligemma", "HfvlmPaliGemmaForConditionalGeneration"),
    Case("pg_video_llava", "pg_video_llava", "HfvlmPGVideoLLaVAForConditionalGeneration"),
    Case("qwen_vl", "qwen_vl", "HfvlmQwenVLForConditionalGeneration"),
    Case("shikra", "shikra", "HfvlmShikraForConditionalGeneration"),
    Case("video_chatgpt", "video_chatgpt", "HfvlmVideoChatGPTForConditionalGeneration"),
)


@dataclass(frozen=True)
class Result:
    """What one case came to: `failures` is empty where all is right."""

    name: str
    failures: list[str]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.failures


def run(cases: Sequence[Case] = CASES, report: Callable[[Result], None] = lambda _: None) -> list[Result]:
    """Test the architectures one after the other; `report` gets each result as it comes."""
    results = []
    with quiet(), one_thread(), torch.random.fork_rng(devices=[]), torch.inference_mode():
        for case in cases:
            begin = time.perf_counter()
            failures = failures_of(case)
            results.append(Result(case.name, failures, time.perf_counter() - begin))
            report(results[-1])
    return results


def failures_of(case: Case) -> list[str]:
    try:
        torch.manual_seed(0)
        model = small_model(case)
        return list(wrongs(model, subject_of(model)))
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"]


def subject_of(model: Any) -> Any:
    """Say how a model is asked."""
    if hasattr(model, "image_decoder"):
        return Drawer(model)
    return Captioner(model) if hasattr(model, "read") and not hasattr(model, "language_model") else Chat(model)


def small_model(case: Case) -> PreTrainedModel:
    """Build the model with weights that are large enough for every part to matter."""
    preset = load_preset(f"{case.architecture}/tiny")
    sizes: dict[str, Any] = {**preset.config, "architectures": [case.model_class]}
    for part, changes in case.changes.items():
        known = sizes.get(part, {})
        sizes[part] = (known if changes.get("model_type") in (None, known.get("model_type")) else {}) | changes
    model = AutoModel.from_config(replace(preset, config=sizes).make_config()).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.2 * noise)
        elif "embed" in name or "token" in name or "position" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(1.5 * noise * parameter[0].numel() ** -0.5)
    return model


class Captioner:
    """A model whose texts begin with a start token."""

    def __init__(self, model: Any):
        size = model.config.vision_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        self.model, self.pixels = model, torch.randn(2, 3, height, width)

    def generate(self, **options: Any) -> Any:
        return self.model.generate(self.pixels, eos_token_id=None, **options)

    def logits(self, ids: Tensor) -> Tensor:
        decoder = self.model.text_decoder if isinstance(self.model, CaptioningModel) else self.model
        context = self.model.read(self.pixels)
        return decoder(input_ids=ids[:, :-1], context=context).logits


class Drawer:
    """A model that generates an image's codes from a text."""

    def __init__(self, model: Any):
        self.model, self.ids = model, torch.randint(5, 50, (2, 6))
        model.codec = None  # with it, no other ids than its codes are generated

    def generate(self, **options: Any) -> Any:
        mask = torch.ones_like(self.ids)
        return self.model.generate(self.ids, mask, guidance_scale=1, eos_token_id=None, **options)

    def logits(self, ids: Tensor) -> Tensor:
        mask = torch.ones_like(self.ids)
        return self.model(self.ids, mask, decoder_input_ids=ids[:, :-1]).logits


class Chat:
    """A language model that reads images or videos among texts."""

    def __init__(self, model: Any):
        self.model = model
        size = model.config.vision_config.image_size
        self.modality = next(iter(model.media_inputs))
        frames = (2, 4) if self.modality == "video" else (2,)
        self.media = {model.media_inputs[self.modality][0]: torch.randn(*frames, 3, size, size)}
        features = getattr(model, f"get_{self.modality}_features")(**self.media).pooler_output
        count = model.count_placeholders(features[0])
        words = torch.randint(5, 50, (2, 6))
        places = torch.full((2, count), getattr(model.config, f"{self.modality}_token_id"))
        self.ids = torch.cat([words[:, :2], places, words[:, 2:]], dim=1)

    def generate(self, **options: Any) -> Any:
        mask = torch.ones_like(self.ids)
        return self.model.generate(
            input_ids=self.ids, attention_mask=mask, **self.media, eos_token_id=None, pad_token_id=0, **options
        )

    def logits(self, ids: Tensor) -> Tensor:
        if self.model.config.is_encoder_decoder:
            return self.model(input_ids=self.ids, decoder_input_ids=ids[:, :-1], **self.media).logits
        bidirectional = "prefix_length" in self.model.further_keywords("forward")
        prefix = {"prefix_length": self.ids.shape[1]} if bidirectional else {}
        return self.model(input_ids=ids[:, :-1], **self.media, **prefix).logits


def wrongs(model: Any, subject: Any) -> Iterator[str]:
    """Yield what is wrong."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached = subject.generate(**options, use_cache=True)
    plain = subject.generate(**options, use_cache=False)
    scores = [torch.stack(output.logits, dim=1) for output in (cached, plain)]
    if not torch.equal(cached.sequences, plain.sequences) or far(*scores):
        yield "with a cache it generates another text than without"
    whole = subject.logits(cached.sequences)[:, -NEW_TOKENS:]
    if not torch.equal(whole.argmax(-1), cached.sequences[:, -NEW_TOKENS:]) or far(scores[0], whole):
        yield "it generates another text than one forward predicts"
    model.set_attn_implementation("eager")
    if far(subject.logits(cached.sequences)[:, -NEW_TOKENS:], whole):
        yield "eager and sdpa attention differ"
    model.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        subject.model = type(model).from_pretrained(folder).eval()
        if not torch.equal(subject.logits(cached.sequences)[:, -NEW_TOKENS:], whole):
            yield "it is another model after saving and loading"


def far(actual: Tensor, expected: Tensor) -> bool:
    """Tell whether two outputs differ by more than float32's rounding; NaN always does."""
    error = (actual.double() - expected.double()).abs().max()
    return not bool(error <= TOLERANCE * expected.double().abs().max())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: for models this small, several take longer."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out transformers' bars and remarks on random models."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
