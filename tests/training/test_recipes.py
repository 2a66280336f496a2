import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.conversion import blip2, coca, qwen_vl
from hfvlm.models.siglip import (
    HfvlmSigLIPConfig,
    HfvlmSigLIPImageProcessor,
    HfvlmSigLIPModel,
    HfvlmSigLIPProcessor,
    HfvlmSigLIPTokenizer,
)
from hfvlm.samples import scenes
from hfvlm.training.recipes import run_recipe
from tests.conftest import SHIPPED
from tests.models.llava.tiny import converted
from tests.support.paths import EXAMPLES
from tests.support.processes import run_script
from tests.training.test_procedures import BLIP


@pytest.fixture(scope="module")
def whole_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    run_script(EXAMPLES / "make_scenes.py", "--output", folder, "--pictures", 2)
    return folder


@pytest.fixture(scope="module")
def few_images(whole_dataset, tmp_path_factory):
    """As much of the data set as a run of two steps reads."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 40), ("test", 10)):
        rows = (whole_dataset / split / "metadata.jsonl").read_text().splitlines()[:count]
        (folder / split).mkdir()
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
        for row in rows:
            name = json.loads(row)["file_name"]
            shutil.copy(whole_dataset / split / name, folder / split / name)
    return folder


@pytest.fixture
def changes(tmp_path, clip_folder, few_images):
    """What a run of a few steps on this machine needs."""
    names = {"model": clip_folder, "dataset": few_images, "output_dir": tmp_path / "out", "use_cpu": True}
    return [f"{name}={value}" for name, value in names.items()] + ["disable_tqdm=True"]


def test_a_small_model_learns_where_things_are(changes, whole_dataset, tmp_path):
    """On pairs of shapes that it never saw together: before, it has only seen shapes on their own.

    In a quarter of the recipe's steps, and in whole batches, which mini-batches only repeat in less memory.
    """
    sizes = ["per_device_train_batch_size=64", "mini_batch_size=64", "learning_rate=2e-3"]
    changes += [f"dataset={whole_dataset}", "num_train_epochs=3", *sizes]
    metrics = run_recipe(EXAMPLES / "recipes" / "scenes.yaml", changes)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    recalls = [entry["eval_image_to_text_recall@1"] for entry in history if "eval_loss" in entry]
    assert recalls[0] < 0.4
    assert recalls[-1] > recalls[0] + 0.25
    assert metrics["eval_text_to_image_recall@5"] > 0.8
    assert (tmp_path / "out" / "curve.png").stat().st_size > 5000
    assert (tmp_path / "out" / "processor_config.json").exists()


def test_the_command_and_the_script_are_the_same_run(changes, tmp_path, clip_folder, few_images):
    options = {
        "per_device_train_batch_size": 32,
        "mini_batch_size": 16,
        "max_steps": 2,
        "lora_recipe": "vision+text",
        "save_strategy": "no",
        "report_to": "none",
        "crop_scale": 0.8,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options | {"task": "contrastive", "model": "?", "dataset": "?"}))
    result = CliRunner().invoke(app, ["train", str(recipe), *changes])
    assert result.exit_code == 0, result.output
    options |= {"model": clip_folder, "dataset": few_images, "output_dir": tmp_path / "script", "use_cpu": True}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    run_script(EXAMPLES / "train_contrastive.py", *given)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "script")]
    assert files[0].read_bytes() == files[1].read_bytes()
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert torch.isfinite(torch.tensor(history[-1]["train_loss"]))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory, clip_folder):
    """A small SigLIP that learned nothing yet."""
    trainer = pytest.importorskip("sentencepiece", reason="comes with hfvlm[convert]").SentencePieceTrainer
    folder = tmp_path_factory.mktemp("siglip")
    captions = [pair.caption(template) for pair in scenes.all_pairs() for template in scenes.PAIR_TEMPLATES]
    (folder / "corpus.txt").write_text("\n".join(captions))
    trainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tiny"), vocab_size=80, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(folder / "tiny.model", model_max_length=24)
    clip = AutoProcessor.from_pretrained(clip_folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_dim": 32}
    config = HfvlmSigLIPConfig(vision_config=sizes | {"image_size": 32, "patch_size": 8}, text_config=text)
    HfvlmSigLIPModel(config).save_pretrained(folder / "model")
    image_processor = HfvlmSigLIPImageProcessor(size=clip.image_processor.size)
    HfvlmSigLIPProcessor(image_processor, tokenizer).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def coca_folder(tmp_path_factory):
    """A small CoCa that learned nothing yet."""
    folder = tmp_path_factory.mktemp("coca")
    preset = hfvlm.load_preset("coca/tiny")
    config = preset.make_config()
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # at first attention is even, and its queries' gradients are as good as none
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    coca.processor_for(config, preset.processor, SHIPPED / "bpe_simple_vocab.txt.gz").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wukong_folder(tmp_path_factory):
    return hfvlm.untrained("wukong", tmp_path_factory.mktemp("wukong") / "model")


# Which weights a recipe trains, by their names.
TRAINED = {
    "clip-full": ".*",
    "coca": ".*",
    "clip-lora": ".*lora_[AB].*|logit_scale.*",
    "siglip-lit": "(text_model|logit_scale).*",
    "wukong-lora": r".*lora_[AB].*|\w+\.projection.*|(token_reduction|logit_scale).*",
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_the_weights_that_it_names(name, changes, tmp_path, clip_folder, request):
    folder = {"siglip-lit": "siglip_folder", "coca": "coca_folder", "wukong-lora": "wukong_folder"}.get(name)
    folder = request.getfixturevalue(folder) if folder else clip_folder
    small = {"per_device_train_batch_size": 16, "mini_batch_size": 8, "max_steps": 2, "bf16": False, "model": folder}
    small |= {"dataloader_num_workers": 0, "per_device_eval_batch_size": 50, "warmup_steps": 0}
    metrics = run_recipe(EXAMPLES / "recipes" / f"{name}.yaml", changes + [f"{k}={v}" for k, v in small.items()])
    assert metrics["eval_loss"] > 0
    model = AutoModel.from_pretrained(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if name.endswith("lora"):
        tuned = PeftModel.from_pretrained(model, tmp_path / "out")
        after = get_peft_model_state_dict(tuned)
        assert all(re.fullmatch(TRAINED[name], key.removeprefix("base_model.model.")) for key in after), list(after)
        assert all(value.any() for value in after.values())
        return
    after = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if re.fullmatch(TRAINED[name], key)}


def test_adapters_for_a_new_pair_of_modalities(imagebind_folder, tmp_path):
    random = np.random.RandomState(0)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        audio = [{"array": random.randn(8000).round(3).tolist(), "sampling_rate": 16_000} for _ in range(10)]
        rows = [{"audio": sound, "depth": random.rand(16, 16).round(3).tolist()} for sound in audio]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    small = {"model": imagebind_folder, "dataset": tmp_path / "data", "output_dir": tmp_path / "out"}
    small |= {"per_device_train_batch_size": 8, "mini_batch_size": 4, "max_steps": 2, "bf16": False, "use_cpu": True}
    small |= {"dataloader_num_workers": 0, "warmup_steps": 0}
    metrics = run_recipe(EXAMPLES / "recipes" / "imagebind-lora.yaml", [f"{k}={v}" for k, v in small.items()])
    assert metrics["eval_audio_to_depth_recall@10"] == 1
    model = AutoModel.from_pretrained(imagebind_folder, modalities=["audio", "depth"])
    adapter = get_peft_model_state_dict(PeftModel.from_pretrained(model, tmp_path / "out"))
    assert {key.split(".")[2] for key in adapter} == {"audio_model", "depth_model"}
    assert all("lora_" in key and value.any() for key, value in adapter.items())


def test_a_new_tower_of_languagebind_begins_from_clip(clip_folder, tmp_path):
    clip, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    model = hfvlm.HfvlmLanguageBindModel.from_clip(clip, ["depth"])
    model.save_pretrained(tmp_path / "model")
    hfvlm.HfvlmLanguageBindProcessor.from_clip(processor, model.config).save_pretrained(tmp_path / "model")
    random = np.random.RandomState(0)
    rows = [{"depth": random.rand(16, 16).round(3).tolist(), "text": f"a {i}"} for i in range(10)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"model": tmp_path / "model", "dataset": tmp_path / "data", "output_dir": tmp_path / "out"}
    small |= {"per_device_train_batch_size": 8, "mini_batch_size": 4, "max_steps": 2, "bf16": False, "use_cpu": True}
    small |= {"dataloader_num_workers": 0, "warmup_steps": 0, "whole_rate": 0.1}
    metrics = run_recipe(EXAMPLES / "recipes" / "languagebind-lora.yaml", [f"{k}={v}" for k, v in small.items()])
    assert metrics["eval_depth_to_text_recall@10"] == 1
    tuned = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "model"), tmp_path / "out")
    assert tuned.peft_config["default"].lora_alpha / tuned.peft_config["default"].r == 8
    adapter = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(tuned).items()}
    adapted = {key.split(".")[-3] for key in adapter if "lora_" in key}
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert all(value.any() for key, value in adapter.items())
    before, whole = model.state_dict(), {key: value for key, value in adapter.items() if "lora_" not in key}
    assert whole.keys() == {
        f"depth_model.{name}" for name in ("post_norm.weight", "post_norm.bias", "projection.weight")
    } | {"logit_scales.depth.scale"}
    assert all(0 < (value - before[key]).abs().max() < 2e-4 for key, value in whole.items())  # a tenth of the rate


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, few_images):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    path = tmp_path_factory.mktemp("conversations") / "conversations.json"
    path.write_text(json.dumps([{"conversations": turns, "image": "00001.png"}] * 8))
    return [f"data={path}", f"pictures={few_images / 'train'}"]


QUICK = ["bf16=False", "max_steps=2", "per_device_train_batch_size=2", "use_cpu=True", "disable_tqdm=True"]
QUICK += ["dataloader_num_workers=0", "warmup_steps=0", "lora_rank=2"]
CHAT = {
    "llava-stage1": "projector.*",
    "llava-stage2": "(projector|language_model).*",
    "llava-lora": "(language_model.*lora_[AB]|projector).*",
    "paligemma-lora": "(language_model.*lora_[AB]|projector).*",
}


@pytest.fixture(scope="module")
def paligemma_folder(tmp_path_factory):
    return hfvlm.untrained("paligemma", tmp_path_factory.mktemp("paligemma") / "model")


@pytest.mark.parametrize("name", CHAT)
def test_conversations_train_the_weights_that_the_recipe_names(name, conversations, tmp_path, request):
    folder = request.getfixturevalue(f"{name.partition('-')[0]}_folder")
    changes = [*QUICK, *conversations, f"model={folder}", f"output_dir={tmp_path / 'out'}"]
    assert run_recipe(EXAMPLES / "recipes" / f"{name}.yaml", changes)["train_loss"] > 0
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if name.endswith("lora"):
        adapter = get_peft_model_state_dict(PeftModel.from_pretrained(model, tmp_path / "out"))
        names = [key.removeprefix("base_model.model.") for key in adapter]
        assert all(re.fullmatch(CHAT[name], key) for key in names), names
        assert any(key.startswith("projector") for key in names)
        return
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[0] for key in moved} == set(re.findall(r"[a-z]+(?:_model)?(?=[|).])", CHAT[name]))
    assert all(re.fullmatch(CHAT[name], key) for key in moved)


def test_adapters_over_four_bits(llava_folder, conversations, tmp_path):
    pytest.importorskip("bitsandbytes", reason="comes with hfvlm[quantization]")
    changes = [*QUICK, *conversations, f"model={llava_folder}", f"output_dir={tmp_path / 'out'}", "four_bits=true"]
    run_recipe(EXAMPLES / "recipes" / "llava-lora.yaml", changes)
    model = AutoModelForImageTextToText.from_pretrained(llava_folder)
    adapter = get_peft_model_state_dict(PeftModel.from_pretrained(model, tmp_path / "out"))
    assert all(value.any() for key, value in adapter.items() if "lora_B" in key)


def test_pretraining_by_all_losses_of_a_model(small_blip, few_images, tmp_path):
    folder = small_blip("HfvlmBLIPForPreTraining")
    changes = [*QUICK[:-1], f"model={folder}", f"dataset={few_images}", f"output_dir={tmp_path / 'out'}"]
    changes += ["learning_rate=0.001", "eval_split=test", "per_device_eval_batch_size=50"]
    metrics = run_recipe(EXAMPLES / "recipes" / "blip-pretraining.yaml", changes)
    assert metrics["train_loss"] > 0
    assert metrics["eval_loss"] > 0
    before, after = (
        hfvlm.HfvlmBLIPForPreTraining.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out")
    )
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert {"vision_model", "text_model", "text_decoder", "itm_head", "logit_scale", "teacher"} <= moved


# Which parts of a FLAVA learn from which columns of a data set.
FLAVA = {
    "{image: image, text: captions}": "(vision|text|multimodal)_model|logit_scale|(mmm_image|mmm_text|itm)_head",
    "{image: image}": "vision_model|mim_head",
    "{text: captions}": "text_model|mlm_head",
}


@pytest.mark.parametrize("columns", FLAVA)
def test_pretraining_on_whatever_there_is(columns, flava_folder, few_images, tmp_path):
    """The losses of a batch train what they read; no loss reads the towers' summaries, and the codebook stays."""
    changes = [*QUICK[:-1], f"model={flava_folder}", f"dataset={few_images}", f"output_dir={tmp_path / 'out'}"]
    changes += ["learning_rate=0.001", "eval_split=test", "per_device_eval_batch_size=50", f"columns={columns}"]
    changes += ["per_device_train_batch_size=16"]
    metrics = run_recipe(EXAMPLES / "recipes" / "flava-pretraining.yaml", changes)
    assert metrics["train_loss"] > 0
    assert metrics["eval_loss"] > 0
    before, after = (
        dict(hfvlm.HfvlmFLAVAForPreTraining.from_pretrained(path).named_parameters())
        for path in (flava_folder, tmp_path / "out")
    )
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    unread = r"\w+_model\.summary\..*" + (
        "" if "image" in columns and "text" in columns else r"|\w+_model\.projection\..*"
    )
    wanted = {key for key in before if re.match(FLAVA[columns], key) and not re.fullmatch(unread, key)}
    assert moved == wanted


