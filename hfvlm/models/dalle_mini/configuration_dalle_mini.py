"""DALL-E mini's sizes. Defaults are those of DALL-E mini, of its VQGAN, and of OpenAI's dVAE."""

from dataclasses import field

from huggingface_hub.dataclasses import strict

from hfvlm.configuration import HfvlmConfig, SubConfig, TextConfig, check_activation

# Where a layer has norms: before a branch, after it, both, or within it.
NORMS = ("normformer", "cogview", "preln", "subln", "swinv2")


@strict
class HfvlmDALLEMiniTextConfig(TextConfig):
    """The encoder of texts.

    Args:
        norms: where the norms are: "normformer" (before and after attention, before and within the MLP), "cogview"
            (before and after both), "preln" (before both), "subln" (before and within both) or "swinv2" (after both,
            and of every sixth layer's output).
        norm_type: "layernorm", or "rmsnorm", which neither centres nor has a bias.
        activation: of the MLP: transformers' name of one, or "smelu".
        gated: the MLP is a gated linear unit.
        bias: linear layers have one.
        head_scale: each head's output is scaled.
        cosine_temperature: attention is the cosine of queries and keys over this; None for their scaled product.
        sinkhorn_iterations: normalisations of the encoder's attention, over keys and queries in turns.
        absolute_positions: tokens have learned positions.
        relative_positions: attention has a learned bias for each pair of positions.
        scale_embedding: token embeddings are multiplied by the square root of their width.
        final_norm: there is one after the last layer.
        residual_scale: factor of the residual stream at every branch (DeepNet's alpha).
        init_gain: of initial values and outputs of attention, and of the MLP (DeepNet's beta, or sub-LN's).
        hidden_dropout: of every branch, in training.
        activation_dropout: within the MLP, in training.
    """

    model_type = "hfvlm_dalle_mini_text"

    hidden_size: int = 1024
    intermediate_size: int = 2730
    num_attention_heads: int = 16
    vocab_size: int = 50264
    max_position_embeddings: int = 64
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    norms: str = "normformer"
    norm_type: str = "layernorm"
    activation: str = "gelu"
    gated: bool = True
    bias: bool = False
    head_scale: bool = False
    cosine_temperature: float | None = None
    sinkhorn_iterations: int = 1
    absolute_positions: bool = True
    relative_positions: bool = False
    scale_embedding: bool = False
    final_norm: bool = True
    residual_scale: float | int = 1.0
    init_gain: float | int = 1.0
    hidden_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0

    def validate_options(self) -> None:
        for name, known in (("norms", NORMS), ("norm_type", ("layernorm", "rmsnorm"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{type(self).__name__}: {name} is one of {', '.join(known)}, not {getattr(self, name)!r}."
                )
        if self.activation != "smelu":
            check_activation(f"{type(self).__name__}: activation", self.activation)
        if self.cosine_temperature is not None and self.cosine_temperature <= 0:
            raise ValueError(f"{type(self).__name__}: cosine_temperature must be above 0 or None.")
        if not 1 <= self.sinkhorn_iterations <= 100:
            raise ValueError(f"{type(self).__name__}: sinkhorn_iterations must be from 1 to 100.")


@strict
class HfvlmDALLEMiniDecoderConfig(HfvlmDALLEMiniTextConfig):
    """The decoder of an image's codes. The position of a code is its own; the start token has the first.

    Args:
        vocab_size: codes, the start token, and unused rows.
        max_position_embeddings: codes of an image.
        context_length: tokens of the longest text.
        bos_token_id: the start token.
        eos_token_id: ends an image early where it is drawn; beyond the vocabulary it never is.
    """

    model_type = "hfvlm_dalle_mini_decoder"
    base_config_key = "decoder_config"

    vocab_size: int = 16385
    max_position_embeddings: int = 256
    context_length: int = 64
    pad_token_id: int | None = 16384
    bos_token_id: int | None = 16384
    eos_token_id: int | None = 16384

    def validate_start(self) -> None:
        if self.bos_token_id is None:
            raise ValueError(f"{type(self).__name__}: bos_token_id is None: images need a start token.")


@strict
class HfvlmDALLEMiniVQGANConfig(HfvlmConfig):
    """A VQGAN, whose encoder turns an image into codes and whose decoder turns codes into an image.

    Args:
        hidden_size: channels of the first level, which `channel_ratios` multiplies at each level.
        blocks_per_level: residual blocks of the encoder's levels; the decoder's have one more.
        attention_levels: of `channel_ratios`, those with attention after every block.
        code_size: width of a code's embedding.
        latent_channels: of the decoder's input and of the encoder's output.
        resample_with_conv: convolutions change the resolution, not averages.
        group_norm_eps: 1e-6 in Flax and in taming-transformers, 1e-5 in min-dalle.
        has_encoder: the file has the encoder, too.
    """

    model_type = "hfvlm_dalle_mini_vqgan"
    base_config_key = "codec_config"

    num_channels: int = 3
    hidden_size: int = 128
    channel_ratios: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    attention_levels: list[int] | tuple[int, ...] = (4,)
    latent_channels: int = 256
    code_size: int = 256
    num_codes: int = 16384
    image_size: int = 256
    resample_with_conv: bool = True
    group_norm_eps: float = 1e-6
    has_encoder: bool = True
    attention_dropout: float | int = 0.0

    def validate_groups(self) -> None:
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 32, the groups of the norms.")

    @property
    def stride(self) -> int:
        """Pixels of an image's edge for each code."""
        return 2 ** (len(self.channel_ratios) - 1)

    @property
    def code_length(self) -> int:
        """Codes of a square image."""
        return (self.image_size // self.stride) ** 2


@strict
class HfvlmDALLEMiniDVAEConfig(HfvlmConfig):
    """OpenAI's discrete VAE, whose codes DALL-E and BEiT learn.

    Args:
        hidden_size: channels of the encoder's first level; each level has twice those of the one before.
        decoder_hidden_size: of the decoder's last level.
        decoder_input_size: channels that the decoder embeds codes to.
        blocks_per_group: residual blocks of each of the encoder's four groups.
        decoder_blocks_per_group: of the decoder's.
    """

    model_type = "hfvlm_dalle_mini_dvae"

    num_channels: int = 3
    hidden_size: int = 256
    decoder_hidden_size: int = 256
    decoder_input_size: int = 128
    blocks_per_group: int = 2
    decoder_blocks_per_group: int = 2
    num_codes: int = 8192
    image_size: int = 256

    stride = 8


@strict
class HfvlmDALLEMiniConfig(HfvlmConfig):
    """A text encoder, a decoder of images' codes and, where `codec_config` is not None, the VQGAN of these codes.

    Args:
        guidance_scale: what generation multiplies the difference that a text makes by, unless a call says another.
    """

    model_type = "hfvlm_dalle_mini"
    sub_configs = {
        "text_config": HfvlmDALLEMiniTextConfig,
        "decoder_config": HfvlmDALLEMiniDecoderConfig,
        "codec_config": HfvlmDALLEMiniVQGANConfig,
    }

    text_config: SubConfig[HfvlmDALLEMiniTextConfig] = field(default_factory=HfvlmDALLEMiniTextConfig)
    decoder_config: SubConfig[HfvlmDALLEMiniDecoderConfig] = field(default_factory=HfvlmDALLEMiniDecoderConfig)
    codec_config: SubConfig[HfvlmDALLEMiniVQGANConfig] | None = None
    guidance_scale: float | int = 10.0

    def validate_widths(self) -> None:
        text, decoder, codec = self.text_config, self.decoder_config, self.codec_config
        if text.hidden_size != decoder.hidden_size:
            raise ValueError(
                f"hidden_size differs: {text.hidden_size} in text_config, {decoder.hidden_size} in decoder_config."
            )
        if text.max_position_embeddings != decoder.context_length:
            raise ValueError(
                f"decoder_config.context_length is {decoder.context_length}, texts have "
                f"{text.max_position_embeddings} tokens (text_config.max_position_embeddings)."
            )
        if codec is not None and codec.num_codes > decoder.vocab_size:
            raise ValueError(
                f"codec_config has {codec.num_codes} codes (num_codes), more than decoder_config.vocab_size "
                f"{decoder.vocab_size}."
            )
        if codec is not None and codec.code_length != decoder.max_position_embeddings:
            raise ValueError(
                f"codec_config's images have {codec.code_length} codes (image_size {codec.image_size}), the decoder's "
                f"{decoder.max_position_embeddings} (decoder_config.max_position_embeddings)."
            )
