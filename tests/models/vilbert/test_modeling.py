import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForVisualQuestionAnswering

import hfvlm
from hfvlm.models.vilbert import (
    HfvlmViLBERTConfig,
    HfvlmViLBERTForPreTraining,
    HfvlmViLBERTForVisionLanguageTasks,
    HfvlmViLBERTModel,
    HfvlmViLBERTTextConfig,
    HfvlmViLBERTTextModel,
    HfvlmViLBERTVisionConfig,
    HfvlmViLBERTVisionModel,
)
from hfvlm.models.vilbert.modeling_vilbert_pretraining import draw_negatives, nce_loss
from hfvlm.models.vilbert.tasks import DETECTED, TASKS, task_of
from tests.support.suite import ModelSuite, PartSuite, close, same

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
SIZES |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
VISION = SIZES | {"hidden_size": 24, "intermediate_size": 24, "feature_size": 10}
TEXT = SIZES | {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 16}
# [CLS] 2, [SEP] 3, [MASK] 4, padding 0
IDS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 10, 11, 12, 3], [2, 13, 14, 15, 3, 0], [2, 8, 3, 0, 0, 0]])
MASK = (IDS != 0).long()
REGION_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
TASK_IDS = torch.tensor([1, 3, 7, 12])


def config(head: str = "HfvlmViLBERTModel", tasks: int | None = None, **fields) -> HfvlmViLBERTConfig:
    sizes = {"connection_size": 16, "num_connection_heads": 2, "head_dropout": 0.0, "target_size": 6}
    sizes |= {"num_answers": 7, "num_gqa_answers": 5, "initializer_range": 0.2}
    return HfvlmViLBERTConfig(
        architectures=[head],
        vision_config=dict(VISION),
        text_config=TEXT | {"num_tasks": tasks},
        **{"vision_connections": [0, 1], "text_connections": [1, 1]} | sizes | fields,
    )


def regions(rows: int = 4) -> dict[str, torch.Tensor]:
    corners = torch.rand(rows, 5, 4).sort(-1).values[..., [0, 1, 2, 3]]
    area = (corners[..., 2] - corners[..., 0]) * (corners[..., 3] - corners[..., 1])
    locations = torch.cat([corners, area.unsqueeze(-1)], dim=-1)
    return {"region_features": torch.randn(rows, 5, 10), "region_locations": locations}


def pairs() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": MASK, **regions(), "region_mask": REGION_MASK}


class TestText(PartSuite):
    model_class, auto_class = HfvlmViLBERTTextModel, AutoModel

    def config(self):
        return HfvlmViLBERTTextConfig(**TEXT, num_tasks=20)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK, "task_ids": TASK_IDS}

    def test_a_task_is_a_token_after_the_first(self, model, batch):
        output = model(**batch).last_hidden_state
        assert output.shape == (4, 7, 32)
        close(model(**batch | {"task_ids": TASK_IDS.unsqueeze(-1)}).last_hidden_state, output, 0.0, "a column")
        assert (model(**batch | {"task_ids": TASK_IDS.flip(0)}).last_hidden_state - output).abs().max() > 0.1
        with pytest.raises(ValueError, match="task_ids are missing"):
            model(IDS)
        plain = HfvlmViLBERTTextModel(HfvlmViLBERTTextConfig(**TEXT))
        with pytest.raises(ValueError, match="no task tokens"):
            plain(IDS, task_ids=TASK_IDS)

    def test_padding_is_not_seen(self, model, batch):
        short = model(IDS[:1, :4], task_ids=TASK_IDS[:1]).last_hidden_state
        close(model(**batch).last_hidden_state[:1, :5], short, 1e-5, "padding")

    def test_too_many_tokens_are_refused(self, model):
        with pytest.raises(ValueError, match=r"17 tokens.*positions for 16"):
            model(torch.ones(1, 17, dtype=torch.long), task_ids=TASK_IDS[:1])


class TestVision(PartSuite):
    model_class, auto_class = HfvlmViLBERTVisionModel, AutoModel

    def config(self):
        return HfvlmViLBERTVisionConfig(**VISION)

    def inputs(self):
        return {**regions(), "region_mask": REGION_MASK}

    def test_locations_count_and_padding_does_not(self, model, batch):
        expected = model(**batch).last_hidden_state
        moved = model(**batch | {"region_locations": batch["region_locations"].flip(1)}).last_hidden_state
        assert (moved - expected).abs().max() > 0.1
        changed = batch["region_features"].masked_fill(REGION_MASK[..., None] == 0, 9.0)
        seen = REGION_MASK.bool()
        close(model(**batch | {"region_features": changed}).last_hidden_state[seen], expected[seen], 1e-5, "padding")

    def test_without_any_region_all_padding_is_seen(self, model, batch):
        """As with masks of -10,000, which shift every score by the same."""
        none = model(**batch | {"region_mask": torch.zeros_like(REGION_MASK)}).last_hidden_state
        close(none, model(**batch | {"region_mask": None}).last_hidden_state, 1e-5, "no region")