def test_adapters_of_a_model_that_draws(few_images, tmp_path):
    folder = hfvlm.untrained("dalle_mini", tmp_path / "model")
    changes = [
        *QUICK[:-1],
        f"model={folder}",
        f"dataset={few_images}",
        f"output_dir={tmp_path / 'out'}",
        "eval_split=test",
    ]
    changes += ["per_device_train_batch_size=8", "per_device_eval_batch_size=50", "eval_strategy=no"]
    metrics = run_recipe(EXAMPLES / "recipes" / "dalle-mini-lora.yaml", changes)
    assert metrics["eval_loss"] > 0
    after = get_peft_model_state_dict(PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path / "out"))
    assert {key.split(".")[2] for key in after} == {"text_model", "image_decoder"}
    assert all(value.any() for value in after.values())


@pytest.fixture(scope="module")
def blip2_folders(tmp_path_factory):
    """A small BLIP-2 of each stage that learned nothing yet."""
    from tests.models.blip2.test_conversion import BERT, CASES, tiny

    folders = {}
    for stage, kind in ((1, None), (2, "opt")):
        folder, model = tmp_path_factory.mktemp(f"blip2-stage{stage}"), tiny(kind)
        model.save_pretrained(folder)
        vocabulary = CASES / "opt-eva" / "opt_vocab.json" if kind else BERT
        blip2.processor_for(model.config, {}, vocabulary).save_pretrained(folder)
        folders[f"blip2-stage{stage}"] = folder
    return folders


