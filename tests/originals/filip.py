import re

import torch

from hfvlm.conversion.filip import config_from_original, layout_of
from hfvlm.losses import contrastive_loss, late_interaction_scores
from hfvlm.losses.late_interaction import most_alike, positions_of_most_alike
from hfvlm.models.filip import HfvlmFILIPModel
from tests.originals.common import converted
from tests.support.golden import Golden, Recorder

# Those that decide a value are read where they are converted, or stand in the shapes of the weights.
CONSTRUCTOR = {
    "constructor": ("image_encode", "text_encode", "clip", "dense_mapping_image", "dense_mapping_language"),
    "constructor__image_encode": (
        *("input_resolution", "patch_size", "width", "layers", "heads", "embed_dim", "checkpoint"),
    ),
    "constructor__text_encode": (
        *("embed_dim", "context_length", "transformer_width", "transformer_heads", "transformer_layers"),
        *("text_encode_type", "text_model_utils"),
    ),
    "constructor__clip": (
        *("use_allgather", "text_mask_type", "return_dense", "return_nn_bank", "select_topk", "feature_dim"),
        *("dense_embed_dim", "mask_rate", "patch_number"),
    ),
}


def compare(golden: Golden) -> None:
    golden.check(**CONSTRUCTOR)
    config = config_from_original(golden.case, golden.state_dict)
    model = converted("filip", golden.state_dict, config, layout_of(golden.case))
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model))}
    with torch.no_grad(), Recorder(model, sorted(set(paths.values()))) as seen:
        output = model(golden.inputs["text"].long(), golden.inputs["image"], return_loss=True)
        values = {name: seen[path] for name, path in paths.items()}
    image, text, scale, count = output.image_embeds, output.text_embeds, output.logit_scale, config.top_k
    pictures, texts = output.vision_model_output, output.text_model_output
    whole = output.summary_scale * output.image_summary_embeds @ output.text_summary_embeds.t()
    values |= {
        "image_features": pictures.summary,
        "image_dense": pictures.last_hidden_state[:, 1:],
        "text_features": texts.summary,
        "logits_per_image": whole,
        "logits_per_text": whole.t(),
        "dense_logits_per_image": scale
        * late_interaction_scores(image, most_alike(text, image, None, None, count)[0]),
        "dense_logits_per_text": scale * late_interaction_scores(text, most_alike(image, text, None, None, count)[0]),
        "selected_patches": positions_of_most_alike(image, text, None, None, count).sort().values,
        "selected_tokens": positions_of_most_alike(text, image, None, None, count).sort().values,
        "clip_loss": contrastive_loss(output.image_summary_embeds, output.text_summary_embeds, output.summary_scale),
        "dense_loss": output.loss,
        "loss": output.loss,
        "eval_dense_scores": output.logits_per_image / scale,
    }
    for name in golden.in_order():
        golden.compare(name, values[name])


def module_path(name: str, model: HfvlmFILIPModel) -> str | None:
    """Where an intermediate of the original is in ours."""
    fixed = {
        "text.embeddings": "text_model.embeddings",
        "text.ln_final": "text_model.post_norm",
        "vision.ln_pre": "vision_model.pre_norm",
        "vision.last_block": f"vision_model.layers.{len(model.vision_model.layers) - 1}",
        "image_dense_mapped": "vision_model.projection",
        "text_dense_mapped": "text_model.projection",
    }
    block = re.fullmatch(r"(text|vision)\.block(\d+)", name)
    return f"{block[1]}_model.layers.{block[2]}" if block else fixed.get(name)
