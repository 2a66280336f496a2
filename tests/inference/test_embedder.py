import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.conversion import filip
from hfvlm.inference.embedder import Embedder, Embeddings, combine, similarity
from hfvlm.inference.index import BACKENDS, FaissIndex, Index, highest, load_index
from hfvlm.media import MediaError
from hfvlm.samples import scenes
from tests.conftest import SHIPPED


@pytest.fixture(scope="module")
def embedder(clip_folder):
    return Embedder.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def scene_images():
    random = np.random.RandomState(0)
    return [kind.render(random) for kind in scenes.all_scenes()]


@pytest.fixture(scope="module")
def captions():
    return [kind.caption(scenes.TEMPLATES[i % 4]) for i, kind in enumerate(scenes.all_scenes())]


def test_vectors_are_the_models_own_whatever_the_batches(embedder, clip_folder, scene_images, captions):
    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        output = model(**processor(images=scene_images, text=captions, return_tensors="pt", padding=True))
    for batch_size in (1, 7, 100):
        found = embedder.encode(image=scene_images, text=captions, batch_size=batch_size, thermal=None)
        assert isinstance(found, Embeddings)
        assert found["image"].dtype == np.float32
        np.testing.assert_allclose(found["image"], output.image_embeds, atol=2e-6)
        np.testing.assert_allclose(found["text"], output.text_embeds, atol=2e-6)
    best = found.similarity("text", "image").argmax(1)
    assert (best == np.arange(48)).mean() > 0.9


def test_columns_of_data_sets_are_lists_of_sources(embedder, scene_images, captions):
    table = Dataset.from_dict({"image": scene_images[:5], "text": captions[:5]})
    found = embedder.encode(image=table["image"], text=table["text"], batch_size=2)
    for modality, sources in (("image", scene_images[:5]), ("text", captions[:5])):
        np.testing.assert_array_equal(found[modality], embedder.encode(**{modality: sources}, batch_size=2))


def test_one_source_is_one_vector(embedder, scene_images):
    one = embedder.encode(image=scene_images[0])
    assert one.shape == (embedder.size,)
    np.testing.assert_allclose(embedder.encode(image=scene_images[:2])[0], one, atol=1e-6)
    assert embedder.encode(image=[], output="torch").shape == (0, embedder.size)


@pytest.mark.parametrize("output", ["torch", "arrow"])
def test_outputs_are_torch_or_arrow(embedder, captions, output):
    found = embedder.encode(text=captions[:3], output=output, progress=True)
    expected = embedder.encode(text=captions[:3])
    rows = found.numpy() if output == "torch" else np.array(found.to_pylist(), np.float32)
    np.testing.assert_array_equal(rows, expected)


def test_sources_that_cannot_be_embedded_are_refused(embedder, clip_folder, scene_images):
    with pytest.raises(MediaError, match=r"image 1: nowhere\.png: no such file"):
        embedder.encode(image=[scene_images[0], "nowhere.png"])
    with pytest.raises(ValueError, match="HfvlmCLIPModel embeds image, text, not audio"):
        embedder.encode(audio=["rain.wav"])
    with pytest.raises(TypeError, match="no argument picture"):
        embedder.encode(picture=scene_images)
    with pytest.raises(ValueError, match="Nothing to embed"):
        embedder.encode()
    with pytest.raises(ValueError, match="not depth"):
        Embedder.from_pretrained(clip_folder, modalities=["image", "depth"])
    with pytest.raises(ValueError, match="'list' is none of numpy, torch, arrow"):
        embedder.encode(text="a", output="list")


def test_damaged_sources_are_distinguished(embedder, scene_images):
    vectors, errors = embedder.encode_readable("image", [scene_images[0], b"nothing", scene_images[1], "gone.png"])
    np.testing.assert_allclose(vectors, embedder.encode(image=scene_images[:2]), atol=1e-6)
    assert set(errors) == {1, 3}
    assert "gone.png: no such file" in errors[3]
    assert embedder.encode_readable("image", [b""])[0].shape == (0, embedder.size)