BLIP2 = {
    "blip2-stage1": "(qformer_model|image_projection|text_projection|logit_scale|itm_head|lm_head).*",
    "blip2-stage2": "(qformer_model|projector).*",
}


@pytest.mark.parametrize("name", BLIP2)
def test_the_two_stages_of_blip2(name, blip2_folders, few_images, tmp_path):
    folder = blip2_folders[name]
    changes = [*QUICK[:-1], f"model={folder}", f"dataset={few_images}", f"output_dir={tmp_path / 'out'}"]
    metrics = run_recipe(EXAMPLES / "recipes" / f"{name}.yaml", [*changes, "learning_rate=0.01"])
    assert metrics["train_loss"] > 0
    before, after = (AutoModel.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(re.fullmatch(BLIP2[name], key) for key in moved), moved
    still = {key for key in before if re.fullmatch(BLIP2[name], key)} - moved
    assert not still, still
    written = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(written) is type(AutoProcessor.from_pretrained(folder))


QWEN_VL = {
    "qwen-vl-stage1": ({"vision_model", "projector"}, 28, "<img>{}</img>"),
    "qwen-vl-stage2": ({"vision_model", "projector", "language_model"}, 56, "<img>{}</img>"),
    "qwen-vl-stage3": ({"projector", "language_model"}, 56, "Picture 1: <img>{}</img>\n"),
}


@pytest.mark.parametrize("name", QWEN_VL)
def test_the_three_stages_of_qwen_vl(name, few_images, tmp_path, monkeypatch):
    from tests.models.qwen_vl.test_conversion import VOCABULARY

    preset = hfvlm.load_preset("qwen_vl/tiny")
    config = preset.make_config()
    torch.manual_seed(0)
    folder = tmp_path / "model"
    hfvlm.HfvlmQwenVLForConditionalGeneration(config).save_pretrained(folder)
    qwen_vl.processor_for(config, preset.processor, VOCABULARY).save_pretrained(folder)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns, "image": "00001.png"}] * 4))
    rows = {"path": str(tmp_path / "rows.json")}
    data = [rows | {"weight": 3}, rows] if name.endswith("2") else rows["path"]
    parts, edge, begin = QWEN_VL[name]
    seen = {}
    forward = hfvlm.HfvlmQwenVLForConditionalGeneration.forward

    def watched(model, **inputs):
        seen.update(inputs)
        return forward(model, **inputs)

    monkeypatch.setattr(hfvlm.HfvlmQwenVLForConditionalGeneration, "forward", watched)
    changes = [*QUICK[:-1], f"model={folder}", f"data={json.dumps(data)}", f"pictures={few_images / 'train'}"]
    changes += [f"output_dir={tmp_path / 'out'}", f"image_size={edge}", "learning_rate=0.01"]
    assert run_recipe(EXAMPLES / "recipes" / f"{name}.yaml", changes)["train_loss"] > 0
    assert seen["pixel_values"].shape[-2:] == (edge, edge)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.conversation == ("chatml" if name.endswith("3") else "pretraining")
    text = processor.tokenizer.decode(seen["input_ids"][0])
    assert begin.format("<imgpad>" * 16) in text
    assert ("Picture" in begin) == ("Picture" in text)
    assert (
        "A cat.<|im_end|>" in text
        if name.endswith("3")
        else text.startswith(begin.format("<imgpad>" * 16) + "A cat.<|endoftext|>")
    )
    before, after = (
        hfvlm.HfvlmQwenVLForConditionalGeneration.from_pretrained(p).state_dict() for p in (folder, tmp_path / "out")
    )
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[0] for key in moved} == parts
    still = {key for key in before if key.split(".")[0] in parts} - moved
    assert still <= {"projector.position"}, still


