"""hfvlm's changes of transformers' `generate`: all of its private methods that are overridden are overridden here."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList

from hfvlm.modeling.compat import StepInputs
from hfvlm.modeling.keywords import StrictKeywords


class Generation(StrictKeywords, GenerationMixin):
    """Base of models that generate. A subclass overrides the public methods."""

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @torch.no_grad()
    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; see its `GenerationMixin.generate`."""
        return super().generate(inputs, *args, **kwargs)

    def longest_text(self) -> int | None:
        """Return how many tokens a text can have, prompt included; None for no limit of the model's own."""
        return None

    def adapted(self, processors: LogitsProcessorList, prompt_length: int) -> LogitsProcessorList:
        """Return the processors of logits that generation uses, given those of its options."""
        return processors

    def repeated(self, features: Mapping[str, Any], rows: Mapping[str, Tensor], times: int) -> dict[str, Any]:
        """Return features of media, by modality, for a batch each row of which, by its `input_ids` or
        `inputs_embeds`, is repeated."""
        return dict(features)

    def ids(self, vocab_size: int) -> int:
        """Return how many ids texts may hold, given those of the vocabulary: placeholders may lie beyond it."""
        return vocab_size

    def step_inputs(self, step: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Return inputs of a step that transformers does not make.

        Args:
            step: `(B, n)`, the ids that are new in this step; None for embeddings.
            input_ids: `(B, N)`, all ids so far.
            attention_mask: `(B, N)`, 0 for padding.
        """
        return {}

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare a step's inputs, without the tokenizers, which transformers hands on to the step."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        return StepInputs(inputs | self.step_inputs(inputs.get("input_ids"), input_ids, attention_mask))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if getattr(generator, "vocab_size", None) is not None:
            generator.vocab_size = self.ids(generator.vocab_size)
        return generator

    def _prepare_generated_length(self, **arguments: Any) -> Any:  # type: ignore[override]
        options = super()._prepare_generated_length(**arguments)  # type: ignore[misc]
        if (longest := self.longest_text()) is not None:
            options.max_length = min(options.max_length, longest)
        return options

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: int | None = None, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)  # type: ignore[misc]
        return self.adapted(processors, input_ids_seq_length or 0)

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,  # noqa: FBT001, FBT002 (transformers' signature)
        input_ids: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        features = kwargs.pop("mm_encoder_outputs", None)
        rows = {"input_ids": input_ids, "inputs_embeds": kwargs.get("inputs_embeds")}
        expanded, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if features:
            kwargs["mm_encoder_outputs"] = features if expand_size == 1 else self.repeated(features, rows, expand_size)
        return expanded, kwargs


class WholeTextBeams(GenerationMixin):
    """Beams as transformers 4.15 has them, which compares log probabilities over the length of the whole text, prompt
    included and the end token not; later versions count what is generated alone."""

    config: Any

    def _update_finished_beams(  # type: ignore[override]
        self,
        *,
        topk_running_sequences: Tensor,
        topk_log_probs: Tensor,
        cur_len: int,
        length_penalty: float,
        **rest: Any,
    ) -> Any:
        length, ended = cur_len + 1, topk_running_sequences[:, :, cur_len].eq(self.config.eos_token_id or -1)
        return super()._update_finished_beams(
            topk_running_sequences=topk_running_sequences,
            topk_log_probs=topk_log_probs * (length / (length - ended.to(topk_log_probs))) ** length_penalty,
            cur_len=cur_len,
            length_penalty=length_penalty,
            **rest | {"decoder_prompt_len": 0},
        )

    @staticmethod
    def _check_early_stop_heuristic(**arguments: Any) -> Any:  # type: ignore[override]
        return GenerationMixin._check_early_stop_heuristic(**arguments | {"decoder_prompt_len": 1})


@functools.cache
def further_arguments(kind: type) -> tuple[str, ...]:
    """Return the names of what a class of logits processors takes next to ids and scores."""
    return tuple(inspect.signature(kind.__call__).parameters)[3:]


class WithinVocabulary(LogitsProcessorList):
    """Processors of logits that get no ids without a logit, which a penalty for repetition would index.

    Their signatures are read once, and not in every step, as transformers reads them.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = scores.shape[-1] - 1
        known: Any = torch.where(input_ids > last, input_ids[:, :1].clamp(max=last), input_ids)
        for processor in self:
            kind: Any = type(processor)
            needed = further_arguments(kind)
            if missing := [name for name in needed if name not in kwargs]:
                raise ValueError(f"{type(processor).__name__} needs {', '.join(missing)}.")
            scores = processor(known, scores, **kwargs if needed else {})
        return scores


class Without(LogitsProcessor):
    """A processor that suppresses tokens, on whatever device their scores are; transformers' own must be given one."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens = tuple(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scored = [token for token in self.tokens if token < scores.shape[-1]]
        if not scored:
            return scores
        scores = scores.clone()
        for token in scored:
            scores[:, token] = -torch.inf
        return scores