def test_many_modalities_from_arrays_and_only_their_towers(imagebind_folder, scene_images):
    embedder = Embedder.from_pretrained(imagebind_folder, modalities=["image", "text", "audio", "depth"])
    assert {"thermal", "imu"}.isdisjoint(embedder.model.modalities)
    wave = np.sin(np.arange(16_000) / 10).astype(np.float32)
    found = embedder.encode(
        image=[scene_images[0]], text=["rain"], audio=[wave, wave[:9000]], depth=[np.full((40, 50), 2.0)],
        options={"audio": {"sampling_rate": 16_000}},
    )  # fmt: skip
    assert found.similarity("audio", "image").shape == (2, 1)
    for vectors in found.values():
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert combine(found["image"], found["audio"], weights=(0.5, 0.5)).shape == (2, embedder.size)


def test_models_that_compare_tokens(tmp_path, scene_images, captions):
    preset = hfvlm.load_preset("filip/tiny")
    config = preset.make_config()
    AutoModel.from_config(config).save_pretrained(tmp_path)
    filip.processor_for(config, preset.processor, SHIPPED / "bpe_simple_vocab.txt.gz").save_pretrained(tmp_path)
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    found = embedder.encode(image=scene_images[:4], text=captions[:5], batch_size=2)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(**processor(images=scene_images[:4], text=captions[:5], return_tensors="pt", padding=True))
    expected = output.logits_per_image / output.logit_scale
    np.testing.assert_allclose(found.similarity("image", "text"), expected, atol=1e-5)
    classes = {"a": ["circle", "round"], "b": ["square"], "c": ["cross"]}
    classifier = hfvlm.ZeroShotClassifier(embedder, classes, ["{}", "a {}"])
    with torch.no_grad():
        by_template = []
        for template in classifier.templates:
            texts = [template.format(name) for names in classes.values() for name in names]
            output = model(**processor(images=scene_images[:4], text=texts))
            scores = output.logits_per_image / output.logit_scale
            scores = torch.cat([scores[:, :2].mean(dim=1, keepdim=True), scores[:, 2:]], dim=1)
            by_template.append(scores.softmax(dim=1))
    expected = torch.stack(by_template).mean(dim=0)
    np.testing.assert_allclose(np.exp(classifier.scores(scene_images[:4])), expected, atol=1e-5)
    assert [best[0][0] for best in classifier.predict(scene_images[:4])] == ["abc"[i] for i in expected.argmax(dim=1)]
    with pytest.raises(ValueError, match="A probe needs one vector for each source; HfvlmFILIPModel gives one to"):
        embedder.check_one_vector("A probe")
    with pytest.raises(ValueError, match="An index of vectors"):
        Index(found["image"])


def test_vectors_are_combined_by_weights():
    a, b = np.array([2.0, 0.0]), np.array([0.0, 5.0])
    np.testing.assert_allclose(combine(a, b), [0.5**0.5, 0.5**0.5])
    np.testing.assert_allclose(combine(np.stack([a, b]), b, weights=(1, -0.5))[0], unit([1, -0.5]))
    assert similarity(a, b) == pytest.approx(0)
    with pytest.raises(ValueError, match="2 vectors and 1 weights"):
        combine(a, b, weights=[1])
    with pytest.raises(ValueError, match="no direction"):
        combine(a, a, weights=[1, -1])


def unit(values):
    return np.array(values) / np.linalg.norm(values)


# Index


@pytest.fixture(params=sorted(BACKENDS))
def kind(request):
    module = {"faiss": "faiss", "lancedb": "lancedb"}.get(request.param)
    if module:
        pytest.importorskip(module, reason="an optional backend")
    return BACKENDS[request.param]