def test_flamingo_on_a_mixture_of_pages_images_and_videos(few_images, tmp_path):
    from tests.models.flamingo.tiny import PIECES, tiny_model, vocabulary

    folder = tmp_path / "model"
    model = tiny_model("gpt_neox", frames=4)
    model.save_pretrained(folder)
    tokenizer = hfvlm.HfvlmFlamingoTokenizer.from_vocabulary(vocabulary(tmp_path / "words"))
    images = hfvlm.HfvlmFlamingoImageProcessor(size=28)
    hfvlm.HfvlmFlamingoProcessor(images, tokenizer, num_frames=3).save_pretrained(folder)
    paths = [str(path) for path in sorted((few_images / "train").glob("*.png"))[:6]]
    rows = {
        "pages": {"images": paths[:2], "text": "All. <image> A cat. <image> A dog."},
        "photos": {"image": paths[2], "caption": "a bird"},
        "clips": {"video": paths[3:], "caption": "birds"},
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    recipe = (EXAMPLES / "recipes" / "flamingo.yaml").read_text()
    for name in rows:
        assert f"path: {name}," in recipe
        recipe = recipe.replace(f"path: {name},", f"path: {tmp_path / name},")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("weight: 0.03", "weight: 1.0"))
    changes = [*QUICK[:-1], f"model={folder}", f"output_dir={tmp_path / 'out'}", "max_steps=6", "learning_rate=0.01"]
    run_recipe(tmp_path / "recipe.yaml", changes)
    before, after = (
        hfvlm.HfvlmFlamingoForConditionalGeneration.from_pretrained(p).state_dict() for p in (folder, tmp_path / "out")
    )
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    words = "language_model.gpt_neox.embed_in.weight"
    assert words in moved
    assert {key.split(".")[0] for key in moved - {words}} == {"resampler", "gates"}
    assert "resampler.frame_positions" in moved
    changed = (before[words] != after[words]).any(dim=1).nonzero().flatten().tolist()
    assert changed == [PIECES, PIECES + 1]  # the end of an image's text, and the image
    with pytest.raises(ValueError, match="own stands alone"):
        run_recipe(
            tmp_path / "recipe.yaml", [*changes, "trained_parts=[own, gates]", f"output_dir={tmp_path / 'other'}"]
        )


