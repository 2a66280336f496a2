"""BLIP-2's releases, put together by the command line's ways, and transformers' own folders both ways."""

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import convert_keys, restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion import blip2 as module
from hfvlm.models.blip2 import (
    HfvlmBLIP2Config,
    HfvlmBLIP2ImageProcessor,
    HfvlmBLIP2Processor,
    HfvlmBLIP2Tokenizer,
    HfvlmInstructBLIPProcessor,
)
from hfvlm.training import ChatCollator
from tests.models.blip2.test_modeling import LLAMA, OPT, QFORMER, T5, VISION, WORDS
from tests.support.golden import GOLDENS
from tests.support.suite import close

CASES = GOLDENS / "blip2"
BERT = CASES / "opt-eva" / "bert_vocab.txt"
SIZES = {"opt": 98, "t5": 102, "llama": 480}
WORD_COUNT = 105  # of the cases' BERT with [DEC]
TEXTS = {"opt": OPT, "t5": T5, "llama": LLAMA}
VISION = VISION | {"intermediate_size": 104}  # as EVA's is, 4.3637 times the width
NATIVE = {name: VISION[name] for name in VISION if name != "initializer_range"}


def text_config(kind):
    return TEXTS[kind] | {"vocab_size": SIZES[kind] + (kind == "llama")}


def tiny(kind, *, reads=False):
    """A small model of the second stage, or with `kind` None of the first."""
    words = WORDS | {"vocab_size": WORD_COUNT, "bos_token_id": WORD_COUNT - 1, "eos_token_id": 3}
    head = module.GENERATIVE[kind == "t5"] if kind else "HfvlmBLIP2ForPreTraining"
    size = text_config(kind)["vocab_size"] if kind else 50
    config = HfvlmBLIP2Config(
        architectures=[head],
        vision_config=VISION,
        qformer_config=(words | {"projection_dim": 16}) if not kind else (words if reads else QFORMER),
        text_config=text_config(kind) if kind else None,
        image_token_id=size,
        video_token_id=size + 1,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def released(model, folder, kind):
    """The model as LAVIS releases it: its own file, the tower's, and the language model's folder."""
    folder.mkdir()
    ours = model.state_dict()
    main = {key: tensor for key, tensor in ours.items() if not key.startswith(("vision_model.", "language_model."))}
    torch.save({"model": restore_keys(main, module.keys_for(model.config)), "epoch": 0}, folder / "release.pth")
    tower = {key: tensor for key, tensor in ours.items() if key.startswith("vision_model.")}
    tower = restore_keys(tower, module.vision_rows(model.config))
    depth = model.config.vision_config.num_hidden_layers
    unread = {key.replace("blocks.0", f"blocks.{depth}"): t for key, t in tower.items() if key.startswith("blocks.0")}
    torch.save(tower | unread | {"norm.weight": torch.ones(24), "head.bias": torch.zeros(3)}, folder / "tower.pth")
    if kind:
        language = copy.deepcopy(model.language_model)
        if kind == "llama":  # without the token that InstructBLIP adds
            language.resize_token_embeddings(SIZES[kind])
        language.save_pretrained(folder / "base")
    return folder


def vocabularies(folder, kind):
    """Where users have them: BERT's beside the release, the language model's in its folder."""
    (folder / "vocab.txt").write_text(BERT.read_text())
    if kind == "opt":
        for name in ("vocab.json", "merges.txt"):
            (folder / "base" / name).write_text((CASES / "opt-eva" / f"opt_{name}").read_text())
    elif kind == "t5":
        (folder / "base" / "tokenizer.json").write_text((CASES / "t5-eva" / "t5_tokenizer.json").read_text())
    elif kind == "llama":
        source = GOLDENS / "llava" / "processor-tokenizer" / "tokenizer.model"
        (folder / "base" / "tokenizer.model").write_bytes(source.read_bytes())


def convert(folder, kind, output, **options):
    tower = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 14}
    arguments = {"img_size": 28, "vision_override": tower, "bert_config": {"num_attention_heads": 2}}
    original = {"arguments": arguments, "sep_token_id": 3, "newline_token_id": 5}
    parts = {"vision": folder / "tower.pth"} | ({"base": folder / "base"} if kind else {})
    return hfvlm.convert(folder / "release.pth", "blip2", output, parts=parts, original=original, **options)


