"""PaLI's sizes. Defaults are those of PaLI-17B: ViT-e and mT5-XXL."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, T5Config

from hfvlm.configuration import HfvlmConfig, SubConfig
from hfvlm.models.paligemma.configuration_paligemma import HfvlmPaliGemmaVisionConfig


def vit_e_config() -> HfvlmPaliGemmaVisionConfig:
    """Return ViT-e, of the paper's table 11."""
    return HfvlmPaliGemmaVisionConfig(
        hidden_size=1792, intermediate_size=15360, num_hidden_layers=56, num_attention_heads=16
    )


def mt5_config() -> T5Config:
    """Return mT5-XXL, a T5 1.1; transformers' own MT5Config would tie its output layer to the embeddings."""
    sizes: dict[str, Any] = {
        "vocab_size": 250112,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    return T5Config(**sizes)


@strict
class HfvlmPaLIConfig(HfvlmConfig):
    """PaLI. Its authors released neither code nor weights; what the paper leaves open is ours.

    Args:
        vision_config: of the ViT, whose patches are not pooled.
        text_config: of mT5, a T5 with an output layer of its own.
        image_token_id: the placeholder, of which each image takes as many as it has patches. The first id after the
            vocabulary suffices: placeholders are never looked up.
        projector_depth: linear layers between the ViT and mT5's encoder; 0 for none, if they are equally wide.
    """

    model_type = "hfvlm_pali"
    token_count_fields = ("vision_config.image_size", "vision_config.patch_size")
    sub_configs = {"vision_config": HfvlmPaliGemmaVisionConfig, "text_config": T5Config}

    vision_config: SubConfig[HfvlmPaliGemmaVisionConfig] = field(default_factory=vit_e_config)
    text_config: SubConfig[Any] = field(default_factory=mt5_config)
    image_token_id: int = 250112
    projector_depth: int = 1
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False

    def validate_language_model(self) -> None:
        # transformers calls every T5 tied, and has another field for what was given.
        if getattr(self.text_config, "scale_decoder_outputs", self.text_config.tie_word_embeddings):
            raise ValueError("text_config.tie_word_embeddings: mT5's output layer is its own, set it to false.")
        vision, text = self.vision_config.hidden_size, self.text_config.d_model
        if self.projector_depth == 0 and vision != text:
            raise ValueError(f"projector_depth is 0, but vision_config.hidden_size {vision} is not d_model {text}.")

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """Return that of the encoder and the decoder."""
        return self.text_config

    def count_tokens(self) -> int:
        """Count the placeholders of an image."""
        return self.vision_config.patch_count
