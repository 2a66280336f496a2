"""MERLOT Reserve's sizes. Defaults are those of the base model."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from torch import Tensor

from hfvlm.configuration import HfvlmConfig, SubConfig, TextConfig, TowerConfig, VisionConfig

# Channels of each head that positions are encoded in.
ROTARY_SIZE = 32


def check_rotary(config: TowerConfig) -> None:
    """Refuse heads that positions do not fit into.

    Raises:
        ValueError: naming the fields.
    """
    width = config.hidden_size // config.num_attention_heads
    if width < ROTARY_SIZE:
        raise ValueError(
            f"{type(config).__name__}: heads of {width} (hidden_size {config.hidden_size} / num_attention_heads "
            f"{config.num_attention_heads}) are narrower than the {ROTARY_SIZE} channels that hold positions."
        )


@strict
class HfvlmMERLOTReserveVisionConfig(VisionConfig):
    """The vision transformer of single frames. `image_size` is (height, width); no weight depends on it.

    Args:
        pool_size: rows, and columns, of patches that become one token of the joint encoder.
        projection_dim: width of the class token's projection, that of the joint encoder.
    """

    model_type = "hfvlm_merlot_reserve_vision"

    hidden_act: str = "quick_gelu"
    image_size: int | list[int] | tuple[int, int] = (192, 320)
    pool_size: int = 2
    projection_dim: int | None = 768

    def pooled_grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return the rows and columns of tokens of images `(..., H, W)`.

        Raises:
            ValueError: their patches do not divide into squares of `pool_size`.
        """
        rows, columns = (edge // self.patch_size for edge in pixel_values.shape[-2:])
        if rows % self.pool_size or columns % self.pool_size or not rows * columns:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])}, of {rows} x {columns} patches: the vision tower "
                f"takes grids that divide into squares of {self.pool_size} (pool_size); use the processor."
            )
        return rows // self.pool_size, columns // self.pool_size

    def validate_rotary(self) -> None:
        check_rotary(self)

    def validate_pooling(self) -> None:
        if any(edge % self.pool_size for edge in self.grid):
            raise ValueError(
                f"{type(self).__name__}: a grid of {self.grid} patches (image_size {self.image_size}) does not divide "
                f"into squares of pool_size {self.pool_size}."
            )


@strict
class HfvlmMERLOTReserveAudioConfig(TowerConfig):
    """The transformer of a third of a segment's audio, 1.6 s.

    Args:
        num_frames: columns of a spectrogram.
        num_channels: of a column: mel bins, and the playback speed.
        patch_size: columns in a patch.
        num_tokens: of the joint encoder that a clip becomes.
        projection_dim: width of the class token's projection, that of the joint encoder.
    """

    model_type = "hfvlm_merlot_reserve_audio"
    base_config_key = "audio_config"

    hidden_act: str = "quick_gelu"
    num_frames: int = 60
    num_channels: int = 65
    patch_size: int = 2
    num_tokens: int = 6
    projection_dim: int | None = 768

    def validate_rotary(self) -> None:
        check_rotary(self)

    def validate_tokens(self) -> None:
        if self.num_frames % (self.patch_size * self.num_tokens):
            raise ValueError(
                f"{type(self).__name__}: num_frames {self.num_frames} is not a multiple of patch_size "
                f"{self.patch_size} times num_tokens {self.num_tokens}."
            )


@strict
class HfvlmMERLOTReserveConfig(TextConfig):
    """Frames, text and audio in one encoder, whose sizes are this configuration's own.

    Args:
        num_span_layers: of the encoder of short texts, whose other sizes are the joint encoder's.
        max_span_length: tokens of the longest text that it encodes.
        mask_token_id: where the model predicts text.
        audio_mask_token_id: where it predicts audio.
        audio_token_id: where it reads audio.
        pool_token_id: where it sums up audio, or text, of a segment, to find the segment's frame.
        num_segment_groups: parts of a video that are encoded one by one in pretraining.
        mask_share: of the audio clips that a sequence of pretraining masks.
        num_target_spans: masked texts of each video that pretraining predicts, drawn over the batch; None for all.
        video_split_rate: share of the rows of pretraining in which the segments after a random one do not attend to
            those before.
    """

    model_type = "hfvlm_merlot_reserve"
    base_config_key = ""
    sub_configs = {"vision_config": HfvlmMERLOTReserveVisionConfig, "audio_config": HfvlmMERLOTReserveAudioConfig}

    vision_config: SubConfig[HfvlmMERLOTReserveVisionConfig] = field(default_factory=HfvlmMERLOTReserveVisionConfig)
    audio_config: SubConfig[HfvlmMERLOTReserveAudioConfig] = field(default_factory=HfvlmMERLOTReserveAudioConfig)
    hidden_act: str = "quick_gelu"
    vocab_size: int = 32768
    max_position_embeddings: int = 1024
    num_span_layers: int = 4
    max_span_length: int = 15
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    mask_token_id: int = 3
    audio_mask_token_id: int = 4
    audio_token_id: int = 5
    pool_token_id: int = 6
    num_segment_groups: int = 2
    mask_share: float = 0.25
    num_target_spans: int | None = 48
    video_split_rate: float = 0.1

    def validate_rotary(self) -> None:
        check_rotary(self)

    def validate_widths(self) -> None:
        for name in self.sub_configs:
            tower = getattr(self, name)
            if isinstance(tower, HfvlmConfig) and {tower.hidden_size, tower.projection_dim} != {self.hidden_size}:
                raise ValueError(
                    f"{type(self).__name__}: hidden_size {self.hidden_size} must be {name}'s hidden_size "
                    f"{tower.hidden_size} and projection_dim {tower.projection_dim}."
                )