def test_conversations_of_several_files_are_mixed(llava_folder, conversations, tmp_path):
    path, folder = (part.partition("=")[2] for part in conversations)
    files = f"[{{path: {path}, weight: 2}}, {{path: {path}, pictures: {folder}}}]"
    changes = [*QUICK, f"data={files}", conversations[1], f"model={llava_folder}", f"output_dir={tmp_path / 'out'}"]
    assert run_recipe(EXAMPLES / "recipes" / "llava-stage1.yaml", changes)["train_loss"] > 0


def test_the_second_stage_begins_where_the_documentation_says(blip2_folders, tmp_path, monkeypatch):
    from tests.models.blip2.test_conversion import CASES, text_config

    fields = text_config("opt")
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    language.save_pretrained(tmp_path / "opt")
    (tmp_path / "blip2-stage1").symlink_to(blip2_folders["blip2-stage1"])
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "opt" / name).write_text((CASES / "opt-eva" / f"opt_{name}").read_text())
    text = (EXAMPLES.parent / "docs" / "training.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "blip2-stage1" in part)
    smaller = {"facebook/opt-2.7b": "opt", "opt-2.7b/": "opt/", "50272": str(fields["vocab_size"]), "50118": "4"}
    for name, other in smaller.items():
        assert name in code
        code = code.replace(name, other)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    first, second = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("blip2-stage1", "blip2-opt"))
    same = [key for key in second if key.startswith(("vision_model.", "qformer_model."))]
    assert same
    assert all(torch.equal(first[key], second[key]) for key in same)
    assert torch.equal(language.get_output_embeddings().weight, second["language_model.lm_head.weight"])
    model, processor = (
        kind.from_pretrained(tmp_path / "blip2-opt") for kind in (AutoModelForImageTextToText, AutoProcessor)
    )
    inputs = processor(images=np.zeros((28, 28, 3), np.uint8), text="<image>")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert model.generation_config.eos_token_id == 4