def rows(count, size=16, seed=0):
    return np.random.RandomState(seed).randn(count, size).astype(np.float32)


def test_search_is_exact(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("hfvlm.inference.index.BLOCK", 16 * 100)
    vectors, queries = rows(1000), rows(5, seed=1)
    index = kind(vectors[:600])
    index.add(vectors[600:], [f"row {i}" for i in range(600, 1000)])
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ).T
    for found, cosine in zip(index.search(queries, k=7), cosines, strict=True):
        best = np.argsort(-cosine)[:7]
        assert [place for place, _ in found] == [i if i < 600 else f"row {i}" for i in best]
        np.testing.assert_allclose([score for _, score in found], cosine[best], atol=1e-5)
    index.save(tmp_path / "index")
    again = load_index(tmp_path / "index")
    assert type(again) is kind
    assert len(again) == 1000
    assert [place for place, _ in again.search(queries[0], k=7)] == [p for p, _ in index.search(queries[0], k=7)]
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "index")


def test_a_hundred_thousand_rows_are_searched_exactly(tmp_path):
    vectors, query = rows(100_000, 64), rows(1, 64, seed=1)[0]
    Index(vectors).save(tmp_path / "index")
    index = load_index(tmp_path / "index")
    assert isinstance(index.vectors, np.memmap)
    normed = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.argsort(-(normed @ (query / np.linalg.norm(query))), kind="stable")[:20]
    assert [place for place, _ in index.search(query, 20)] == expected.tolist()


def test_equal_vectors_come_in_the_order_in_which_they_were_added(monkeypatch):
    monkeypatch.setattr("hfvlm.inference.index.BLOCK", 8)
    index = Index(np.tile(rows(2, 2), (6, 1)), list("abcdefghijkl"))
    assert [place for place, _ in index.search(index.vectors[0], 4)] == list("aceg")
    assert len(index.search(index.vectors[0], 100)) == 12


@pytest.mark.parametrize("k", [1, 5, 40, 60])
def test_blocks_of_queries_and_vectors_give_the_order_of_one_sort(k, monkeypatch):
    monkeypatch.setattr("hfvlm.inference.index.BLOCK", 60)
    sizes = []
    monkeypatch.setattr(
        "hfvlm.inference.index.highest", lambda scores, k: (sizes.append(scores.size), highest(scores, k))[1]
    )
    # Cosines of few values, so that ties are on every boundary, and are exact.
    vectors = np.random.RandomState(0).choice([-0.5, 0.5], (60, 4)).astype(np.float32)
    queries = np.random.RandomState(1).choice([-0.5, 0.5], (9, 4)).astype(np.float32)
    scores, positions = Index(vectors).nearest(queries, k)
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]
    assert positions.tolist() == expected.tolist()
    assert scores.tolist() == np.take_along_axis(queries @ vectors.T, expected, 1).tolist()
    assert max(sizes) <= 60, "of 540 scores"
    assert Index(vectors).search(queries[:0], k) == []


def test_what_an_index_refuses(tmp_path):
    index = Index(rows(3))
    with pytest.raises(ValueError, match="need 3 ids, not 2"):
        index.add(rows(3), [1, 2])
    with pytest.raises(ValueError, match=r"of 16 numbers got \(1, 8\)"):
        index.search(rows(1, 8))
    with pytest.raises(ValueError, match="not a number"):
        index.add(np.full((1, 16), np.nan))
    with pytest.raises(FileNotFoundError, match=r"no index\.json"):
        load_index(tmp_path)
    assert Index().search(rows(1)[0]) == []


def test_faiss_can_be_approximate():
    pytest.importorskip("faiss", reason="an optional backend")
    vectors = rows(2000)
    index = FaissIndex(vectors, factory="IVF8,Flat")
    hits = [index.search(vector, 1)[0][0] == i for i, vector in enumerate(vectors[:100])]
    assert np.mean(hits) > 0.9
