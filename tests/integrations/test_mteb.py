"""mteb's tasks, on data made here: its stock loader of a folder, and a model of every modality."""

import json

import datasets
import numpy as np
import pytest
import torch

import hfvlm
from hfvlm.samples.scenes import Scene, all_scenes
from tests.support.folders import tiny_folder

pytestmark = pytest.mark.integration
mteb = pytest.importorskip("mteb", reason="comes with hfvlm[integrations]")

RATE = 16_000
SCENES = all_scenes()[::3][:12]
RANDOM = np.random.default_rng(0)
# Of each modality twelve rows, of which row i of one belongs to row i of another.
COLUMNS = {
    "text": [scene.caption() for scene in SCENES],
    "image": [scene.render() for scene in SCENES],
    "audio": [np.sin(np.arange(RATE) * 0.02 * (i + 1)).astype(np.float32) for i in range(len(SCENES))],
    "video": list(RANDOM.integers(0, 255, (len(SCENES), 8, 32, 32, 3), dtype=np.uint8)),
}
LETTERS = {"text": "t", "image": "i", "audio": "a", "video": "v"}


def table(modality, prefix):
    """A data set of one modality, as mteb has it."""
    rows = COLUMNS[modality]
    values = [{"array": row, "sampling_rate": RATE} for row in rows] if modality == "audio" else rows
    kinds = {
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "audio": {"array": datasets.Sequence(datasets.Value("float32")), "sampling_rate": datasets.Value("int64")},
        "video": datasets.Array4D(COLUMNS["video"][0].shape, "uint8"),
    }
    features = datasets.Features({"id": datasets.Value("string"), modality: kinds[modality]})
    ids = [f"{prefix}{i}" for i in range(len(rows))]
    made = datasets.Dataset.from_dict({"id": ids, modality: values}, features=features)
    if modality in ("audio", "video"):  # as decoders give them
        made = made.with_format("numpy", columns=[modality], output_all_columns=True)
    return made


def retrieval(query, document):
    """A task in which each query has one document."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Pairs(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"{query.title()}To{document.title()}", description="pairs", reference=None, type="Any2AnyRetrieval",
            dataset={"path": "none", "revision": "none"}, category=f"{LETTERS[query]}2{LETTERS[document]}",
            modalities=list(dict.fromkeys([query, document])), eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10", date=None, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *args, **kwargs):
            relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(SCENES))}
            split = {"queries": table(query, "q"), "corpus": table(document, "d"), "relevant_docs": relevant}
            self.dataset = {"default": {"test": {**split, "top_ranked": None}}}
            self.data_loaded = True

    return Pairs()


def scores(model, *tasks):
    """The main scores of tasks."""
    found = mteb.evaluate(model, list(tasks), cache=None, co2_tracker=False, show_progress_bar=False)
    return {result.task_name: result.get_score() for result in found.task_results}


def gain(embedder, query, document):
    """The same of the embedder's vectors, which mteb rounds: 1 / log2(1 + rank) of the one document, up to rank 10."""
    sources = {"audio": [(row, RATE) for row in COLUMNS["audio"]]}
    queries, documents = (embedder.encode(**{name: sources.get(name, COLUMNS[name])}) for name in (query, document))
    similar = queries @ documents.T
    rank = 1 + (similar > np.diag(similar)[:, None]).sum(axis=1)
    return pytest.approx(float(np.mean(np.where(rank <= 10, 1 / np.log2(1 + rank), 0))), abs=2e-5)


def test_the_stock_loader_is_the_embedder(clip_folder):
    """It finds a folder's modalities in sentence-transformers' files."""
    from mteb.models.model_meta import ModelMeta
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    from hfvlm.integrations.mteb import Encoder

    names = ("config_sentence_transformers", "sentence_bert_config", "modules", "config")
    files = [json.loads((clip_folder / f"{name}.json").read_text()) for name in names]
    loader, kind, modalities = ModelMeta._resolve_loader("hfvlm/clip", *files, None)
    assert (loader, kind, set(modalities)) == (SentenceTransformerEncoderWrapper, "dense", {"text", "image"})
    stock = loader(str(clip_folder), model_kwargs={"dtype": torch.float32})
    stock.mteb_model_meta = ModelMeta.create_empty({"name": "hfvlm/clip", "modalities": modalities})
    embedder = hfvlm.Embedder.from_pretrained(clip_folder, dtype="float32")
    tasks = [retrieval("text", "image"), retrieval("image", "text")]
    found = scores(stock, *tasks)
    assert found == {
        "TextToImage": gain(embedder, "text", "image"), "ImageToText": gain(embedder, "image", "text")
    }  # fmt: skip
    assert min(found.values()) > 0.5, "the small CLIP knows its scenes"
    assert scores(Encoder(embedder), *tasks) == found


@pytest.mark.parametrize("name", ["imagebind", "languagebind"])
def test_every_modality(name, tmp_path):
    from hfvlm.integrations.mteb import Encoder

    folder = tiny_folder(name, tmp_path / name)
    embedder = hfvlm.Embedder.from_pretrained(folder, dtype="float32")
    pairs = [("text", "image"), ("text", "audio"), ("text", "video"), ("image", "audio"), ("audio", "image")]
    pairs = [pair for pair in pairs if set(pair) <= set(embedder.modalities)]
    assert {modality for pair in pairs for modality in pair} == set(COLUMNS)
    encoder = Encoder(folder, dtype="float32")
    assert set(encoder.mteb_model_meta.modalities) == set(COLUMNS)
    found = scores(encoder, *(retrieval(*pair) for pair in pairs))
    assert found == {f"{a.title()}To{b.title()}": gain(embedder, a, b) for a, b in pairs}
    assert len({round(score, 3) for score in found.values()}) > 2


def test_several_vectors_are_refused(tmp_path):
    from hfvlm.integrations.mteb import Encoder

    with pytest.raises(ValueError, match="mteb needs one vector for each source; HfvlmFILIPModel"):
        Encoder(tiny_folder("filip", tmp_path / "filip"))


def test_rows_of_several_modalities_are_added(clip_folder):
    from hfvlm.integrations.mteb import Encoder

    embedder = hfvlm.Embedder.from_pretrained(clip_folder, dtype="float32")
    looks = [Scene(colour, "circle", "large").render() for colour in ("red", "blue")]
    batch = {"text": ["a red circle", "a cross"], "image": looks, "id": ["0", "1"]}
    found = Encoder(embedder).encode([batch, {"text": ["a square"]}], batch_size=1)
    both = embedder.encode(text=batch["text"]) + embedder.encode(image=looks)
    np.testing.assert_allclose(found, np.concatenate([both, embedder.encode(text=["a square"])]), atol=1e-6)