def test_the_chat_script_is_the_recipe(llava_folder, conversations, tmp_path):
    options = [*QUICK, *conversations, f"output_dir={tmp_path / 'out'}", "trained_parts=projector", "report_to=none"]
    given = [part for option in (f"model={llava_folder}", *options) for part in f"--{option}".split("=", 1)]
    run_script(EXAMPLES / "finetune_chat.py", *given)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_part_that_the_model_lacks_is_named(llava_folder, conversations, tmp_path):
    changes = [*QUICK, *conversations, f"model={llava_folder}", f"output_dir={tmp_path}"]
    with pytest.raises(ValueError, match="has no adaptor; it has .*projector"):
        run_recipe(EXAMPLES / "recipes" / "llava-stage1.yaml", [*changes, "trained_parts=[adaptor]"])


def test_every_recipe_is_tried():
    names = {path.stem for path in (EXAMPLES / "recipes").glob("*.yaml")}
    alone = {
        "scenes",
        "imagebind-lora",
        "blip-pretraining",
        "flava-pretraining",
        "flamingo",
        "languagebind-lora",
        "linear-probe",
        "fine-tune-classifier",
        "painter-lora",
        "dalle-mini-lora",
        "merlot-reserve-lora",
        "vilbert-lora",
    }
    procedures = {"clip-pretraining", "align", "filip", "simclr", "simclr-distillation", "clip-distillation", *BLIP}
    aligned = {"llava-reward", "llava-dpo", "llava-rloo"}
    assert names == {*TRAINED, *CHAT, *BLIP2, *QWEN_VL, *alone, *procedures, *aligned}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (2, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "a recipe is a list of `field: value`"),
        ("a: [", "not YAML"),
        ("task: dream", "'dream' is none of contrastive, distillation, pairs"),
        ("task: contrastive\nmodel: x\ndataset: y\noutput_dir: z\nlerning_rate: 1", "lerning_rate"),
        ("task: contrastive\ndataset: y\noutput_dir: z", "model"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        run_recipe(recipe)
    assert "recipe.yaml" in str(error.value)
