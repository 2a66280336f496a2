"""LLaVA on other language models: MPT, Llama 3 and Qwen 1.5."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion import llava
from hfvlm.models.llava import HfvlmLLaVATokenizer
from hfvlm.processing.vocabularies import VocabularyError
from hfvlm.training.chat import ChatCollator
from tests.models.llava.tiny import GRID, original_config, tiny_model, vision_settings, write
from tests.support.suite import close

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "learned_pos_emb": False}
# Of each conversation: the special tokens of its language model, its sizes, the original's name of the model.
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
KINDS = {
    "llava_llama_3": (LLAMA_3, SIZES | {"model_type": "llama"}, "llava_llama"),
    "qwen_1_5": (CHATML, SIZES | {"model_type": "qwen2"}, "llava_qwen"),
    "mpt": (CHATML, MPT, "llava_mpt"),
}
PRESETS = {
    "llava_llama_3": "llama3-llava-next-8b",
    "qwen_1_5": "llava-next-72b",
    "mpt": "llava-lightning-mpt-7b-preview",
}
ATTENTION = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "clip_qkv": None, "qk_ln": False}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? <|im_end|> <|eot_id|>"}]}
TURNS = [
    QUESTION,
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So.\nYes."},
]


def release(folder, kind):
    """A small model as its authors release theirs, with rows to spare, or tokens around images."""
    special, text, original = KINDS[kind]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    mpt, size = kind == "mpt", len(letters) + len(special) + 3
    fields = {"projector_depth": 1} if mpt else {"grid_pinpoints": GRID, "patch_merge": "spatial_unpad"}
    model = tiny_model(text_config=text | {"vocab_size": size}, image_token_id=size, **fields)
    # What concerns images is the same on every language model.
    settings = original_config(tiny_model(**fields)) | {"mm_use_im_start_end": mpt, "mm_use_im_patch_token": mpt}
    settings |= {name: value for name, value in text.items() if name != "learned_pos_emb"}
    settings |= {"model_type": original, "vocab_size": size, "vision_config": vision_settings(model)}
    settings |= {"attn_config": ATTENTION, "no_bias": True, "image_aspect_ratio": "square"} if mpt else {}
    tower = f"{llava.tower_place(model.config)}.embeddings"
    tensors = restore_keys(model.state_dict(), llava.keys_for(model.config, "original", [tower]))
    source = write(folder / "release", "pytorch_model.bin", tensors, settings)
    engine = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    engine.save(str(source / "tokenizer.json"))
    return source, model


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory):
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    source, model = release(folder, kind)
    if kind != "llava_llama_3":
        return kind, model, hfvlm.convert(source, "llava", folder / "out")
    # Of so small a vocabulary nothing says that it is Llama 3's: the preset does.
    out = hfvlm.convert(source, "llava", folder / "out", vocabulary="none")
    settings = hfvlm.load_preset(f"llava/{PRESETS[kind]}").processor
    llava.processor_for(model.config, settings, source / "tokenizer.json").save_pretrained(out)
    return kind, model, out


def test_releases_convert_and_answer(converted):
    kind, model, folder = converted
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        close(value, model.state_dict()[name], 0.0, name)
    assert type(loaded.config.text_config) is type(model.config.text_config)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.conversation == kind
    assert processor.image_token_id == model.config.image_token_id
    images = torch.randint(0, 255, (2, 3, 40, 30), dtype=torch.uint8)
    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    inputs = processor(images=list(images), text=[text, text])
    new = loaded.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    plain = loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, use_cache=False)
    assert torch.equal(new, plain)
    with torch.no_grad():
        logits = [loaded(**processor(images=[image], text=text)).logits[:, -1] for image in images]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


# Each conversation of TURNS, with the images' tokens as one, and what of it is trained on, between brackets.
WRITTEN = {
    "llava_llama_3": (
        "[<|begin_of_text|><|start_header_id|>]system[<|end_header_id|>]\n\nSYSTEM[<|eot_id|><|start_header_id|>]user"
        "[<|end_header_id|>]\n\nIMAGE\nWhat? <|im_end|> <|eot_id|>[<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\nA cat.<|eot_id|><|start_header_id|>]user[<|end_header_id|>]\n\nWhy?[<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.\nYes.<|eot_id|>]"
    ),
    "qwen_1_5": (
        "[<|im_start|>]system[\n]SYSTEM[<|im_end|>\n<|im_start|>]user[\n]IMAGE[\n]What? <|im_end|> <|eot_id|>"
        "[<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>]user[\n]Why?[<|im_end|>\n"
        "<|im_start|>assistant\nSo.\nYes.<|im_end|>\n]"
    ),
    "mpt": (
        "<|im_start|>system\nSYSTEM<|im_end|><|im_start|>user\n<im_start>IMAGE<im_end>\nWhat? <|im_end|> <|eot_id|>"
        "<|im_end|><|im_start|>assistant\n[A cat.<|im_end|>]<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
        "[So.\nYes.<|im_end|>]"
    ),
}


def test_conversations_and_labels_are_the_authors(converted):
    kind, _, folder = converted
    processor = AutoProcessor.from_pretrained(folder)
    system = processor.style.system.rpartition("system\n")[2] if kind == "mpt" else processor.style.system
    image = torch.randint(0, 255, (3, 30, 40), dtype=torch.uint8)
    batch = ChatCollator(processor)([{"messages": TURNS, "images": [image]}])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    written, trained = "", False
    for i, label in zip(ids, labels, strict=True):
        if i == processor.image_token_id:
            assert label == -100
            written = written if written.endswith("IMAGE") else written + ("]" if trained else "") + "IMAGE"
            trained = False
            continue
        assert label in (i, -100)
        if (label == i) != trained:
            written, trained = written + "]["[label == i], label == i
        written += processor.tokenizer.decode([i])
    written += "]" if trained else ""
    assert written.replace(system, "SYSTEM") == WRITTEN[kind]
    prompt = processor.apply_chat_template(TURNS[:1], add_generation_prompt=True)
    whole = processor.apply_chat_template(TURNS)
    assert whole.startswith(prompt)


@pytest.mark.parametrize("kind", PRESETS)
def test_presets_are_what_the_originals_say(kind):
    preset = hfvlm.load_preset(f"llava/{PRESETS[kind]}")
    text = preset.config["text_config"]
    original = {name: value for name, value in text.items() if name not in ("learned_pos_emb", "model_type")}
    original |= {"model_type": KINDS[kind][2], "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    original |= {"mm_projector_type": "mlp2x_gelu", "attn_config": ATTENTION if kind == "mpt" else None}
    found = llava.config_from_original(original, {}).text_config.to_dict()
    assert found == preset.make_config().text_config.to_dict()
    settings = llava.settings_from_original(original, {})
    assert settings["conversation"] == preset.processor["conversation"]
    assert settings["tokenizer"].items() <= (preset.processor["tokenizer"] | {"added": []}).items()


def test_what_no_code_computes_is_refused(tmp_path):
    for changes in ({"attn_config": ATTENTION | {"qk_ln": True}}, {"expansion_ratio": 2}, {"no_bias": False}):
        with pytest.raises(UnsupportedOriginalError, match="config.json"):
            llava.text_config_of(MPT | {"model_type": "llava_mpt", "attn_config": ATTENTION} | changes, 300)
    source, _ = release(tmp_path, "qwen_1_5")
    with pytest.raises(VocabularyError, match="has no <.eot_id.>: this is the vocabulary of another model"):
        HfvlmLLaVATokenizer.from_vocabulary(source / "tokenizer.json", eos_token="<|eot_id|>")