def same_model(folder, model):
    again = AutoModel.from_pretrained(folder)
    assert type(again) is type(model)
    for key, value in model.state_dict().items():
        if "embed_tokens" in key or "lm_head" in key:  # the row of the token that was added
            value, other = value[: SIZES["llama"]], again.state_dict()[key][: SIZES["llama"]]
            assert torch.equal(other, value), key
        else:
            assert torch.equal(again.state_dict()[key], value), key
    return again.eval()


@pytest.mark.parametrize("kind", ["opt", "t5", "llama"])
def test_a_release_is_put_together(kind, tmp_path):
    model = tiny(kind, reads=kind != "opt")
    folder = released(model, tmp_path / "release", kind)
    vocabularies(folder, kind)
    output = convert(folder, kind, tmp_path / "ours")
    again = same_model(output, model)
    assert all(check.passed for check in hfvlm.verify(output))
    record = json.loads((output / "conversion.json").read_text())
    assert set(record["parts"]) == {"vision", "base"}
    processor = AutoProcessor.from_pretrained(output)
    assert type(processor).__name__ == ("HfvlmBLIP2Processor" if kind == "opt" else "HfvlmInstructBLIPProcessor")
    pictures = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 60), "blue")]
    inputs = processor(images=pictures, text=["a photo", "what is this big dog"])
    with torch.no_grad():
        expected, actual = (each.generate(**inputs, max_new_tokens=4) for each in (model, again))
    assert torch.equal(actual, expected)
    written = processor.batch_decode(actual, new_tokens_only=inputs)
    assert len(written) == 2
    assert not any("photo" in text or "<image>" in text for text in written)
    hfvlm.export(output, tmp_path / "native")
    native_class = Blip2ForConditionalGeneration if kind == "opt" else InstructBlipForConditionalGeneration
    native = native_class.from_pretrained(tmp_path / "native").eval()
    theirs = (Blip2Processor if kind == "opt" else InstructBlipProcessor).from_pretrained(tmp_path / "native")
    batch = theirs(images=pictures, text=["a photo", "what is this big dog"], padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    for prefix in {name.removesuffix("input_ids") for name in inputs if name.endswith("input_ids")}:
        for i in range(2):  # transformers pads between images and texts, and what the Q-Former reads on the left
            left, right = (
                part[f"{prefix}input_ids"][i][part[f"{prefix}attention_mask"][i].bool()] for part in (batch, inputs)
            )
            assert torch.equal(left, right), prefix
    more = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if kind == "t5" else {}
    again.qformer_model.context_norm.eps = again.config.vision_config.layer_norm_eps  # transformers has one for both
    # Of one row: beside others, transformers' pads take positions of Vicuna's.
    batch, inputs, more = ({name: part[1:] for name, part in whole.items()} for whole in (batch, inputs, more))
    with torch.no_grad():
        left, right = native(**batch, **more).logits, again(**inputs, **more).logits
    close(right[:, -1], left[:, -1, : right.shape[-1]], 1e-5, "native")


def test_a_first_stage_is_put_together(tmp_path):
    model = tiny(None)
    folder = released(model, tmp_path / "release", None)
    vocabularies(folder, None)
    output = convert(folder, None, tmp_path / "ours")
    again = AutoModel.from_pretrained(output).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    processor = AutoProcessor.from_pretrained(output)
    assert type(processor).__name__ == "HfvlmBLIP2RetrievalProcessor"
    inputs = processor(images=[Image.new("RGB", (40, 30), "red")] * 2, text=["a photo of a dog", "two cats"])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
    with pytest.raises(UnsupportedOriginalError, match="load it as HfvlmBLIP2ForImageTextRetrieval"):
        hfvlm.export(output, tmp_path / "native")


def test_a_tower_of_clip_loses_what_follows_on_its_last_layer_but_one():
    config = HfvlmBLIP2Config(
        architectures=["HfvlmBLIP2ForPreTraining"],
        vision_config=VISION | {"model_type": "hfvlm_blip2_clip_vision", "intermediate_size": 96},
        qformer_config=WORDS | {"projection_dim": 16},
    )
    model = AutoModel.from_config(config)
    ours = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("vision_model.")}
    tower = restore_keys(ours, module.vision_rows(config))
    assert {"conv1.weight", "ln_pre.bias", "transformer.resblocks.1.attn.in_proj_weight"} <= set(tower)
    last = {key.replace("resblocks.1", "resblocks.2"): t for key, t in tower.items() if "resblocks.1" in key}
    whole = tower | last | {"ln_post.weight": torch.ones(24), "proj": torch.ones(24, 8)}
    table = module.vision_table(config, whole)
    found = convert_keys(table.tensors, table.rows, ours)
    assert all(torch.equal(found[key], tensor) for key, tensor in ours.items())
    arguments = {"vit_model": "clip_L", "img_size": 28, "bert_config": {"num_attention_heads": 2}}
    arguments["vision_override"] = {"width": 24, "layers": 2, "heads": 2, "patch_size": 14}
    main = restore_keys({k: t for k, t in model.state_dict().items() if k not in ours}, module.keys_for(config))
    found = module.config_from_original({"arguments": arguments, "sep_token_id": 3}, main)
    assert found.vision_config.to_diff_dict() == config.vision_config.to_diff_dict() | {"initializer_range": 0.02}
    assert found.qformer_config.context_size == 24


