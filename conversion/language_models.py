"""The language models that others are built around, in transformers' names, which authors' files keep."""

from hfvlm.key_table import Row

# What decides the shape and the numbers of a LLaMA or a Mistral, in config.json of every version of transformers.
LLAMA_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "sliding_window", "attention_bias", "mlp_bias", "attention_dropout", "tie_word_embeddings"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def llama_rows(source: str = "model", head: str = "lm_head", target: str = "language_model") -> list[Row]:
    """LLaMA, and whatever shares its names: Vicuna, Mistral, Yi."""
    layer, ours = f"{source}.layers.{{}}", f"{target}.model.layers.{{}}"
    return [
        Row(f"{source}.embed_tokens.weight", f"{target}.model.embed_tokens.weight"),
        *(Row(f"{layer}.self_attn.{part}_proj.{{}}", f"{ours}.self_attn.{part}_proj.{{}}") for part in "qkvo"),
        Row(f"{layer}.mlp.{{}}.{{}}", f"{ours}.mlp.{{}}.{{}}"),
        Row(f"{layer}.{{}}.weight", f"{ours}.{{}}.weight"),
        # Rotary frequencies are computed; files from before transformers 4.32 repeat them in every layer.
        Row(f"{layer}.self_attn.rotary_emb.inv_freq", None, optional=True),
        Row(f"{source}.norm.weight", f"{target}.model.norm.weight"),
        Row(f"{head}.weight", f"{target}.lm_head.weight"),
    ]
