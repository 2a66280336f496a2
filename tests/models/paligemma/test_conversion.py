"""PaliGemma's, Gemma's and the masks' files become what they were made from."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import hfvlm
from hfvlm.checkpoints.key_table import KeyTableError
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.paligemma import config_from_original, keys_for
from hfvlm.presets import list_presets, load_preset
from tests.originals.common import converted
from tests.support.golden import Golden
from tests.support.paths import OURS
from tests.support.suite import close

CASES = OURS / "paligemma"
VOCABULARY = CASES / "processor-text" / "base.model"


@pytest.fixture
def release(tmp_path):
    """A case's weights as a released file."""

    def write(case, name, *, prefix="params/", half=False):
        golden = Golden(CASES / case)
        arrays = {f"{prefix}{key.replace('.', '/')}": t.numpy() for key, t in golden.state_dict.items()}
        if half:  # as JAX stores what NumPy has no name for
            arrays = {
                key: torch.from_numpy(a).bfloat16().view(torch.int16).numpy().view("V2") for key, a in arrays.items()
            }
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name, golden

    return write


def test_paligemma_2_in_bfloat16(release, tmp_path):
    path, golden = release("paligemma2-prefix-suffix", "paligemma2.npz", half=True)
    (tmp_path / "config.json").write_text(json.dumps({"gemma": golden.case["arguments"]["gemma"]}))
    folder = hfvlm.convert(path, "paligemma", tmp_path / "out", vocabulary="none")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert set(model.config.text_config.layer_types) == {"full_attention"}
    assert model.config.text_config.final_logit_softcapping is None
    assert model.config.text_config.attn_logit_softcapping == 2.0
    stored = golden.state_dict["llm.layers.attn.kv_einsum.w"][1, 1]
    ours = model.language_model.model.layers[1].self_attn.v_proj.weight
    close(ours.float(), stored.transpose(1, 2).reshape(-1, stored.shape[1]).bfloat16().float(), 0.0, "values")


def test_the_vocabulary_must_be_the_models(release, tmp_path):
    path, _ = release("several-pictures", "paligemma.npz")
    with pytest.raises(ValueError, match="its pieces are 1552, the model's 96"):
        hfvlm.convert(path, "paligemma", tmp_path / "out", vocabulary=VOCABULARY)


def test_what_is_strange_is_named(release, tmp_path):
    path, _ = release("several-pictures", "paligemma.npz")
    arrays = dict(np.load(path))
    arrays["params/llm/stranger"] = arrays.pop("params/llm/final_norm/scale")
    np.savez(path, **arrays)
    with pytest.raises(KeyTableError, match=r"params/llm/stranger.*language_model\.model\.norm\.weight"):
        hfvlm.convert(path, "paligemma", tmp_path / "out", vocabulary="none")


def test_gemma_alone(release, tmp_path):
    path, golden = release("gemma-mha", "gemma.npz", prefix="")
    (tmp_path / "config.json").write_text(json.dumps({"gemma": golden.case["arguments"]["gemma"]}))
    folder = hfvlm.convert(path, "paligemma", tmp_path / "out", vocabulary=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "GemmaForCausalLM"
    with torch.no_grad():
        close(model(golden.inputs["tokens"]).logits, golden.outputs["causal.logits"], 1e-5, "logits")
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 2


def test_layers_that_were_not_scanned(release):
    golden = Golden(CASES / "gemma-mqa")
    tensors = {}
    for key, tensor in golden.state_dict.items():
        key = key.replace(".", "/")
        if key.startswith("layers/"):
            tensors |= {key.replace("layers/", f"layers/{i}/"): part for i, part in enumerate(tensor)}
        else:
            tensors[key] = tensor
    config = config_from_original(golden.case, tensors)
    assert config.num_hidden_layers == 2
    model = converted("paligemma", tensors, config, "gemma")
    with torch.no_grad():
        close(model(golden.inputs["tokens"]).logits, golden.outputs["causal.logits"], 1e-5, "logits")


def test_masks(tmp_path):
    golden = Golden(CASES / "mask-vqvae")
    np.savez(tmp_path / "vae-oid.npz", **{key: tensor.numpy() for key, tensor in golden.state_dict.items()})
    folder = hfvlm.convert(tmp_path / "vae-oid.npz", "paligemma/vae-oid", tmp_path / "out")
    model = AutoModel.from_pretrained(folder)
    close(model.decode_codes(golden.outputs["decode.indices"]), golden.outputs["decode.mask"], 1e-5, "masks")


def test_options_that_change_the_numbers_are_refused():
    shapes = {key.replace(".", "/"): t for key, t in Golden(CASES / "several-pictures").state_dict.items()}
    with pytest.raises(UnsupportedOriginalError, match="pool_type 'map'"):
        config_from_original({"img": {"pool_type": "map"}}, shapes)
    with pytest.raises(UnsupportedOriginalError, match="window"):
        config_from_original({"gemma": {"window": 8}}, shapes)
    with pytest.raises(UnsupportedOriginalError, match="without its norms"):
        config_from_original({"gemma": {"attn_logits_softcap": 50.0}}, shapes)
    with pytest.raises(UnsupportedOriginalError, match="norm_eps 1e-05"):
        config_from_original({"gemma": {"norm_eps": 1e-5}}, shapes)


def test_the_largest_gemma_2_scales_queries_by_its_width():
    scalars = {
        name: load_preset(name).make_config().text_config for name in list_presets("paligemma") if "gemma2" in name
    }
    for name, text in scalars.items():
        assert text.query_pre_attn_scalar == (144 if "28b" in name else 256)
        assert text.final_logit_softcapping is None
        assert set(text.layer_types) == {"full_attention"}
    assert keys_for(load_preset("paligemma/gemma-7b").make_config(), "gemma")


def test_a_card_says_the_licence(release, tmp_path):
    path, _ = release("several-pictures", "paligemma.npz")
    folder = hfvlm.convert(path, "paligemma", tmp_path / "out", vocabulary="none")
    with pytest.raises(PermissionError):
        hfvlm.push(folder, "me/paligemma")
