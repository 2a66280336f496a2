"""BLIP-2's sizes. Defaults are those of the released ViT-g models at 224 px with OPT 2.7B."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import OPTConfig, PreTrainedConfig

from hfvlm.configuration import HfvlmConfig, SubConfig, TowerConfig, VisionConfig

# How OPT, for which transformers has no plans, is divided: by columns and rows of its layers, and by layers.
OPT = "language_model.model.decoder"
OPT_TP_PLAN = {
    f"{OPT}.layers.*.{name}": "colwise" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1")
}
OPT_TP_PLAN |= {f"{OPT}.layers.*.{name}": "rowwise" for name in ("self_attn.out_proj", "fc2")}
STATES = ["hidden_states"]
OPT_PP_PLAN = {
    f"{OPT}.embed_tokens": (["input_ids"], ["inputs_embeds"]),
    f"{OPT}.embed_positions": (["attention_mask"], STATES),
    f"{OPT}.layers": ([*STATES, "attention_mask"], STATES),
    f"{OPT}.final_layer_norm": (STATES, STATES),
}


@strict
class HfvlmBLIP2VisionConfig(VisionConfig):
    """EVA-CLIP's ViT-g, without its last layer.

    Args:
        drop_path_rate: stochastic depth of the last layer in training; it grows to this from 0 at the first.
    """

    model_type = "hfvlm_blip2_vision"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.0


@strict
class HfvlmBLIP2CLIPVisionConfig(VisionConfig):
    """OpenAI's ViT-L/14, without its last layer."""

    model_type = "hfvlm_blip2_clip_vision"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    patch_size: int = 14
    hidden_act: str = "quick_gelu"


@strict
class HfvlmBLIP2QFormerConfig(TowerConfig):
    """The querying transformer.

    Args:
        num_queries: learned vectors that attend to an image; a language model gets as many tokens.
        context_size: width of the cross-attention's inputs, the vision tower's.
        context_norm_eps: of the norm of these inputs.
        cross_attention_frequency: every n-th layer, from the first on, has cross-attention to the image.
        vocab_size: of the texts next to the queries; None for a Q-Former without texts.
        projection_dim: width of the joint space of images and texts; None leaves the projections out.
        hidden_dropout: on every branch, in training.
        bos_token_id: [DEC], which begins generated texts.
        eos_token_id: [SEP].
    """

    model_type = "hfvlm_blip2_qformer"
    base_config_key = "qformer_config"

    num_queries: int = 32
    context_size: int = 1408
    context_norm_eps: float = 1e-5
    cross_attention_frequency: int = 2
    vocab_size: int | None = None
    max_position_embeddings: int = 512
    projection_dim: int | None = None
    layer_norm_eps: float = 1e-12
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    pad_token_id: int | None = 0
    bos_token_id: int = 30522
    eos_token_id: int | None = 102
    tie_word_embeddings: bool = True

    def validate_projection(self) -> None:
        if self.projection_dim is not None and self.vocab_size is None:
            raise ValueError(f"projection_dim {self.projection_dim}: without a vocab_size no texts can be compared.")


@strict
class HfvlmBLIP2Config(HfvlmConfig):
    """BLIP-2 and InstructBLIP. `architectures` names the head that a checkpoint is for.

    Args:
        vision_config: of the EVA-CLIP tower, or with the `model_type` "hfvlm_blip2_clip_vision" of CLIP's.
        qformer_config: with a `vocab_size`, the Q-Former takes texts: all of the first stage, and InstructBLIP's
            instructions.
        text_config: of the language model, one of transformers'; None in the first stage, which has none.
        image_token_id: the placeholder, of which each image takes `num_queries`. The first id after the vocabulary
            suffices: placeholders are never looked up.
        video_token_id: likewise, of videos, of whose frames each takes as many.
        similarity_temperature: that cosine similarities are divided by before training; None does not scale them.
        label_smoothing: of the first stage's contrastive and captioning losses.
    """

    model_type = "hfvlm_blip2"
    token_count_fields = ("qformer_config.num_queries",)
    sub_configs = {
        "vision_config": HfvlmBLIP2VisionConfig,
        "qformer_config": HfvlmBLIP2QFormerConfig,
        "text_config": OPTConfig,
    }

    architectures: list[str] | None = field(default_factory=lambda: ["HfvlmBLIP2ForConditionalGeneration"])
    vision_config: SubConfig[Any] = field(default_factory=HfvlmBLIP2VisionConfig)
    qformer_config: SubConfig[HfvlmBLIP2QFormerConfig] = field(default_factory=HfvlmBLIP2QFormerConfig)
    text_config: SubConfig[Any] = None
    image_token_id: int = 50272
    video_token_id: int = 50273
    similarity_temperature: float | None = 0.07
    label_smoothing: float | int = 0.1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if (text := self.text_config) is not None:
            self.is_encoder_decoder = text.is_encoder_decoder
            self.tie_word_embeddings = text.tie_word_embeddings and not text.is_encoder_decoder
            if text.model_type == "opt":  # other language models have plans of their own
                vars(self).update(base_model_tp_plan=OPT_TP_PLAN, base_model_pp_plan=OPT_PP_PLAN)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """Return that of the decoder: the language model, or in the first stage the Q-Former."""
        return self.qformer_config if self.text_config is None else self.text_config

    def validate_widths(self) -> None:
        width, read = self.vision_config.hidden_size, self.qformer_config.context_size
        if width != read:
            raise ValueError(f"qformer_config has a context_size of {read}, vision_config's hidden_size is {width}.")

    def count_tokens(self, frames: int = 1) -> int:
        """Count the placeholders of an image, or of a video of n frames."""
        return frames * self.qformer_config.num_queries
