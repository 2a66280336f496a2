"""BLIP's sizes. Defaults are those of the base model at 224 px."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import BertTextConfig, HfvlmConfig, SubConfig, VisionConfig


@strict
class HfvlmBLIPVisionConfig(VisionConfig):
    """The vision transformer.

    Args:
        projection_dim: width of the joint space; None leaves the projection out.
        drop_path_rate: stochastic depth of the last layer in training; it grows to this from 0 at the first.
    """

    model_type = "hfvlm_blip_vision"

    layer_norm_eps: float = 1e-6
    projection_dim: int | None = 256
    drop_path_rate: float | int = 0.0


@strict
class HfvlmBLIPTextConfig(BertTextConfig):
    """The mixture of encoder and decoder.

    Args:
        context_size: width of the cross-attention's inputs, the vision tower's.
        projection_dim: width of the joint space; None leaves the projection out.
        bos_token_id: [DEC], which begins generated texts.
        encoder_token_id: [ENC], which begins texts that attend to an image.
        eos_token_id: [SEP].
    """

    model_type = "hfvlm_blip_text"

    vocab_size: int = 30524
    context_size: int = 768
    projection_dim: int | None = 256
    bos_token_id: int = 30522
    pad_token_id: int = 0
    encoder_token_id: int = 30523
    eos_token_id: int | None = 102
    tie_word_embeddings: bool = True


@strict
class HfvlmBLIPConfig(HfvlmConfig):
    """BLIP. `architectures` names the head that a checkpoint is for; each loads its parts of the others' folders.

    Args:
        similarity_temperature: that cosine similarities are divided by before training; None does not scale them.
        label_smoothing: of the losses of captions and answers.
        queue_size: momentum features of past batches that momentum training compares with.
        momentum: share of their weights that the momentum encoders retain at a step of training.
        distillation: weight of the momentum encoders' soft targets in the contrastive loss.
        negatives_from_all_ranks: hard negatives of retrieval training come from all processes, not from one's own.
    """

    model_type = "hfvlm_blip"
    sub_configs = {"vision_config": HfvlmBLIPVisionConfig, "text_config": HfvlmBLIPTextConfig}

    architectures: list[str] | None = field(default_factory=lambda: ["HfvlmBLIPModel"])
    vision_config: SubConfig[HfvlmBLIPVisionConfig] = field(default_factory=HfvlmBLIPVisionConfig)
    text_config: SubConfig[HfvlmBLIPTextConfig] = field(default_factory=HfvlmBLIPTextConfig)
    similarity_temperature: float | None = 0.07
    label_smoothing: float | int = 0.1
    queue_size: int = 57600
    momentum: float | int = 0.995
    distillation: float | int = 0.4
    negatives_from_all_ranks: bool = False
    tie_word_embeddings: bool = True

    def validate_widths(self) -> None:
        image, text = self.vision_config.projection_dim, self.text_config.projection_dim
        if image != text:
            raise ValueError(f"projection_dim differs: {image} in vision_config, {text} in text_config.")
        width, read = self.vision_config.hidden_size, self.text_config.context_size
        if width != read:
            raise ValueError(f"text_config has a context_size of {read}, vision_config's hidden_size is {width}.")
