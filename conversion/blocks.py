"""Rows that several architectures share: OpenAI's, timm's and transformers' layers, BERT, and the language models that
others are built around, in transformers' names, which authors' files keep.

Sources and targets end before the dot that follows on them; a `{}` in them stands for the number of the layer.
"""

from hfvlm.checkpoints.key_table import Row, split, tied, transpose


def row(source: str, *targets: str) -> Row:
    """Return the row to one parameter, or to several that the model ties."""
    return Row(source, targets, tied(len(targets))) if len(targets) > 1 else Row(source, targets[0])


def openai_layers(source: str, target: str) -> list[Row]:
    """Return the rows of OpenAI's transformer layers, which open_clip's models share."""
    block, layer = f"{source}.{{}}", f"{target}.{{}}"
    return [
        Row(f"{block}.attn.in_proj_{{}}", tuple(f"{layer}.attention.{part}_proj.{{}}" for part in "qkv"), split(3)),
        Row(f"{block}.attn.out_proj.{{}}", f"{layer}.attention.out_proj.{{}}"),
        Row(f"{block}.ln_1.{{}}", f"{layer}.attention_norm.{{}}"),
        Row(f"{block}.mlp.c_fc.{{}}", f"{layer}.mlp.fc1.{{}}"),
        Row(f"{block}.mlp.c_proj.{{}}", f"{layer}.mlp.fc2.{{}}"),
        Row(f"{block}.ln_2.{{}}", f"{layer}.mlp_norm.{{}}"),
    ]


def openai_tower(source: str, target: str) -> list[Row]:
    """Return the rows of OpenAI's vision transformer without what follows on its layers; `source` ends in a dot or is
    empty."""
    return [
        Row(f"{source}conv1.weight", f"{target}.patches.projection.weight"),
        Row(f"{source}class_embedding", f"{target}.class_token"),
        Row(f"{source}positional_embedding", f"{target}.position"),
        Row(f"{source}ln_pre.{{}}", f"{target}.pre_norm.{{}}"),
        *openai_layers(f"{source}transformer.resblocks", f"{target}.layers"),
    ]


