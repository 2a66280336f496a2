import re
from typing import Any

import torch
from torch import Tensor

from hfvlm.conversion.coca import config_from_original
from hfvlm.models.coca import HfvlmCoCaModel, HfvlmCoCaTokenizer
from tests.originals.common import converted, vocabulary
from tests.support.golden import Golden, Recorder

# Of the original's `generate`; whose beams a case that does not say it has three of.
GENERATE = ("sot", "eos", "pad", "seq_len", "min_seq_len", "num_beams", "num_beam_groups")


def compare(golden: Golden) -> None:
    # The constructor's options are checked where they are converted.
    golden.check(constructor=golden.section("constructor"), generate=GENERATE)
    if golden.state_dict:
        model_outputs(golden)
    else:
        tokens(golden)


def tokens(golden: Golden) -> None:
    tokenizer = HfvlmCoCaTokenizer.from_vocabulary(vocabulary(golden.folder, "bpe_simple_vocab_16e6.txt.gz"))
    for row in golden.case["texts"]:
        # open_clip spells the special tokens in another way, so that these words are no special tokens there.
        if not re.search(r"<(\|startoftext\||\|endoftext\||start_of_text|end_of_text)>", row["text"]):
            ids = row["ids"]
            assert tokenizer(row["text"], padding=False)["input_ids"] == ids, row["text"]
            assert tokenizer(row["text"])["input_ids"] == ids + [0] * (76 - len(ids)), row["text"]


@torch.no_grad()
def model_outputs(golden: Golden) -> None:
    config = config_from_original(golden.case, golden.state_dict)
    model: HfvlmCoCaModel = converted("coca", golden.state_dict, config, "open_clip")
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model))}
    image, text = golden.inputs["image"], golden.inputs["text"]
    with Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        output = model(text, image, return_loss=True)
    values = {name: seen[path] for name, path in paths.items()}
    context, config = model.read(image), config.text_config
    values |= {
        "text.pooled": values.get("text.pooled", seen["text_model.post_norm"]),
        "image_features": output.vision_model_output.pooler_output,
        "image_embs": context.tokens,
        "text_features": output.text_model_output.pooler_output,
        "token_embs": output.text_model_output.last_hidden_state,
        "image_features_normalized": output.image_embeds,
        "text_features_normalized": output.text_embeds,
        "text_features_normalized_release_2_24_0": output.text_embeds,
        "logits": output.logits,
        "logits_per_image": output.logits_per_image,
        "loss": output.loss,
        "caption_loss": 2 * output.text_losses.sum() / output.text_lengths.sum(),
        "generate_early_eos_id": golden.outputs.get("generate_early_eos_id"),
    }
    values["contrastive_loss"] = output.loss - values["caption_loss"]
    values |= generated(golden, model)
    for name in golden.in_order():
        if name.endswith("_release_2_24_0") and not name.startswith("text_features"):
            # That release sees more of the padding where there is padding, and nowhere else.
            newer = {"logits_release_2_24_0": "logits", "text.last_block_release_2_24_0": "text.last_block"}[name]
            real = torch.cat([text != config.pad_token_id, torch.ones_like(text[:, :1], dtype=torch.bool)], dim=1)
            golden.compare(name, values[newer], real[:, : values[newer].shape[1], None])
        else:
            golden.compare(name, values[name])


def generated(golden: Golden, model: HfvlmCoCaModel) -> dict[str, Tensor]:
    image, setting = golden.inputs["image"], golden.section("generate")
    if not setting:
        return {}
    assert setting.get("num_beam_groups", 1) == 1, "the original's groups of beams fall back to plain beams"
    model.generation_config.update(
        bos_token_id=setting["sot"], eos_token_id=setting["eos"], pad_token_id=setting["pad"]
    )
    lengths: dict[str, Any] = {"max_length": setting["seq_len"], "min_length": setting["min_seq_len"]}
    whole: dict[str, Any] = {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    free = model.generate(image, max_length=setting["seq_len"], **whole)
    values = {
        "generate_greedy": model.generate(image, **lengths),
        "generate_beam": model.generate(image, num_beams=setting.get("num_beams", 3), **lengths),
        "greedy_free_running_ids": free.sequences,
        "greedy_free_running_logits": torch.stack(free.logits, dim=1),
    }
    if "prefix" in golden.inputs:
        values["generate_greedy_prefix"] = model.generate(image, golden.inputs["prefix"], **lengths)
    if "generate_early_eos_id" in golden.outputs:
        early = int(golden.outputs["generate_early_eos_id"])
        values["generate_greedy_early_eos"] = model.generate(image, eos_token_id=early, **lengths)
    return values


def module_path(name: str, model: HfvlmCoCaModel) -> str | None:
    """Where an intermediate of the original is in ours."""
    fixed = {
        "vision.patch_embeddings": "vision_model.patches.projection",
        "vision.ln_pre": "vision_model.pre_norm",
        "vision.last_block": f"vision_model.layers.{len(model.vision_model.layers) - 1}",
        "vision.pooler": "vision_model.pool",
        "vision.ln_post": "vision_model.post_norm",
        "text.embeddings": "text_model.layers.0:input",
        "text.last_block": f"text_model.layers.{len(model.text_model.layers) - 1}",
        "text.pooled": "text_model.post_norm",
        "decoder.last_cross_block": f"text_model.grounding_layers.{len(model.text_model.grounding_layers) - 1}",
        "decoder.ln_final": "text_model.multimodal_norm",
    }
    if block := re.fullmatch(r"(vision|text|decoder)\.(self_|cross_)?block(\d+)", name):
        tower = {"vision": "vision_model.layers", "text": "text_model.layers"}.get(block[1])
        upper = {"self_": "multimodal_layers", "cross_": "grounding_layers"}.get(block[2])
        return f"{tower or f'text_model.{upper}'}.{block[3]}"
    return fixed.get(name)
