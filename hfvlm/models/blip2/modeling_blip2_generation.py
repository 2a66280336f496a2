"""BLIP-2's second stage and InstructBLIP: a language model whose inputs are queries
(https://arxiv.org/abs/2301.12597, section 3.3; https://arxiv.org/abs/2305.06500)."""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationConfig, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import token_losses
from hfvlm.modeling.captioning import RankedAnswers
from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.image_text_seq2seq import Seq2SeqImageTextModel, UntiedT5
from hfvlm.modeling.keywords import Keywords
from hfvlm.models.blip2.configuration_blip2 import HfvlmBLIP2Config
from hfvlm.models.blip2.modeling_blip2 import HfvlmBLIP2QFormerModel
from hfvlm.modules.parts import in_parts
from hfvlm.modules.projection import Projector
from hfvlm.processing.assembly import IGNORE

# What the first stage has and the second does not.
STAGE_1 = [
    r"^(image_projection|text_projection|logit_scale|itm_head|lm_head)\.",
    r"^qformer_model\.(embeddings\.(token|position)|layers\.\d+\.mlp)",
]
INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")


@dataclass
class ImagesWithQueries(BaseModelOutputWithPooling):
    """The vision tower's output for images, whose `pooler_output` are the inputs of the language model.

    Args:
        qformer_outputs: the Q-Former's; `pooler_output`, `(P, Q, D)`, are the queries.
    """

    qformer_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class HfvlmBLIP2ForConditionalGeneration(ImageTextModel):
    """A language model whose inputs are the queries' outputs: BLIP-2 with OPT, InstructBLIP with Vicuna.

    With a Q-Former that takes texts, as InstructBLIP's, the queries attend to the instruction, too.
    """

    config: HfvlmBLIP2Config
    _no_split_modules = ["PreNormLayer", "QFormerLayer"]
    _keys_to_ignore_on_load_unexpected = STAGE_1
    full_precision_modules = (*ImageTextModel.full_precision_modules, "qformer_model")
    media_inputs = {"image": ("pixel_values", *INSTRUCTION), "video": ("pixel_values_videos", *INSTRUCTION)}

    def __init__(self, config: HfvlmBLIP2Config):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.qformer_model = HfvlmBLIP2QFormerModel._from_config(config.qformer_config)
        self.projector = Projector(config.qformer_config.hidden_size, config.text_config.hidden_size, 1)
        self.language_model = self.build_language_model(config)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load as every language model with images. One that begins from the first stage's folder, with a `config` of
        its own, does not end its texts as the Q-Former does there."""
        folder = pretrained_model_name_or_path
        loaded = super().from_pretrained(folder, *args, config=config, **kwargs)
        if folder is not None and config is not None:
            place = {name: kwargs[name] for name in ("revision", "subfolder", "token") if name in kwargs}
            if HfvlmBLIP2Config.from_pretrained(folder, **place).text_config is None:
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.generation_config = GenerationConfig.from_model_config(model.config)
        return loaded

    def build_language_model(self, config: HfvlmBLIP2Config) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config.text_config)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[Keywords],
    ) -> ImagesWithQueries:
        """Encode images -> the vision tower's tokens, `(P, M, C)`, in `last_hidden_state`, and inputs of the language
        model, `(P, Q, hidden_size)`, in `pooler_output`.

        Args:
            pixel_values: `(P, C, H, W)`, normalised.
            qformer_input_ids: `(P, N)`, the instruction about each image, for a Q-Former that takes it.
            qformer_attention_mask: `(P, N)`, 0 for padding on either side.
            interpolate_pos_encoding: take images of any size.

        Raises:
            ValueError: the Q-Former takes instructions, and there are none; or the other way round.
        """
        takes_texts = self.config.qformer_config.vocab_size is not None
        if takes_texts != (qformer_input_ids is not None):
            raise ValueError(
                f"qformer_config.vocab_size is {self.config.qformer_config.vocab_size}: the Q-Former "
                + ("takes qformer_input_ids, which are missing." if takes_texts else "takes no qformer_input_ids.")
            )
        options: dict[str, Any] = {"interpolate_pos_encoding": interpolate_pos_encoding, **kwargs}
        vision = in_parts(self.vision_model, pixel_values, **options)
        queried = self.qformer_model(vision.last_hidden_state, qformer_input_ids, qformer_attention_mask, **kwargs)
        return ImagesWithQueries(
            last_hidden_state=vision.last_hidden_state,
            # Only the queries, without the instruction's words.
            pooler_output=self.projector(queried.pooler_output),
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            qformer_outputs=queried,
        )

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> ImagesWithQueries:
        """Encode videos `(V, F, C, H, W)`, each frame as an image -> as above, `pooler_output` `(V, F * Q,
        hidden_size)`, and all else of `V * F` images.

        Raises:
            ValueError: the pixels have no dimension of frames.
        """
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                f"pixel_values_videos has the shape {tuple(pixel_values_videos.shape)}, and must have that of "
                "(videos, frames, channels, height, width): one image is a video of one frame."
            )
        videos, frames = pixel_values_videos.shape[:2]
        instructions = (
            None if part is None else part.repeat_interleave(frames, dim=0)
            for part in (qformer_input_ids, qformer_attention_mask)
        )
        options: dict[str, Any] = {**kwargs, "return_dict": True}
        output = self.get_image_features(pixel_values_videos.flatten(0, 1), *instructions, **options)
        joined = output.pooler_output.unflatten(0, (videos, frames)).flatten(1, 2)
        output.pooler_output = joined
        return output

    @torch.no_grad()
    def rank(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, candidates: Tensor, **media: Any
    ) -> RankedAnswers:
        """Order answers by their probability, as InstructBLIP chooses among a list. Each image is encoded once.

        Args:
            input_ids: `(B, N)`, the questions, with placeholders.
            attention_mask: `(B, N)`, 0 for padding on either side.
            candidates: `(A, M)` answers that each question has, -100 after their end; see the processor's `answers`.
            **media: the images' inputs.

        Returns:
            `indices` `(B, A)`, the likeliest first, and their `scores`.
        """
        embeds = self.embed(input_ids, self.encode_media(media))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [self.cost_of_answers(x[real], candidates) for x, real in zip(embeds, mask.bool(), strict=True)]
        scores, indices = torch.stack(rows).neg().sort(dim=1, descending=True)
        return RankedAnswers(indices=indices, scores=scores, best=indices[:, 0])

    def cost_of_answers(self, prompt: Tensor, candidates: Tensor) -> Tensor:
        """Sum the losses of each answer's tokens: `(N, D)` and `(A, M)` -> `(A,)`."""
        real = (candidates != IGNORE).long()
        words = self.get_input_embeddings()(candidates.clamp_min(0))
        x = torch.cat([prompt.expand(words.shape[0], -1, -1), words], dim=1)
        mask = torch.cat([real.new_ones(x.shape[0], prompt.shape[0]), real], dim=1)
        logits = self.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
        return token_losses(logits[:, prompt.shape[0] - 1 : -1], candidates).sum(dim=1)

    def step_inputs(self, step: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Return positions, which OPT takes from the mask, and cannot from that of a cache of fixed length."""
        if step is None:
            return {}
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {"position_ids": (real.cumsum(dim=1) - 1).clamp_min(0)[:, -step.shape[1] :]}

    def adapted(self, processors: LogitsProcessorList, prompt_length: int) -> LogitsProcessorList:
        """Hide the prompt: the original generates from embeddings alone, and penalties know one start token."""
        start = self.config.text_config.bos_token_id or 0
        return _WithoutPrompt(super().adapted(processors, prompt_length), prompt_length, start)


class _WithoutPrompt(LogitsProcessorList):
    """Shows each processor start tokens in place of the prompt."""

    def __init__(self, processors: LogitsProcessorList, length: int, start: int):
        super().__init__(list(processors))
        self.length, self.start = length, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        shown = input_ids.clone()
        shown[:, : self.length] = self.start
        return super().__call__(shown, scores, **kwargs)  # type: ignore[arg-type]


class HfvlmBLIP2T5ForConditionalGeneration(Seq2SeqImageTextModel, HfvlmBLIP2ForConditionalGeneration):
    """The same with an encoder, whose inputs the queries are, and a decoder: BLIP-2 and InstructBLIP with FLAN-T5."""

    def build_language_model(self, config: HfvlmBLIP2Config) -> PreTrainedModel:
        return UntiedT5._from_config(config.text_config)

    def cost_of_answers(self, prompt: Tensor, candidates: Tensor) -> Tensor:
        states = self.language_model.encoder(inputs_embeds=prompt[None]).last_hidden_state
        encoded = BaseModelOutput(last_hidden_state=states.expand(candidates.shape[0], -1, -1))
        logits = self.language_model(encoder_outputs=encoded, labels=candidates).logits
        return token_losses(logits, candidates).sum(dim=1)