def openai_vision_rows(source: str, target: str) -> list[Row]:
    """Return the rows of OpenAI's vision transformer."""
    return [
        *openai_tower(f"{source}.", target),
        Row(f"{source}.ln_post.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"{source}.proj", f"{target}.projection.weight", transpose),
    ]


def timm_layers(source: str, target: str) -> list[Row]:
    """Return the rows of the blocks of timm's vision transformer."""
    block, layer = f"{source}.{{}}", f"{target}.{{}}"
    return [
        Row(f"{block}.norm1.{{}}", f"{layer}.attention_norm.{{}}"),
        Row(f"{block}.attn.qkv.{{}}", tuple(f"{layer}.attention.{part}_proj.{{}}" for part in "qkv"), split(3)),
        Row(f"{block}.attn.proj.{{}}", f"{layer}.attention.out_proj.{{}}"),
        Row(f"{block}.norm2.{{}}", f"{layer}.mlp_norm.{{}}"),
        Row(f"{block}.mlp.{{}}.{{}}", f"{layer}.mlp.{{}}.{{}}"),
    ]


def timm_pool(source: str, target: str) -> list[Row]:
    """Return the rows of timm's attention pooling."""
    return [
        Row(f"{source}.latent", f"{target}.probe"),
        Row(f"{source}.q.{{}}", f"{target}.attention.q_proj.{{}}"),
        Row(f"{source}.kv.{{}}", (f"{target}.attention.k_proj.{{}}", f"{target}.attention.v_proj.{{}}"), split(2)),
        Row(f"{source}.proj.{{}}", f"{target}.attention.out_proj.{{}}"),
        Row(f"{source}.norm.{{}}", f"{target}.mlp_norm.{{}}"),
        Row(f"{source}.mlp.{{}}.{{}}", f"{target}.mlp.{{}}.{{}}"),
    ]


def transformers_layers(source: str, target: str = "") -> list[Row]:
    """Return the rows of the layers of transformers' CLIP, which its SigLIP shares."""
    source, target = f"{source}.encoder.layers.{{}}", f"{target or source}.layers.{{}}"
    return [
        Row(f"{source}.self_attn.{{}}.{{}}", f"{target}.attention.{{}}.{{}}"),
        Row(f"{source}.layer_norm1.{{}}", f"{target}.attention_norm.{{}}"),
        Row(f"{source}.mlp.{{}}.{{}}", f"{target}.mlp.{{}}.{{}}"),
        Row(f"{source}.layer_norm2.{{}}", f"{target}.mlp_norm.{{}}"),
    ]


def transformers_vision_rows(source: str, target: str) -> list[Row]:
    """Return the rows of the vision tower of transformers' CLIP without its projection, in whose names authors store
    frozen towers."""
    return [
        Row(f"{source}.embeddings.position_ids", None, optional=True),
        Row(f"{source}.embeddings.patch_embedding.weight", f"{target}.patches.projection.weight"),
        Row(f"{source}.embeddings.class_embedding", f"{target}.class_token"),
        Row(f"{source}.embeddings.position_embedding.weight", f"{target}.position"),
        Row(f"{source}.pre_layrnorm.{{}}", f"{target}.pre_norm.{{}}"),
        *transformers_layers(source, target),
        Row(f"{source}.post_layernorm.{{}}", f"{target}.post_norm.{{}}"),
    ]


def transformers_text_rows() -> list[Row]:
    """Return the rows of the text tower of transformers' CLIP."""
    text = "text_model"
    return [
        # Files from before transformers 4.31 store the counting numbers.
        Row(f"{text}.embeddings.position_ids", None, optional=True),
        Row(f"{text}.embeddings.token_embedding.weight", f"{text}.embeddings.token.weight"),
        Row(f"{text}.embeddings.position_embedding.weight", f"{text}.embeddings.position"),
        *transformers_layers(text),
        Row(f"{text}.final_layer_norm.{{}}", f"{text}.post_norm.{{}}"),
        Row("text_projection.weight", f"{text}.projection.weight"),
    ]


# BERT's names of the projections of an attention, and of the norm behind it.
BERT_ATTENTION = {
    "self.query": ".q_proj",
    "self.key": ".k_proj",
    "self.value": ".v_proj",
    "output.dense": ".out_proj",
    "output.LayerNorm": "_norm",
}


def bert_attention(source: str, *targets: str, inner: str = "self") -> list[Row]:
    """Return the rows of an attention of BERT's with its norm; `inner` is where its queries, keys and values are."""
    return [
        row(f"{source}.{part.replace('self', inner)}.{{}}", *(f"{target}{ours}.{{}}" for target in targets))
        for part, ours in BERT_ATTENTION.items()
    ]


def bert_mlp(source: str, *targets: str, kind: str = "") -> list[Row]:
    """Return the rows of an MLP of BERT's with its norm, in a layer `source`; `kind` follows on its names, where a
    layer has several."""
    names = {"intermediate{}.dense": ".fc1", "output{}.dense": ".fc2", "output{}.LayerNorm": "_norm"}
    return [
        row(f"{source}.{theirs.format(kind)}.{{}}", *(f"{target}{ours}.{{}}" for target in targets))
        for theirs, ours in names.items()
    ]


# What decides the shape and the numbers of a LLaMA or a Mistral, in config.json of every version of transformers.
LLAMA_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "sliding_window", "attention_bias", "mlp_bias", "attention_dropout", "tie_word_embeddings"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def llama_rows(source: str = "model", head: str = "lm_head", target: str = "language_model") -> list[Row]:
    """Return the rows of LLaMA, and whatever shares its names: Vicuna, Mistral, Yi, and Qwen 1.5, with its biases."""
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


# What decides the shape and the numbers of a Qwen 1.5, and of an MPT.
QWEN2_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_parameters"),
    *("tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
MPT_FIELDS = ("d_model", "n_heads", "n_layers", "max_seq_len", "initializer_range", "bos_token_id", "eos_token_id")


# What MosaicML called the parts of MPT's layers in MosaicGPT, of which MPT-1B is one.
MOSAIC_NAMES = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "ffn.up_proj": "mlp.mlp_up",
    "ffn.down_proj": "mlp.mlp_down",
}


def mpt_rows(target: str = "language_model", *, normalised: bool = False) -> list[Row]:
    """Return the rows of MPT, whose output layer is its table of words; `normalised` are its queries and keys."""
    words = (f"{target}.transformer.wte.weight", f"{target}.lm_head.weight")
    block, ours = "transformer.blocks.{}", f"{target}.transformer.blocks.{{}}"
    attention = [Row(f"{block}.attn.Wqkv.weight", f"{ours}.attn.Wqkv.weight")]
    if normalised:
        qkv = tuple(f"{ours}.attn.{part}_proj.weight" for part in "qkv")
        attention = [
            Row(f"{block}.attn.Wqkv.weight", qkv, split(3)),
            *(Row(f"{block}.attn.{part}_ln.weight", f"{ours}.attn.{part}_norm.weight") for part in "qk"),
        ]
    return [
        Row("transformer.wte.weight", words, tied(2)),
        *attention,
        Row(f"{block}.attn.out_proj.weight", f"{ours}.attn.out_proj.weight"),
        # Of two names for a part, a file has one.
        *(Row(f"{block}.{name}.weight", f"{ours}.{name}.weight", optional=True) for name in MOSAIC_NAMES),
        *(Row(f"{block}.{old}.weight", f"{ours}.{name}.weight", optional=True) for name, old in MOSAIC_NAMES.items()),
        *(
            Row(f"transformer.{norm}.weight", f"{target}.transformer.norm_f.weight", optional=True)
            for norm in ("norm_f", "ln_f")
        ),
        # The table of words again, in files that transformers wrote.
        Row("lm_head.weight", None, optional=True),
    ]


def gpt_neox_rows(target: str = "language_model") -> list[Row]:
    """Return the rows of GPT-NeoX, and whatever shares its names: Pythia, RedPajama."""
    from transformers import GPTNeoXForCausalLM

    # Versions of transformers differ in its name.
    (head,) = GPTNeoXForCausalLM._tied_weights_keys
    layer, ours = "gpt_neox.layers.{}", f"{target}.gpt_neox.layers.{{}}"
    return [
        Row("gpt_neox.embed_in.weight", f"{target}.gpt_neox.embed_in.weight"),
        *(
            Row(f"{layer}.{norm}.{{}}", f"{ours}.{norm}.{{}}")
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        *(
            Row(f"{layer}.attention.{part}.{{}}", f"{ours}.attention.{part}.{{}}")
            for part in ("query_key_value", "dense")
        ),
        Row(f"{layer}.mlp.{{}}.{{}}", f"{ours}.mlp.{{}}.{{}}"),
        # Masks and frequencies are computed; files from before transformers 4.32 repeat them in every layer.
        Row(f"{layer}.attention.bias", None, optional=True),
        Row(f"{layer}.attention.masked_bias", None, optional=True),
        Row(f"{layer}.attention.rotary_emb.inv_freq", None, optional=True),
        Row("gpt_neox.final_layer_norm.{}", f"{target}.gpt_neox.final_layer_norm.{{}}"),
        Row("embed_out.weight", f"{target}.{head}"),
    ]


# What decides the shape and the numbers of an OPT.
OPT_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings"),
    *("do_layer_norm_before", "word_embed_proj_dim", "activation_function", "enable_bias", "dropout"),
    *(
        "attention_dropout",
        "layer_norm_elementwise_affine",
        "init_std",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ),
)


def gptj_rows(target: str = "language_model") -> list[Row]:
    """Return the rows of GPT-J."""
    layer = "transformer.h.{}"
    return [
        Row("transformer.wte.weight", f"{target}.transformer.wte.weight"),
        # The causal mask, which is computed.
        *(Row(f"{layer}.attn.{name}", None, optional=True) for name in ("bias", "masked_bias")),
        *(Row(f"{layer}.attn.{name}.weight", f"{target}.{layer}.attn.{name}.weight") for name in GPTJ_PROJECTIONS),
        *(
            Row(f"{layer}.{part}.{{}}", f"{target}.{layer}.{part}.{{}}")
            for part in ("mlp.fc_in", "mlp.fc_out", "ln_1")
        ),
        Row("transformer.ln_f.{}", f"{target}.transformer.ln_f.{{}}"),
        Row("lm_head.{}", f"{target}.lm_head.{{}}"),
    ]


GPTJ_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def opt_rows(source: str, head: str, target: str = "language_model") -> list[Row]:
    """Return the rows of OPT; `source` is its decoder."""
    ours, layer = f"{target}.model.decoder", f"{source}.layers.{{}}"
    words = (f"{ours}.embed_tokens.weight", f"{target}.lm_head.weight")
    return [
        Row(f"{source}.embed_tokens.weight", words, tied(2)),
        # The table of words again.
        Row(f"{head}.weight", None, optional=True),
        Row(f"{source}.embed_positions.weight", f"{ours}.embed_positions.weight"),
        Row(f"{layer}.self_attn.{{}}.{{}}", f"{ours}.layers.{{}}.self_attn.{{}}.{{}}"),
        Row(f"{layer}.{{}}.{{}}", f"{ours}.layers.{{}}.{{}}.{{}}"),
        Row(f"{source}.final_layer_norm.{{}}", f"{ours}.final_layer_norm.{{}}"),
    ]


def t5_rows(source: str = "", target: str = "language_model", *, own_head: bool = True) -> list[Row]:
    """Return the rows of a T5, in general with an output layer of its own; `source` ends in a dot."""
    coders = ("encoder", "decoder")
    words = (f"{target}.shared.weight", *(f"{target}.{coder}.embed_tokens.weight" for coder in coders))
    head = f"{target}.lm_head.weight"
    words = words if own_head else (*words, head)
    return [
        Row(f"{source}shared.weight", words, tied(len(words))),
        # The shared table again.
        *(Row(f"{source}{coder}.embed_tokens.weight", None, optional=True) for coder in coders),
        *(Row(f"{source}{coder}.block.{{...}}", f"{target}.{coder}.block.{{...}}") for coder in coders),
        *(
            Row(f"{source}{coder}.final_layer_norm.weight", f"{target}.{coder}.final_layer_norm.weight")
            for coder in coders
        ),
        *([Row(f"{source}lm_head.weight", head)] if own_head else ()),
    ]


def language_rows(kind: str, source: str = "") -> list[Row]:
    """Return the rows of a language model by its model_type, in transformers' names; `source` ends in a dot."""
    if kind == "opt":
        return opt_rows(f"{source}model.decoder", f"{source}lm_head")
    return t5_rows(source) if kind == "t5" else llama_rows(f"{source}model", f"{source}lm_head")
