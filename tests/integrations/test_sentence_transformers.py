"""sentence-transformers' own loader, losses, evaluators and trainer on folders of hfvlm."""

from functools import cache

import datasets
import numpy as np
import pytest
import torch

import hfvlm
from hfvlm.samples.scenes import Scene, all_scenes
from tests.support.folders import tiny_folder

pytestmark = pytest.mark.integration
package = pytest.importorskip("sentence_transformers", reason="comes with hfvlm[dev]")

ONE_VECTOR = ("blip", "clip", "coca", "imagebind", "languagebind", "mammut", "siglip")
SEVERAL = ("blip2", "filip", "wukong")
TEXTS = ["a red circle", "a large blue square", "a cross"]
IMAGES = [Scene(*look).render() for look in (("red", "circle", "small"), ("blue", "square", "large"))]
WAVE = np.sin(np.arange(32_000) / 10).astype(np.float32)
FRAMES = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)
# Of each modality what sentence-transformers takes, and what an Embedder does.
SOURCES = {
    "text": (TEXTS, TEXTS),
    "image": (IMAGES, IMAGES),
    "audio": ([{"array": WAVE, "sampling_rate": 16_000}], [(WAVE, 16_000)]),
    "video": ([FRAMES], [FRAMES]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda name: tiny_folder(name, tmp_path_factory.mktemp(name) / name))


@pytest.mark.parametrize("name", ONE_VECTOR)
def test_the_stock_loader_embeds_as_the_embedder(folder, name):
    theirs = package.SentenceTransformer(str(folder(name)), model_kwargs={"dtype": torch.float32})
    ours = hfvlm.Embedder.from_pretrained(folder(name), dtype="float32")
    known = [modality for modality in SOURCES if modality in ours.modalities]
    assert set(theirs.modalities) == set(known)
    for modality in known:
        given, own = SOURCES[modality]
        np.testing.assert_allclose(theirs.encode(given), ours.encode(**{modality: own}), atol=1e-5)
    assert theirs.get_embedding_dimension() == ours.size


@pytest.mark.parametrize("name", SEVERAL)
def test_several_vectors_compare_as_in_the_embedder(folder, name, tmp_path):
    from hfvlm.integrations.sentence_transformers import multi_vector_encoder

    theirs = multi_vector_encoder(folder(name), dtype=torch.float32)
    ours = hfvlm.Embedder.from_pretrained(folder(name), dtype="float32")
    found = ours.encode(text=TEXTS, image=IMAGES)
    texts, images = theirs.encode_query(TEXTS), theirs.encode_document(IMAGES)
    np.testing.assert_allclose(theirs.similarity(texts, images), found.similarity("text", "image"), atol=1e-5)
    if name == "filip":  # in BLIP-2 an image's best query decides, and in Wukong padding may be matched
        np.testing.assert_allclose(theirs.similarity(images, texts), found.similarity("image", "text"), atol=1e-5)
    theirs.save(str(tmp_path))
    again = package.MultiVectorEncoder(str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(
        again.similarity(again.encode(TEXTS), again.encode(IMAGES)), found.similarity("text", "image"), atol=1e-5
    )


def rows(scenes):
    return {"anchor": [scene.caption() for scene in scenes], "positive": [scene.render() for scene in scenes]}


def test_losses_evaluators_and_the_trainer(clip_folder, tmp_path):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = package.SentenceTransformer(str(clip_folder))
    scenes = all_scenes()[:24]
    found = rows(scenes)
    others = found["positive"][1:] + found["positive"][:1]
    evaluator = TripletEvaluator(found["anchor"], found["positive"], others, name="scenes")
    assert 0.9 < evaluator(model)["scenes_cosine_accuracy"] <= 1
    state = torch.random.get_rng_state()
    for parameter in model.parameters():  # forgets some of what it learned
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.random.set_rng_state(state)
    before = evaluator(model)["scenes_cosine_accuracy"]
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=30, per_device_train_batch_size=12, learning_rate=1e-3, logging_steps=1,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, arguments, datasets.Dataset.from_dict(found), loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert evaluator(model)["scenes_cosine_accuracy"] >= max(before, 0.9)
    model.save(str(tmp_path / "saved"))
    again = hfvlm.Embedder.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(text=TEXTS), model.encode(TEXTS), atol=1e-5)
