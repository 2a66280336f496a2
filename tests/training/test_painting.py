import json

import numpy as np
import pytest
import torch
from PIL import Image

import hfvlm
from hfvlm.models.painter import HfvlmPainterImageProcessor, HfvlmPainterProcessor
from hfvlm.training import PaintingCollator
from hfvlm.training.recipes import run_recipe
from tests.support.paths import EXAMPLES


def image_of(value):
    return Image.new("RGB", (20, 24), (value, 255 - value, 90))


ROWS = [{"image": image_of(i), "target": image_of(100 + i), "task": "dark"} for i in range(3)]
ROWS += [{"image": image_of(i), "target": image_of(200 + i), "task": "semantic"} for i in range(3)]


@pytest.fixture
def processor():
    return HfvlmPainterProcessor(HfvlmPainterImageProcessor(size=16))


def test_a_pair_of_the_same_task_is_above(processor):
    """Without augmentation, exactly; in an evaluation, the first one, and all of the lower target is hidden."""
    collator = PaintingCollator(processor, 4, ROWS, augment=False)
    random, seen = np.random.default_rng(0), set()
    uppers = {
        i: processor.image_processor(ROWS[i]["target"], return_tensors="pt")["pixel_values"][0] for i in range(6)
    }
    for _ in range(20):
        read = collator.read(ROWS[1], random)
        seen |= {i for i in uppers if torch.allclose(read["target_values"][:, :16], uppers[i], atol=1e-5)}
        assert torch.allclose(read["target_values"][:, 16:], uppers[1], atol=1e-5)
    assert seen == {0, 1, 2}
    batch = collator(ROWS[4:])
    assert batch["return_loss"] is True
    assert torch.allclose(batch["target_values"][0, :, :16], uppers[3], atol=1e-5)
    assert batch["bool_masked_pos"].sum(dim=(1, 2)).tolist() == [16, 16]
    assert batch["bool_masked_pos"][:, 4:].min() == 1


def test_what_is_drawn_depends_on_the_generator_alone(processor):
    collator = PaintingCollator(processor, 4, ROWS)
    first, second, third = (collator.read(ROWS[4], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["pixel_values"], third["pixel_values"])
    assert first["bool_masked_pos"].sum() == 16


def test_columns_and_what_cannot_be(processor):
    renamed = [{"photo": row["image"], "painted": row["target"]} for row in ROWS[:2]]
    collator = PaintingCollator(processor, 4, renamed, {"image": "photo", "target": "painted"})
    assert collator.read(renamed[0], None)["pixel_values"].shape == (3, 32, 16)
    with pytest.raises(ValueError, match="No row shows the task 'none'"):
        PaintingCollator(processor, 4, ROWS).read(ROWS[0] | {"task": "none"}, None)
    with pytest.raises(ValueError, match="whole patches of 5 pixels"):
        PaintingCollator(processor, 5, ROWS)
    with pytest.raises(ValueError, match="hidden"):
        PaintingCollator(processor, 4, ROWS, hidden=0)


def test_the_recipe_trains_adapters(tmp_path):
    model = hfvlm.untrained("painter", tmp_path / "model")
    for name in ("pairs", "files"):
        (tmp_path / name).mkdir()
    rows = []
    for i, row in enumerate(ROWS[:4]):
        paths = {name: tmp_path / "files" / f"{name}-{i}.png" for name in ("image", "target")}
        for name, path in paths.items():
            row[name].save(path)
        rows.append({name: str(path) for name, path in paths.items()} | {"task": "dark"})
    for split in ("train", "test"):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    small = {"model": model, "dataset": tmp_path / "pairs", "output_dir": tmp_path / "out", "use_cpu": True}
    small |= {"max_steps": 2, "dataloader_num_workers": 0, "bf16": False, "disable_tqdm": True, "warmup_steps": 0}
    metrics = run_recipe(EXAMPLES / "recipes" / "painter-lora.yaml", [f"{k}={v}" for k, v in small.items()])
    assert metrics["train_loss"] > 0
    assert metrics["eval_loss"] > 0
    image = ROWS[0]["image"]
    assert hfvlm.Painter.from_pretrained(tmp_path / "out", device="cpu")(image, (image, image)).size == image.size