def test_what_is_missing_is_named(tmp_path):
    folder = released(tiny("opt"), tmp_path / "release", "opt")
    arguments = {"preset": "blip2", "output": tmp_path / "ours", "vocabulary": "none"}
    base = json.loads((folder / "base" / "config.json").read_text())
    sizes = {"vision_override": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 14}, "img_size": 28}
    original = {"arguments": sizes | {"bert_config": {"num_attention_heads": 2}}, "base_config": base}
    release = folder / "release.pth"
    with pytest.raises(FileNotFoundError, match="needs its vision .*eva_vit_g.pth"):
        hfvlm.convert(release, original=original, **arguments)
    with pytest.raises(FileNotFoundError, match="needs its base"):
        hfvlm.convert(release, original=original, parts={"vision": folder / "tower.pth"}, **arguments)
    with pytest.raises(UnsupportedOriginalError, match="sizes of the language model"):
        hfvlm.convert(release, original={"arguments": original["arguments"]}, **arguments)
    with pytest.raises(FileNotFoundError, match="vocab.json or tokenizer.json"):
        convert(folder, "opt", tmp_path / "ours")
    reading = released(tiny("t5", reads=True), tmp_path / "reading", "t5")
    vocabularies(reading, "t5")
    (reading / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="vocabulary \\(vocab.txt\\) is not there"):
        convert(reading, "t5", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    stage = released(tiny(None), tmp_path / "stage", None)
    parts = {"vision": stage / "tower.pth", "base": folder / "base"}
    with pytest.raises(CheckpointError, match="needs none: leave `base` out"):
        hfvlm.convert(stage / "release.pth", original=original | {"sep_token_id": 3}, parts=parts, **arguments)


def test_a_first_stage_embeds_and_reranks(tmp_path):
    model = tiny(None)
    model.save_pretrained(tmp_path)
    processor = module.processor_for(model.config, {}, BERT)
    processor.save_pretrained(tmp_path)
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    texts = ["a photo of a dog", "two cats", "a big red street", "women"]
    embedder = hfvlm.Embedder.from_pretrained(tmp_path)
    found = embedder.encode(image=pictures, text=texts, output="torch")
    assert found["image"].shape == (3, 3, 16)
    assert found["text"].shape == (4, 16)
    with torch.no_grad():
        output = model(**processor(images=pictures, text=texts))
    expected = output.logits_per_image / output.logit_scale
    close(embedder.similarity(found["image"], found["text"]), expected, 1e-4, "similarity")
    close(embedder.similarity(found["text"], found["image"]).t(), expected, 1e-4, "texts")
    per_image, per_text = hfvlm.rerank(tmp_path, pictures, texts, top_k=2)
    assert ((per_image > -100).sum(axis=1) == 2).all()
    assert ((per_text > -100).sum(axis=1) == 2).all()
    (caption,) = hfvlm.Captioner.from_pretrained(tmp_path)(pictures[:1], max_new_tokens=4)
    assert isinstance(caption, str)
    judged = pipeline("zero-shot-image-classification", model=str(tmp_path))(pictures[0], candidate_labels=texts)
    assert sum(row["score"] for row in judged) == pytest.approx(1, abs=1e-4)


# transformers


def natives():
    qformer = {name: WORDS[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    qformer |= {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 20, "encoder_hidden_size": 24}
    shared = {"vision_config": NATIVE, "qformer_config": qformer, "num_query_tokens": 3}
    joint = shared | {"qformer_config": qformer | {"use_qformer_text_input": True}, "image_text_hidden_size": 16}
    texts = {kind: TEXTS[kind] | {"vocab_size": 61} for kind in TEXTS}
    return {
        "retrieval": Blip2ForImageTextRetrieval(Blip2Config(**joint)),
        "opt": Blip2ForConditionalGeneration(Blip2Config(**shared, text_config=texts["opt"], image_token_index=60)),
        "model": Blip2Model(Blip2Config(**shared, text_config=texts["opt"], image_token_index=60)),
        "t5": Blip2ForConditionalGeneration(Blip2Config(**shared, text_config=texts["t5"], image_token_index=60)),
        "instruct": InstructBlipForConditionalGeneration(
            InstructBlipConfig(**shared, text_config=texts["llama"], image_token_index=60)
        ),
    }


@pytest.mark.parametrize("kind", ["retrieval", "opt", "model", "t5", "instruct"])
def test_folders_go_both_ways(kind, tmp_path):
    native = natives()[kind].eval()
    torch.manual_seed(0)
    for name, parameter in native.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2) if "qkv.bias" not in name else None
    native.save_pretrained(tmp_path / "native")
    ours = AutoModel.from_pretrained(
        hfvlm.convert(tmp_path / "native", "blip2", tmp_path / "ours", vocabulary="none")
    ).eval()
    asked = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    pixels = torch.randn(2, 3, 28, 28)
    if kind == "retrieval":
        text = {"input_ids": asked, "attention_mask": (asked != 0).long()}
        with torch.no_grad():
            expected = native(pixel_values=pixels, **text)
            actual = ours(pixel_values=pixels, **text)
            looked = native(pixel_values=pixels, **text, use_image_text_matching_head=True).logits_per_image
            matched = ours.match(asked, text["attention_mask"], ours.encode_image(pixels).image_tokens)
        close(actual.logits_per_image, expected.logits_per_image, 1e-5, "similarity")
        close(matched, looked, 1e-5, "matching")
    else:
        ids = torch.tensor([[60] * 3 + [2, 7, 8], [60] * 3 + [2, 9, 8]])
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "instruct":
            batch |= {"qformer_input_ids": asked, "qformer_attention_mask": (asked != 0).long()}
        more = {"decoder_input_ids": torch.tensor([[0, 5], [0, 6]])} if kind == "t5" else {}
        with torch.no_grad():
            close(ours(**batch, **more).logits, native(**batch, **more).logits, 1e-5, "logits")
    rows = module.keys_for(ours.config, "transformers")
    config = module.CONVERSION.export.config(ours.config)
    tensors = module.CONVERSION.export.tensors(restore_keys(ours.state_dict(), rows), config)
    config.save_pretrained(tmp_path / "exported")
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "exported" / "model.safetensors", {"format": "pt"})
    again, info = type(native).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in native.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_what_is_text_of_each_image():
    processor = HfvlmInstructBLIPProcessor.__new__(HfvlmInstructBLIPProcessor)
    said = {
        "<image>one": ["one"],
        "<image><image>both": ["both", "both"],
        "before<image>one<image><image>two": ["one", "two", "two"],
        "<image>": [""],
        "none": [],
    }
    assert {text: processor.text_of_each(text) for text in said} == said


def test_instructions_in_conversations(tmp_path):
    """The Q-Former reads the question that comes with an image, in training as in answering."""
    vocabulary = GOLDENS / "llava" / "processor-tokenizer" / "tokenizer.model"
    processor = module.processor_for(tiny("llama", reads=True).config, {}, vocabulary, BERT)
    picture = Image.new("RGB", (28, 28))
    messages = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a dog"}]
    batch = ChatCollator(processor)([{"messages": messages, "images": [picture]}])
    inputs = processor(images=[picture], text=["what is this?"])
    assert torch.equal(batch["qformer_input_ids"], inputs["qformer_input_ids"])
    assert torch.equal(batch["input_ids"][:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    trained = batch["labels"][batch["labels"] != -100].tolist()
    assert trained == processor.tokenizer("a dog</s>")["input_ids"][1:]


def test_videos(tmp_path):
    model = tiny("t5", reads=True)
    folder = released(model, tmp_path / "release", "t5")
    vocabularies(folder, "t5")
    processor = AutoProcessor.from_pretrained(convert(folder, "t5", tmp_path / "ours"))
    films = [[Image.new("RGB", (40, 30), (i * 60, j * 90, 5)) for i in range(3)] for j in range(2)]
    inputs = processor(videos=films, text=["what is this", "how many dogs are in the photo"])
    assert inputs["pixel_values_videos"].shape == (2, 3, 3, 28, 28)
    frames = processor.image_processor([frame for video in films for frame in video], return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"].flatten(0, 1), frames["pixel_values"])
    assert (inputs["input_ids"] == model.config.video_token_id).sum(dim=1).tolist() == [9, 9]
    asked = processor(images=[video[0] for video in films], text=["what is this", "how many dogs are in the photo"])
    assert torch.equal(inputs["qformer_input_ids"], asked["qformer_input_ids"])
    assert len(processor.batch_decode(model.generate(**inputs, max_new_tokens=3), new_tokens_only=inputs)) == 2
    with pytest.raises(ValueError, match="equally many frames: 2 texts, \\[3, 2\\] frames"):
        processor(videos=[films[0], films[1][:2]], text=["a", "b"])


def test_options_of_texts_about_videos(tmp_path):
    model = tiny("t5", reads=True)
    folder = released(model, tmp_path / "release", "t5")
    vocabularies(folder, "t5")
    processor = AutoProcessor.from_pretrained(convert(folder, "t5", tmp_path / "ours"))
    asked = {"videos": [[Image.new("RGB", (40, 30))] * 2], "text": "what is this"}
    plain = processor(**asked)["input_ids"][0]
    padded = processor(**asked, padding="max_length", max_length=30, return_mm_token_type_ids=True)
    assert padded["input_ids"].shape == (1, 30)
    assert (padded["mm_token_type_ids"] == 2).sum() == 6
    assert torch.equal(processor(**asked, truncation=True, max_length=8)["input_ids"][0], plain[:8])
    assert torch.equal(processor(**asked, add_special_tokens=False)["input_ids"][0], plain[:-1])
    with pytest.raises(ValueError, match="text 0 has 14 tokens with its media"):
        processor(**asked, truncation=True, max_length=5)
    with pytest.raises(ValueError, match="each text keeps its video"):
        processor(**asked, truncation="pictures", max_length=5)


def test_labels_are_what_the_authors_train_on():
    size = {"opt": SIZES["opt"], "t5": SIZES["t5"]}
    files = {"opt": CASES / "opt-eva" / "opt_vocab.json", "t5": CASES / "t5-eva" / "t5_tokenizer.json"}
    picture = Image.new("RGB", (28, 28))
    for kind, file in files.items():
        tokenizer = HfvlmBLIP2Tokenizer.from_vocabulary(file, kind=kind, size=size[kind])
        pixels = HfvlmBLIP2ImageProcessor(size=28)
        processor = HfvlmBLIP2Processor(pixels, tokenizer, num_queries=3, kind=kind)
        inputs = processor.captions([picture] * 2, ["a dog", "two cats on the street"])
        trained = [row[row != -100].tolist() for row in inputs["labels"]]
        said = [tokenizer.decode(row) for row in trained]
        end = {"opt": "\n", "t5": "</s>"}[kind]
        assert [text.replace("</s>", "").strip() for text in said] == ["a dog", "two cats on the street"]
        assert all(text.endswith(end) for text in said)
        if kind == "opt":
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
                {"role": "assistant", "content": "a dog"},
            ]
            ids, labels = processor.training_row(messages)
            assert ids.count(SIZES["opt"]) == 1
            assert tokenizer.decode([i for i in labels if i != -100]) == " a dog\n"
            turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]
            other = ChatCollator(processor)([{"conversations": turns, "image": picture}])
            batch = ChatCollator(processor)([{"messages": messages, "images": [picture]}])
            assert all(torch.equal(batch[name], other[name]) for name in batch)
            assert (batch["input_ids"] == SIZES["opt"]).sum() == 3
            assert batch["labels"][batch["labels"] != -100].tolist() == [i for i in labels if i != -100]
        else:
            with pytest.raises(ValueError, match="processor.examples"):
                processor.training_row([{"role": "assistant", "content": "a dog"}])


# Pipelines and conversations


@pytest.mark.parametrize("kind", ["opt", "t5", "llama"])
def test_pipelines_captions_and_conversations(kind, tmp_path):
    model = tiny(kind, reads=kind == "llama")
    folder = released(model, tmp_path / "release", kind)
    vocabularies(folder, kind)
    output = convert(folder, kind, tmp_path / "ours")
    picture = Image.new("RGB", (40, 30), "red")
    processor = AutoProcessor.from_pretrained(output)
    ours = AutoModelForImageTextToText.from_pretrained(output)
    inputs = processor(images=[picture])
    expected = processor.batch_decode(ours.generate(**inputs, max_new_tokens=4), new_tokens_only=inputs)
    assert hfvlm.Captioner.from_pretrained(output)([picture], max_new_tokens=4) == expected
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    pipe = pipeline("image-text-to-text", model=str(output))
    (said,) = pipe(text=asked, max_new_tokens=4, return_full_text=False)
    chat = hfvlm.Chat(ours, processor, max_new_tokens=4)
    answer = chat.ask("what?", images=[picture])
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(images=[picture], text=[prompt])
    (alone,) = processor.batch_decode(ours.generate(**inputs, max_new_tokens=4), new_tokens_only=inputs)
    assert answer == alone == said["generated_text"].strip()
    (found,) = pipeline("visual-question-answering", model=str(output))(picture, "what?", max_new_tokens=4)
    assert found == {"answer": answer}
    answers = ["a dog", "two cats", "red"]
    (found,) = pipeline("visual-question-answering", model=str(output))(picture, "what?", answers=answers)
    costs = []
    for text in answers:
        alone = processor.examples([picture], [prompt.removeprefix("<image>")], [text])
        with torch.no_grad():
            costs.append(ours(**alone).loss * (alone["labels"] != -100).sum())
    ranked = ours.rank(**inputs, candidates=processor.answers(answers))
    close(ranked.scores[0], -torch.stack(costs)[ranked.indices[0]], 1e-5, "scores")
    assert found == {"answer": answers[ranked.best]}
    assert chat.ask("and?") is not None
    if kind == "opt":
        assert prompt == "<image>Question: what? Answer:"
        again = processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)
        assert again == f"{prompt} {answer}. Question: and? Answer:"
