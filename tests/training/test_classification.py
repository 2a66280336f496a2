"""Image classifiers, trained as recipes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import hfvlm
from hfvlm.training.classification import accuracies, load_classifier
from hfvlm.training.recipes import run_recipe
from tests.support.paths import EXAMPLES

QUICK = [
    "bf16=False",
    "per_device_train_batch_size=8",
    "use_cpu=True",
    "disable_tqdm=True",
    "dataloader_num_workers=0",
]
QUICK += ["warmup_steps=0", "save_strategy=no", "eval_strategy=no"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Red and blue images, in rows with names as labels; one of the evaluation's cannot be read."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    (folder / "rows").mkdir()
    for split, count in (("train", 24), ("test", 9)):
        rows = []
        for i in range(count):
            pixels = random.randint(0, 120, (24, 24, 3), dtype=np.uint8)
            pixels[..., 2 * (i % 2)] += 120
            Image.fromarray(pixels).save(folder / f"{split}-{i}.png")
            rows.append({"image": str(folder / f"{split}-{i}.png"), "label": ["red", "blue"][i % 2]})
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test-8.png").write_bytes(b"damaged")
    return folder


def run(name, images, folder, *more):
    changes = [*QUICK, f"dataset={images / 'rows'}", f"model={folder}", *more]
    return run_recipe(EXAMPLES / "recipes" / f"{name}.yaml", changes)


def test_a_linear_probe_learns_and_leaves_the_tower(clip_folder, images, tmp_path):
    out = tmp_path / "out"
    metrics = run("linear-probe", images, clip_folder, f"output_dir={out}", "num_train_epochs=8", "learning_rate=0.05")
    assert metrics["eval_accuracy"] == 1.0
    before, after = (hfvlm.HfvlmCLIPForImageClassification.from_pretrained(f) for f in (clip_folder, out))
    for name, value in before.vision_model.state_dict().items():
        assert torch.equal(value, after.vision_model.state_dict()[name]), name
    assert after.config.id2label == {0: "blue", 1: "red"}
    classify = pipeline("image-classification", model=str(out))
    assert classify(str(images / "test-0.png"))[0]["label"] == "red"


def test_fine_tuning_moves_all_and_the_first_layers_least(clip_folder, images, tmp_path):
    out = tmp_path / "out"
    run("fine-tune-classifier", images, clip_folder, f"output_dir={out}", "max_steps=2", "learning_rate=1e-3")
    before, after = (hfvlm.HfvlmCLIPForImageClassification.from_pretrained(f) for f in (clip_folder, out))
    steps = [
        (new.mlp.fc1.weight - old.mlp.fc1.weight).abs().max().item()
        for old, new in zip(before.vision_model.layers, after.vision_model.layers, strict=True)
    ]
    assert 0 < steps[0] < steps[-1]
    assert steps[0] / steps[-1] == pytest.approx(0.65 ** (len(steps) - 1), rel=0.15)


def test_adapters_with_a_layer_in_full(clip_folder, images, tmp_path):
    more = ["max_steps=2", "lora_recipe=vision", "lora_whole=[classifier]", "layer_decay=null"]
    run("fine-tune-classifier", images, clip_folder, f"output_dir={tmp_path / 'out'}", *more)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_accuracy_counts_rows_with_labels():
    logits = np.array([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5], [np.nan, np.nan], [1.0, 0.0]])
    found = accuracies(SimpleNamespace(label_ids=np.array([1, 1, 0, 0, -100]), predictions=logits))
    assert found == {"accuracy": 0.25}


def test_what_is_no_classifier_is_named(clip_folder, images, tmp_path):
    with pytest.raises(ValueError, match="has no column 'kind' of labels"):
        run("linear-probe", images, clip_folder, f"output_dir={tmp_path}", "label_column=kind")
    with pytest.raises(ValueError, match="dataset must be one data set"):
        run("linear-probe", images, clip_folder, f"output_dir={tmp_path}", f"dataset=[{{path: {images}}}]")
    hfvlm.load_preset("painter/tiny").make_config().save_pretrained(tmp_path / "painter")
    with pytest.raises(ValueError, match="hfvlm has no image classifier of HfvlmPainterConfig"):
        load_classifier(str(tmp_path / "painter"), ["a", "b"])
    watching = hfvlm.untrained("video_chatgpt", tmp_path / "watching")
    with pytest.raises(ValueError, match="HfvlmVideoChatGPTProcessor prepares video, text, and no images"):
        run("linear-probe", images, watching, f"output_dir={tmp_path / 'out'}")


def test_patches_that_no_tower_pools_are_averaged(images, tmp_path):
    """PaLI's tower is PaliGemma's, and so is the classifier."""
    for architecture in ("paligemma", "pali", "qwen_vl"):
        folder = hfvlm.untrained(architecture, tmp_path / architecture)
        model = load_classifier(str(folder), ["red", "blue"])
        kind = "HfvlmQwenVL" if architecture == "qwen_vl" else "HfvlmPaliGemma"
        assert type(model).__name__ == f"{kind}ForImageClassification"
        size = model.config.vision_config.image_size
        pixels = torch.randn(2, 3, size, size)
        patches = model.vision_model.eval()(pixels).last_hidden_state
        expected = torch.nn.functional.linear(patches.mean(dim=1), model.classifier.weight, model.classifier.bias)
        torch.testing.assert_close(model.eval()(pixels).logits, expected)
        whole = AutoModel.from_pretrained(folder).vision_model.state_dict()
        assert {n: v.sum() for n, v in model.vision_model.state_dict().items()} == {
            n: v.sum() for n, v in whole.items()
        }
    out = tmp_path / "out"
    run("fine-tune-classifier", images, tmp_path / "pali", f"output_dir={out}", "crop_scale=null", "layer_decay={}")
    assert type(load_classifier(str(out), ["red", "blue"])).__name__ == "HfvlmPaliGemmaForImageClassification"


def test_a_model_that_chats_lends_its_tower(images, tmp_path):
    """LLaVA's is CLIP's, and so is the classifier."""
    from tests.models.llava.tiny import tiny_model

    chat = tiny_model()
    chat.save_pretrained(tmp_path / "llava")
    model = load_classifier(str(tmp_path / "llava"), ["red", "blue"])
    assert type(model) is hfvlm.HfvlmCLIPForImageClassification
    for name, value in chat.vision_model.state_dict().items():
        assert torch.equal(value, model.vision_model.state_dict()[name]), name
    assert model(torch.zeros(1, 3, 28, 28)).logits.shape == (1, 2)


def test_a_trained_classifier_goes_on(clip_folder, tmp_path):
    model = load_classifier(str(clip_folder), ["a", "b", "c"])
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path), ["a", "b", "c"])
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert load_classifier(str(tmp_path), ["a", "b"]).classifier.out_features == 2
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is type(model)