class TestModel(ModelSuite):
    model_class, auto_class = HfvlmViLBERTModel, AutoModel

    def config(self):
        return config()

    def inputs(self):
        return pairs()

    def test_streams_see_each_other(self, model, batch):
        expected = model(**batch)
        other = model(**batch | regions())
        assert (other.last_hidden_state - expected.last_hidden_state).abs().max() > 0.1
        other = model(**batch | {"input_ids": IDS.flip(0), "attention_mask": MASK.flip(0)})
        assert (other.vision_last_hidden_state - expected.vision_last_hidden_state).abs().max() > 0.1

    def test_attentions_are_of_both_streams_and_between_them(self, model, batch):
        model.set_attn_implementation("eager")
        output = model(**batch, output_attentions=True, output_hidden_states=True)
        for part, length in ((output.text_model_output, 6), (output.vision_model_output, 5)):
            assert [tuple(each.shape) for each in part.attentions] == [(4, 2, length, length)] * 2
        to_regions, to_words = output.cross_attentions[0]
        assert len(output.cross_attentions) == 2
        assert (to_regions.shape, to_words.shape) == ((4, 2, 6, 5), (4, 2, 5, 6))
        close(to_regions.sum(-1), torch.ones(4, 2, 6), 1e-5, "shares of regions")
        assert to_regions[REGION_MASK[:, None, None, :].expand_as(to_regions) == 0].abs().max() == 0
        assert to_words[MASK[:, None, None, :].expand_as(to_words) == 0].abs().max() == 0
        close(output.text_model_output.hidden_states[-1], output.last_hidden_state, 0.0, "last")
        assert model(**batch).cross_attentions is None

    def test_some_hidden_states_alone(self, model, batch):
        every = model(**batch, output_hidden_states=True)
        some = model(**batch, output_hidden_states=[0, -1, 7])
        for part in ("text_model_output", "vision_model_output"):
            first, *others, last = some[part].hidden_states
            assert others == [None]
            close(first, every[part].hidden_states[0], 0.0, "first")
            close(last, every[part].hidden_states[-1], 0.0, "last")
            assert some[part].attentions is None

    def test_sums_and_products_of_the_pooled(self, model, batch):
        output = model(**batch)
        close(output.pooler_output, output.text_pooled * output.vision_pooled, 0.0, "mul")
        summed = HfvlmViLBERTModel(config(fusion="sum")).eval()
        summed.load_state_dict(model.state_dict())
        added = output.text_pooled + output.vision_pooled
        close(summed(**batch).pooler_output, added, 1e-6, "sum")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"text_connections": [1]}, "differ in length"),
            ({"text_connections": [1, 0]}, "must rise"),
            ({"vision_connections": [0, 2]}, "2 layers"),
            ({"num_connection_heads": 3}, "not a multiple"),
            ({"fusion": "max"}, "mul, sum"),
            ({"region_objective": "mae"}, "kl, mse, nce"),
            ({"region_objective": "mse"}, "must be vision_config.feature_size, 10"),
            ({"objective": 3}, "0, 1 or 2"),
        ],
    )
    def test_configurations_that_fit_nothing_are_refused(self, fields, message):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            config(**fields)


