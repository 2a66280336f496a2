"""Qwen-VL's releases become what they were made from."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.key_table import KeyTableError, convert_keys, restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.qwen_vl import config_from_original, keys_for
from hfvlm.models.qwen_vl import HfvlmQwenVLForConditionalGeneration
from hfvlm.presets import load_preset
from tests.support.paths import OURS
from tests.support.suite import close

CASES = OURS / "qwen_vl"
VOCABULARY = CASES / "processor-tokenizer" / "qwen.tiktoken"
# As the release writes config.json.
VISUAL = {"width": 64, "mlp_ratio": 2.0, "layers": 2, "heads": 2, "image_size": 56, "patch_size": 14}
VISUAL |= {"output_dim": 128, "n_queries": 16, "image_start_id": 614}
ORIGINAL = {
    "model_type": "qwen",
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 256,
    "max_position_embeddings": 1024,
    "visual": VISUAL,
}


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = HfvlmQwenVLForConditionalGeneration(load_preset("qwen_vl/tiny").make_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def release(folder, tensors, shards=1, kind="bin", **settings):
    """A released folder, in one file or several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGINAL | settings))
    shutil.copy(VOCABULARY, folder)
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    write = torch.save if kind == "bin" else save_file
    if shards == 1:
        write(tensors, folder / f"{stem}.{kind}")
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"{stem}-{i + 1:05}-of-{shards:05}.{kind}"
        part = dict(list(tensors.items())[i::shards])
        write(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def original(model):
    return restore_keys(model.state_dict(), keys_for(model.config))


def same_weights(folder, expected):
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        close(value, expected[name], 1e-6, name)
    return loaded


def test_its_own_configuration_is_the_presets():
    expected = load_preset("qwen_vl/tiny").make_config().to_dict()
    assert config_from_original(ORIGINAL, {}).to_dict() == expected
    notes = json.loads((CASES / "full-notes.json").read_text())["Qwen-VL-Chat.json"]
    for name in ("qwen-vl", "qwen-vl-chat"):
        assert config_from_original(notes, {}).to_dict() == load_preset(name).make_config().to_dict()


@pytest.mark.parametrize(("shards", "kind"), [(1, "bin"), (3, "bin"), (3, "safetensors")])
def test_a_whole_release(model, shards, kind, tmp_path):
    source = release(tmp_path / "Qwen-VL", original(model), shards, kind)
    folder = hfvlm.convert(source, "qwen_vl", tmp_path / "out")
    loaded = same_weights(folder, model.state_dict())
    assert loaded.config.text_config.trained_length == 256
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_token_id == loaded.config.image_token_id == 616
    assert (processor.conversation, processor.num_queries) == ("chatml", 16)


def test_a_release_in_bfloat16_keeps_its_positions(model, tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in original(model).items()}
    folder = hfvlm.convert(release(tmp_path / "Qwen-VL", tensors), "qwen_vl", tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert loaded.dtype == loaded.projector.position.dtype == torch.bfloat16
    assert torch.equal(loaded.projector.position, model.projector.position.bfloat16())


QUANTIZED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def packed(codes, bits=4):
    """Codes along the first axis, the lowest bits first, in int32."""
    words = np.zeros((len(codes) * bits // 32, codes.shape[1]), np.uint32)
    for i, row in enumerate(codes.numpy().astype(np.uint32)):
        words[i * bits // 32] |= row << np.uint32(i * bits % 32)
    return torch.from_numpy(words.view(np.int32).copy())


def quantized(tensors):
    """A release as AutoGPTQ writes it, and the weights that its codes stand for."""
    tensors, plain = dict(tensors), dict(tensors)
    for i, name in itertools.product(range(3), QUANTIZED):
        layer = f"transformer.h.{i}.{name}"
        rows, columns = tensors.pop(f"{layer}.weight").shape
        codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(1, 16, (columns // 32, rows))
        scales = (torch.rand(columns // 32, rows) * 0.02).half()
        groups = torch.randint(0, columns // 32, (columns,), dtype=torch.int32)
        tensors |= {f"{layer}.qweight": packed(codes), f"{layer}.qzeros": packed(zeros.t() - 1).t().contiguous()}
        tensors |= {f"{layer}.scales": scales, f"{layer}.g_idx": groups}
        tensors.setdefault(f"{layer}.bias", torch.zeros(rows).half())
        steps = torch.stack([codes[c] - zeros[groups[c]] for c in range(columns)])
        plain[f"{layer}.weight"] = (steps.half() * torch.stack([scales[g] for g in groups])).t()
    return tensors, plain


def test_a_quantized_release(model, tmp_path):
    tensors, plain = quantized(original(model))
    source = release(tmp_path / "Int4", tensors, shards=2, kind="safetensors", quantization_config=GPTQ)
    expected = convert_keys(plain, keys_for(model.config), model.state_dict())
    folder = hfvlm.convert(source, "qwen_vl", tmp_path / "out")
    loaded = same_weights(folder, expected)
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.float32}
    assert "quantization_config" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"bits": 3}, {}, "bits 3 .* hfvlm reads 'gptq' of 2, 4, 8 bits"),
        ({"quant_method": "awq"}, {}, "quant_method 'awq'"),
        ({}, {"transformer.h.0.mlp.w1.scales": None}, "missing, the first is transformer.h.0.mlp.w1.scales"),
        ({}, {"transformer.h.0.mlp.w1.bias": torch.ones(256)}, "transformer.h.0.mlp.w1.bias is not zero"),
        ({}, {"transformer.h.0.mlp.w1.g_idx": torch.full((128,), 4, dtype=torch.int32)}, "groups from 4 to 4 of 4"),
        ({}, {"transformer.h.0.mlp.w1.g_idx": torch.zeros(64, dtype=torch.int32)}, "do not fit scales"),
    ],
)
def test_a_quantized_release_that_is_damaged(model, settings, changes, message, tmp_path):
    tensors = {key: x for key, x in (quantized(original(model))[0] | changes).items() if x is not None}
    source = release(tmp_path / "Int4", tensors, quantization_config=GPTQ | settings)
    with pytest.raises(CheckpointError, match=message):
        hfvlm.convert(source, "qwen_vl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_its_base(model, tmp_path):
    """As the authors' finetune.py writes it: their names, inside PEFT's."""
    names = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    tensors = original(model)
    base = release(tmp_path / "Qwen-VL-Chat", tensors)
    adapter, changed = {}, dict(tensors)
    for i in range(3):
        for name in names:
            key = f"transformer.h.{i}.{name}.weight"
            rows, columns = tensors[key].shape
            down, up = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1
            start = f"base_model.model.transformer.h.{i}.{name}"
            adapter |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
            changed[key] = tensors[key] + 0.25 * up @ down
    source = tmp_path / "output_qwen"
    source.mkdir()
    torch.save(adapter, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 1}))
    folder = hfvlm.convert(source, "qwen_vl", tmp_path / "out", parts={"base": base})
    tuned = hfvlm.convert(release(tmp_path / "whole", changed), "qwen_vl", tmp_path / "expected")
    same_weights(folder, AutoModelForImageTextToText.from_pretrained(tuned).state_dict())
    with pytest.raises(FileNotFoundError, match="needs its base"):
        hfvlm.convert(source, "qwen_vl", tmp_path / "none", original=ORIGINAL)


def test_an_adapter_of_ours_reaches_the_same_layers(model):
    layers = [*hfvlm.models.qwen_vl.architecture.lora]
    tuned = get_peft_model(model, LoraConfig(target_modules=rf"language_model\..*\.({'|'.join(layers)})"))
    assert sum("lora_A" in name for name, _ in tuned.named_parameters()) == 3 * len(layers)


def test_what_is_missing_or_strange_is_named(model, tmp_path):
    tensors = original(model)
    gone = tensors.pop("transformer.visual.attn_pool.query")
    source = release(tmp_path / "Qwen-VL", tensors | {"transformer.visual.stranger": gone})
    with pytest.raises(KeyTableError, match="transformer.visual.stranger.*projector.query"):
        hfvlm.convert(source, "qwen_vl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "does not implement tie_word_embeddings"),
        ({"kv_channels": 16}, "kv_channels 16 times num_attention_heads 4 must be hidden_size 128"),
    ],
)
def test_unsupported_originals(changes, message):
    with pytest.raises(UnsupportedOriginalError, match=message):
        config_from_original(ORIGINAL | changes, {})


def test_another_models_vocabulary(model, tmp_path):
    source = release(tmp_path / "Qwen-VL", original(model))
    lines = VOCABULARY.read_text().splitlines()[:-1]
    (source / "qwen.tiktoken").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="its placeholder is 615, the model's 616"):
        hfvlm.convert(source, "qwen_vl", tmp_path / "out")
