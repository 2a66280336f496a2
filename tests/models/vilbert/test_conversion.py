import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.vilbert import config_from_original, keys_for
from hfvlm.models.vilbert.regions import Regions
from tests.models.vilbert.test_modeling import config, pairs
from tests.support.suite import close


def original(model):
    """The model's weights in a file of the authors', with what they never use."""
    rows = [row for row in keys_for(model.config) if row.target is not None]
    tensors = restore_keys(model.state_dict(), rows)
    for i in range(len(model.connections)):
        for number, width in (("1", 24), ("2", 32)):
            tensors[f"bert.encoder.c_layer.{i}.biOutput.q_dense{number}.weight"] = torch.zeros(width, 16)
            tensors[f"bert.encoder.c_layer.{i}.biOutput.q_dense{number}.bias"] = torch.zeros(width)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    return tensors


OPTIONS = {"num_attention_heads": 2, "v_num_attention_heads": 2, "bi_num_attention_heads": 2, "visual_target": 0}
OPTIONS |= {"v_biattention_id": [0, 1], "t_biattention_id": [1, 1]}


@pytest.mark.parametrize(
    ("head", "tasks"), [("HfvlmViLBERTForPreTraining", None), ("HfvlmViLBERTForVisionLanguageTasks", 20)]
)
def test_a_file_of_the_authors_is_read(head, tasks, tmp_path):
    torch.manual_seed(0)
    model = getattr(hfvlm, head)(config(head, tasks=tasks)).eval()
    torch.save(original(model), tmp_path / "model.bin")
    given = {"arguments": {"config": OPTIONS | {"hidden_dropout_prob": 0.0, "v_hidden_dropout_prob": 0.0}}}
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(45))])
    )
    vocabulary = tmp_path / "vocab.txt" if tasks else "none"
    folder = hfvlm.convert(tmp_path / "model.bin", "vilbert", tmp_path / "ours", original=given, vocabulary=vocabulary)
    again = AutoModel.from_pretrained(folder).eval()
    assert type(again).__name__ == head
    batch = pairs() | ({"task_ids": torch.arange(4)} if tasks else {})
    found, expected = again(**batch), model(**batch)
    close(found.pooler_output, expected.pooler_output, 1e-6, "pooled")
    close(found.prediction_logits, expected.prediction_logits, 1e-6, "words")
    if tasks:
        processor = AutoProcessor.from_pretrained(folder)
        assert (processor.feature_size, processor.task_tokens) == (10, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fast_mode": True}, "fast_mode"),
        ({"in_batch_pairs": True}, "in_batch_pairs"),
        ({"dynamic_attention": True}, "dynamic_attention"),
        ({"with_coattention": False}, "with_coattention"),
        ({"hidden_act": "tanh"}, "no activation tanh; it knows gelu, relu, swish"),
    ],
)
def test_options_without_a_counterpart_are_refused(fields, message):
    model = hfvlm.HfvlmViLBERTForPreTraining(config("HfvlmViLBERTForPreTraining"))
    with pytest.raises(UnsupportedOriginalError, match=message):
        config_from_original({"arguments": {"config": OPTIONS | fields}}, original(model))


def test_the_original_s_names_of_options_become_ours():
    model = hfvlm.HfvlmViLBERTForPreTraining(config("HfvlmViLBERTForPreTraining", target_size=10))
    fields = {"visual_target": 2, "fusion_method": "sum", "num_negative": 64, "hidden_act": "swish", "objective": 1}
    read = config_from_original({"arguments": {"config": OPTIONS, "config attributes": fields}}, original(model))
    assert (read.region_objective, read.fusion, read.num_negatives, read.objective) == ("nce", "sum", 64, 1)
    assert read.text_config.hidden_act == "silu"


def test_an_untrained_folder_answers(tmp_path):
    folder = hfvlm.untrained("vilbert", tmp_path / "model", model="HfvlmViLBERTForVisionLanguageTasks")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    regions = Regions(torch.randn(3, 16), [[0, 0, 9, 9]] * 3, 10, 10)
    inputs = processor(text="what is there?", regions=regions, task="vqa")
    assert model(**inputs, task="vqa").logits.shape == (1, 12)


def test_the_trunk_alone_is_that_of_a_folder(tmp_path):
    whole = hfvlm.HfvlmViLBERTForPreTraining(config("HfvlmViLBERTForPreTraining")).eval()
    whole.save_pretrained(tmp_path)
    trunk, info = hfvlm.HfvlmViLBERTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    batch = pairs()
    close(trunk.eval()(**batch).pooler_output, whole(**batch).pooler_output, 0.0, "trunk")