class TestPreTraining(PartSuite):
    model_class, auto_class = HfvlmViLBERTForPreTraining, AutoModelForPreTraining

    def config(self):
        return config("HfvlmViLBERTForPreTraining")

    def inputs(self):
        return pairs()

    def loss_inputs(self):
        return labels()

    def test_the_loss_is_the_sum_of_three(self, model, batch):
        output = model(**batch, **labels())
        assert output.region_logits.shape == (4, 5, 6)
        sums = output.mlm_loss + output.region_loss + output.alignment_loss
        close(output.loss, sums, 1e-6, "sum")
        model.config.region_weight = 2.0
        close(model(**batch, **labels()).loss, sums + output.region_loss, 1e-6, "weighted")

    def test_masked_regions_alone_count(self, model, batch):
        given = labels()
        expected = model(**batch, **given).region_loss
        changed = given["region_targets"].masked_fill(given["region_labels"][..., None] != 1, 0.1)
        close(model(**batch, **given | {"region_targets": changed}).region_loss, expected, 0.0, "others")
        none = given | {"region_labels": torch.full_like(given["region_labels"], -1)}
        assert model(**batch, **none).region_loss == 0

    def test_objectives(self, model, batch):
        given = labels()
        model.config.objective = 1
        aligned = given["alignment_labels"] == 0
        some = {name: value[aligned] for name, value in (batch | given).items()}
        close(model(**batch, **given).mlm_loss, model(**some).mlm_loss, 1e-5, "words of pairs")
        close(model(**batch, **given).region_loss, model(**some).region_loss, 1e-5, "regions of pairs")
        model.config.objective = 2
        assert model(**batch, **given).alignment_loss is None

    @pytest.mark.parametrize("objective", ["mse", "nce"])
    def test_features_as_targets(self, batch, objective):
        model = HfvlmViLBERTForPreTraining(config(region_objective=objective, target_size=10, num_negatives=8)).eval()
        given = labels() | {"region_targets": batch["region_features"][:, 1:]}
        output = model(**batch, **given)
        masked = given["region_labels"] == 1
        if objective == "mse":
            expected = F.mse_loss(output.region_logits[:, 1:][masked], given["region_targets"][masked])
            close(output.region_loss, expected, 1e-5, "mse")
        else:
            assert torch.isfinite(output.region_loss)
            with pytest.raises(ValueError, match="there are 1 of 4"):
                model(**{name: value[:1] for name, value in (batch | given).items()})

    def test_labels_without_targets_are_refused(self, model, batch):
        given = labels()
        with pytest.raises(ValueError, match="go together"):
            model(**batch, region_labels=given["region_labels"])
        with pytest.raises(ValueError, match="without their mean"):
            model(**batch, **given | {"region_targets": torch.rand(4, 5, 6)})

    def test_words_are_scored_by_their_embeddings(self, model, batch):
        assert model.lm_head.decoder.weight is model.text_model.embeddings.token.weight
        model.resize_token_embeddings(53)
        assert model(**batch).prediction_logits.shape == (4, 6, 53)


def labels() -> dict[str, torch.Tensor]:
    return {
        "mlm_labels": torch.where((IDS == 8) | (IDS == 12), IDS, -1),
        "region_labels": torch.tensor([[1, -1, -1, -1], [1, 1, -1, -1], [-1, -1, 1, -1], [1, -1, -1, -1]]),
        "region_targets": torch.linspace(-1, 1, 96).reshape(4, 4, 6).softmax(-1),
        "alignment_labels": torch.tensor([0, 1, 0, 1]),
    }


def test_negatives_are_other_regions_of_other_rows_and_of_the_same():
    drawn = draw_negatives((3, 4), 128)
    assert drawn.shape == (3, 4, 89 + 38)
    rows, columns = drawn // 4, drawn % 4
    own = torch.arange(3)[:, None, None]
    assert (rows[..., :89] != own).all()
    assert (rows[..., 89:] == own).all()
    assert (columns[..., 89:] != torch.arange(4)[:, None]).all()
    assert set(rows[0, ..., :89].unique().tolist()) == {1, 2}
    assert set(columns[..., 89:].unique().tolist()) == {0, 1, 2, 3}


def test_contrast_equals_a_loop():
    torch.manual_seed(0)
    predicted, target, masked = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    negatives = draw_negatives((2, 3), 10)
    losses = []
    for b, r in masked.nonzero().tolist():
        others = [target.reshape(6, 4)[i] for i in negatives[b, r]]
        scores = torch.stack([predicted[b, r] @ each for each in (target[b, r], *others)])
        losses.append(-scores.log_softmax(0)[0])
    close(nce_loss(predicted, target, masked, negatives), torch.stack(losses).mean(), 1e-5, "nce")


class TestTasks(PartSuite):
    model_class, auto_class = HfvlmViLBERTForVisionLanguageTasks, AutoModelForVisualQuestionAnswering

    def config(self):
        return config("HfvlmViLBERTForVisionLanguageTasks", tasks=20)

    def inputs(self):
        return pairs() | {"task_ids": TASK_IDS}

    def test_rows_of_a_batch_do_not_influence_each_other(self, model, batch):
        """But for those of a pair."""
        expected = self.run(model, batch)
        for i in range(4):
            alone = self.run(model, {name: value[i : i + 1] for name, value in batch.items()})
            assert "pair_logits" not in alone
            for name, value in alone.items():
                close(value[0], expected[name][i], 1e-5, f"row {i} of {name}")
        pair = self.run(model, {name: value[2:] for name, value in batch.items()})
        close(pair["pair_logits"][0], expected["pair_logits"][1], 1e-5, "the second pair")

    def test_a_task_has_its_head_alone(self, model, batch):
        every = model(**batch | {"task_ids": torch.full((4,), 1)})
        one = model(**{name: value for name, value in batch.items() if name != "task_ids"}, task="vqa")
        close(one.answer_logits, every.answer_logits, 0.0, "answers")
        close(one.logits, one.answer_logits, 0.0, "logits")
        assert one.gqa_logits is None
        assert one.prediction_logits is None
        same(self.run(model, batch | {"task": 1}), self.run(model, batch | {"task": "vqa"}), exact=True)

    def test_every_task_has_a_loss(self, model, batch):
        del batch["task_ids"]
        given = {
            "answer": torch.rand(4, 7),
            "gqa": torch.rand(4, 5),
            "choice": torch.tensor([1]),
            "grounding": torch.rand(4, 5),
            "pair": torch.eye(2),
            "entailment": torch.eye(3)[[0, 1, 2, 0]],
        }
        for name, task in TASKS.items():
            if task.kind == "pointing":
                continue
            output = model(**batch, task=name, labels=given[task.kind])
            assert output.loss.ndim == 0
            assert torch.isfinite(output.loss)
            assert 0 <= task.score(output.logits, given[task.kind]).mean() <= 1

    def test_pointing_chooses_among_annotated_regions(self):
        logits = torch.zeros(2, DETECTED + 4)
        logits[0, DETECTED + 2], logits[1, DETECTED] = 5.0, 5.0
        logits[:, 0] = 9.0  # detected ones are no candidates
        targets, candidates = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[1, 2], [0, 3]])
        task = TASKS["visual7w"]
        assert task.score(logits, targets, candidates).tolist() == [1, 0]
        expected = F.binary_cross_entropy_with_logits(torch.tensor([[0.0, 5.0], [5.0, 0.0]]), targets) * 2
        close(task.loss(logits, targets, candidates), expected, 1e-6, "loss")
        with pytest.raises(ValueError, match="candidates"):
            task.loss(logits, targets)

    def test_padded_regions_are_never_found(self, model, batch):
        output = model(**batch)
        assert (output.grounding_logits[REGION_MASK == 0] < -9_000).all()
        assert (output.grounding_logits[REGION_MASK == 1].abs() < 100).all()

    def test_what_makes_no_sense_is_refused(self, model, batch):
        with pytest.raises(ValueError, match="labels and candidates need task"):
            model(**batch, labels=torch.rand(4, 7))
        with pytest.raises(ValueError, match="task 'foil' is none of vqa"):
            model(**batch, task="foil")
        with pytest.raises(ValueError, match="the batch is odd"):
            model(**{name: value[:3] for name, value in batch.items()}, task="nlvr2")
        with pytest.raises(TypeError, match="region_feature"):
            model(**batch, region_feature=1)

    def test_tasks_are_found_by_their_names_and_numbers(self):
        assert task_of(12) is task_of("nlvr2") is TASKS["nlvr2"]
        assert len({task.id for task in TASKS.values()}) == len(TASKS) == 17

    def test_adapters_of_a_recipe_are_in_both_streams(self, model, batch):
        expected = self.run(model, batch)
        tuned = hfvlm.lora(model, "vision+text", r=2, quiet=True)
        same(self.run(tuned, batch), expected, 1e-6)
        trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        assert len(trained) == 2 * 2 * 2 * 2  # streams, layers, queries and values, A and B
        assert all("_model.layers." in name and "lora_" in name for name in trained)

    def test_adapters_of_the_connections(self, model, batch):
        with pytest.raises(ValueError, match="has no part regions; a recipe joins text, vision, connections"):
            hfvlm.lora(model, "regions", quiet=True)
        expected = self.run(model, batch)
        tuned = hfvlm.lora(model, "connections", r=2, quiet=True)
        same(self.run(tuned, batch), expected, 1e-6)
        trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        assert len(trained) == 2 * 2 * 2 * 2  # streams, connections, queries and values, A and B
        assert all(".connections." in name and "lora_" in name for name in trained)

    def test_starts_from_pretraining(self, batch, tmp_path):
        whole = HfvlmViLBERTForPreTraining(config("HfvlmViLBERTForPreTraining")).eval()
        whole.save_pretrained(tmp_path)
        model, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        heads = ("answer", "gqa", "pair", "score", "entailment", "grounding", "token")
        assert {key.partition("_head")[0] for key in info["missing_keys"]} == set(heads)
        del batch["task_ids"]
        close(model.eval()(**batch).region_logits, whole(**batch).region_logits, 1e-6, "regions")
