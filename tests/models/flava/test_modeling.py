import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForZeroShotImageClassification,
)

import hfvlm
from hfvlm.models.flava import (
    HfvlmFLAVACodebookConfig,
    HfvlmFLAVACodebookModel,
    HfvlmFLAVAConfig,
    HfvlmFLAVAForClassification,
    HfvlmFLAVAForPreTraining,
    HfvlmFLAVAModel,
    HfvlmFLAVAMultimodalConfig,
    HfvlmFLAVAMultimodalModel,
    HfvlmFLAVATextConfig,
    HfvlmFLAVATextModel,
    HfvlmFLAVAVisionConfig,
    HfvlmFLAVAVisionModel,
)
from hfvlm.training.gradient_cache import cached_backward
from tests.support.processes import run_processes
from tests.support.suite import ModelSuite, PartSuite, close, same, trainer_finds_loss

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"initializer_range": 0.2}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 16, "projection_dim": 16}
MULTIMODAL = SIZES | {"image_hidden_size": 32, "text_hidden_size": 32}
CODEBOOK = {"hidden_size": 16, "vocab_size": 30, "blocks_per_group": 2, "initializer_range": 0.2}
# [CLS] 2, [SEP] 3, [MASK] 4, padding 0
IDS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 10, 11, 12, 3], [2, 13, 14, 15, 3, 0]])
MASK = (IDS != 0).long()
HIDDEN_IDS = IDS.masked_fill((IDS == 8) | (IDS == 12) | (IDS == 13), 4)
LABELS = torch.where(IDS != HIDDEN_IDS, IDS, -1)
CODEBOOK_PIXELS = torch.linspace(0.1, 0.9, 3 * 3 * 24 * 24).reshape(3, 3, 24, 24)
HIDDEN_PATCHES = torch.tensor([[[1, 1, 0], [0, 0, 0], [0, 0, 1]]] * 3)


def config(head: str = "HfvlmFLAVAModel", **fields) -> HfvlmFLAVAConfig:
    return HfvlmFLAVAConfig(
        architectures=[head],
        vision_config=dict(VISION),
        text_config=dict(TEXT),
        multimodal_config=dict(MULTIMODAL),
        codebook_config=dict(CODEBOOK),
        classifier_hidden_sizes=[20],
        initializer_range=0.2,
        **fields,
    )


def random_images() -> torch.Tensor:
    return torch.randn(3, 3, 24, 24)


class TestVision(PartSuite):
    model_class, auto_class = HfvlmFLAVAVisionModel, AutoModel

    def config(self):
        return HfvlmFLAVAVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": random_images(), "bool_masked_pos": HIDDEN_PATCHES}

    def test_hidden_patches_are_not_seen(self, model, batch):
        changed = batch["pixel_values"].clone()
        changed[:, :, :8, :16] += 1  # the first two patches
        expected = model(**batch).last_hidden_state
        close(model(changed, HIDDEN_PATCHES).last_hidden_state, expected, 1e-6, "hidden")
        close(model(batch["pixel_values"], HIDDEN_PATCHES.flatten(1)).last_hidden_state, expected, 0.0, "flat mask")
        assert (model(changed).last_hidden_state - expected).abs().max() > 0.1
        with pytest.raises(ValueError, match=r"bool_masked_pos is \(3, 2, 2\), but there are 9 patches"):
            model(changed, HIDDEN_PATCHES[:, :2, :2])

    def test_without_a_mask_token_nothing_can_be_hidden(self, batch):
        model = HfvlmFLAVAVisionModel(HfvlmFLAVAVisionConfig(**VISION, mask_token=False))
        assert "mask_token" not in model.state_dict()
        model(batch["pixel_values"])
        with pytest.raises(ValueError, match="has no mask token"):
            model(**batch)

    def test_any_size_with_interpolated_positions(self, model):
        same = random_images()
        close(model(same, interpolate_pos_encoding=True).embeds, model(same).embeds, 0.0, "same size")
        larger = torch.randn(1, 3, 40, 16)
        assert model(larger, interpolate_pos_encoding=True).last_hidden_state.shape == (1, 11, 32)
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            model(larger)

    def test_dropout_is_on_every_branch(self, batch):
        model = HfvlmFLAVAVisionModel(HfvlmFLAVAVisionConfig(**VISION, hidden_dropout=0.5))
        calm = model.eval()(**batch).embeds
        close(model(**batch).embeds, calm, 0.0, "evaluation")
        layer = model.train().layers[0]
        x = torch.ones(1, 40, 32)
        for part in (layer.dropout, layer.mlp):
            assert (part(x) == 0).float().mean() > 0.3
        assert model.dropout.p == 0.5

    def test_patches_stay_in_their_places(self):
        with pytest.raises(StrictDataclassClassValidationError, match="no patch_dropout"):
            HfvlmFLAVAVisionConfig(**VISION, patch_dropout=0.5)


class TestText(PartSuite):
    model_class, auto_class = HfvlmFLAVATextModel, AutoModel

    def config(self):
        return HfvlmFLAVATextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK}

    def test_padding_is_known_by_its_id(self, model, batch):
        expected = model(**batch).embeds
        close(model(IDS).embeds, expected, 0.0, "without a mask")
        close(model(IDS[:1, :4]).embeds, expected[:1], 1e-5, "without padding")
        assert (model(IDS, torch.ones_like(IDS)).embeds - expected).abs().max() > 1e-3

    def test_token_types_count(self, model, batch):
        assert not torch.allclose(model(**batch, token_type_ids=MASK).embeds, model(**batch).embeds)

    def test_too_many_tokens_are_refused(self, model):
        with pytest.raises(ValueError, match="17 tokens.*positions for 16"):
            model(torch.ones(1, 17, dtype=torch.long))


class TestMultimodal(PartSuite):
    model_class, auto_class = HfvlmFLAVAMultimodalModel, AutoModel

    def config(self):
        return HfvlmFLAVAMultimodalConfig(**MULTIMODAL | {"text_hidden_size": 24})

    def inputs(self):
        return {"image_tokens": torch.randn(3, 5, 32), "text_tokens": torch.randn(3, 4, 24)}


class TestCodebook(PartSuite):
    model_class, auto_class = HfvlmFLAVACodebookModel, AutoModel
    records = ("hidden_states",)
    lora_layers = ["conv1", "conv4"]

    def config(self):
        return HfvlmFLAVACodebookConfig(**CODEBOOK)

    def inputs(self):
        return {"codebook_pixel_values": torch.rand(3, 3, 24, 24)}

    def test_an_eighth_of_rows_and_columns(self, model):
        output = model(torch.rand(1, 3, 32, 16))
        assert output.logits.shape == (1, 30, 4, 2)
        assert torch.equal(output.codes, output.logits.argmax(dim=1))


class TestModel(ModelSuite):
    model_class, auto_class = HfvlmFLAVAModel, AutoModelForZeroShotImageClassification
    implementations = ("sdpa",)

    def config(self):
        return config()

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": random_images(), "attention_mask": MASK}

    def loss_inputs(self):
        return {"return_loss": True}

    def objective(self, model, batch):
        """What reads the multimodal encoder and the summaries is asked apart from the loss."""
        both = model.get_multimodal_features(**batch).pooler_output.square().mean()
        towers = model.vision_model(batch["pixel_values"]), model.text_model(IDS, MASK)
        return (
            super().objective(model, batch)
            + both
            + sum(t.pooler_output.square().mean() for t in towers)
            + (model.vision_model(batch["pixel_values"], HIDDEN_PATCHES).embeds.square().mean())
        )

    def test_texts_are_read_with_their_images(self, model, batch):
        both = model.get_multimodal_features(**batch)
        assert both.last_hidden_state.shape == (3, 1 + 10 + 6, 32)
        changed = model.get_multimodal_features(**batch | {"pixel_values": batch["pixel_values"].flip(0)})
        assert (both.pooler_output - changed.pooler_output).abs().max() > 1e-2

    def test_padding_is_read_with_images(self, model, batch):
        """As in the original: a text's padding is a part of what the multimodal encoder was trained on."""
        short = {"input_ids": IDS[:1, :4], "pixel_values": batch["pixel_values"][:1]}
        long = short | {"input_ids": IDS[:1]}
        with torch.no_grad():
            first, second = (model.get_multimodal_features(**each).pooler_output for each in (short, long))
        assert (first - second).abs().max() > 1e-3

    def test_other_classes_folders_are_read(self, batch, tmp_path):
        whole = HfvlmFLAVAForPreTraining(config("HfvlmFLAVAForPreTraining")).eval()
        whole.save_pretrained(tmp_path)
        model, info = HfvlmFLAVAModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        close(model.eval()(**batch).logits_per_image, whole(**batch).logits_per_image, 1e-6, "logits")
        head, info = HfvlmFLAVAForClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
        assert {key.split(".")[0] for key in info.pop("missing_keys")} == {"classifier"}
        assert not any(info.values()), info
        assert head.classifier.layers[-1].out_features == 4

    def test_cosines_without_a_temperature(self, batch):
        model = HfvlmFLAVAModel(config(logit_scale_init_value=None)).eval()
        output = model(**batch)
        close(output.logits_per_image, output.image_embeds @ output.text_embeds.t(), 1e-6, "cosines")
        assert not any("logit_scale" in name for name in model.state_dict())

    def test_widths_must_agree(self):
        with pytest.raises(StrictDataclassClassValidationError, match=r"projection_dim differs: 16"):
            HfvlmFLAVAConfig(
                vision_config=VISION, text_config=TEXT | {"projection_dim": 8}, multimodal_config=MULTIMODAL
            )
        with pytest.raises(StrictDataclassClassValidationError, match=r"of \(768, 768\), the encoders'"):
            HfvlmFLAVAConfig(vision_config=VISION, text_config=TEXT)


class TestClassification(ModelSuite):
    test_compiles_as_one_graph = None  # a linear layer on the model above
    model_class, auto_class = HfvlmFLAVAForClassification, AutoModelForSequenceClassification
    implementations = ("sdpa",)
    records = ()

    def config(self):
        return config("HfvlmFLAVAForClassification", num_labels=4, classifier_dropout=0.0)

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": random_images(), "attention_mask": MASK}

    def loss_inputs(self):
        return {"labels": torch.tensor([0, 3, 1])}

    def objective(self, model, batch):
        """The summaries are no part of it, nor is what stands for hidden patches."""
        towers = model.vision_model(batch["pixel_values"], HIDDEN_PATCHES), model.text_model(IDS, MASK)
        both = model.multimodal_model(*(tower.before_norm for tower in towers))
        unimodal = (model(input_ids=IDS).logits, model(pixel_values=batch["pixel_values"]).logits)
        return (
            super().objective(model, batch)
            + sum(output.pooler_output.square().mean() for output in (*towers, both))
            + sum(logits.square().mean() for logits in unimodal)
        )

    def test_towers_alone_equal_those_inside(self, model, batch, tmp_path):
        """A classifier has all of its towers but the projections into the joint space."""
        model.save_pretrained(tmp_path)
        for name in ("vision_model", "text_model", "multimodal_model"):
            inside = getattr(model, name)
            alone, info = type(inside).from_pretrained(tmp_path, output_loading_info=True)
            assert all(key.startswith("projection.") for key in info.pop("missing_keys"))
            assert not any(info.values()), (name, info)
            for key, value in inside.state_dict().items():
                assert torch.equal(alone.state_dict()[key], value), key

    def test_reads_what_it_is_given(self, model, batch):
        """The encoder of what is given; of both, the multimodal one."""
        pixels = {"pixel_values": batch["pixel_values"]}
        image, text = model.vision_model(**pixels), model.text_model(IDS, MASK)
        both = model.multimodal_model(image.before_norm, text.before_norm)
        for given, tower in ((pixels, image), ({"input_ids": IDS, "attention_mask": MASK}, text), (batch, both)):
            close(model(**given).logits, model.classifier(tower.last_hidden_state[:, 0]), 1e-6, "logits")
        with pytest.raises(ValueError, match="needs input_ids, pixel_values or both"):
            model()

    def test_loss_is_cross_entropy(self, model, batch):
        output = model(**batch, **self.loss_inputs())
        close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 3, 1])), 1e-6, "loss")

    def test_records_the_encoder_that_was_read(self, model, batch):
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert [state.shape for state in states] == [(3, 6, 32)] * 3

    def test_images_alone_have_their_auto_class(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is HfvlmFLAVAForClassification


class TestPreTraining(TestModel):
    model_class, auto_class = HfvlmFLAVAForPreTraining, AutoModelForPreTraining

    def config(self):
        return config("HfvlmFLAVAForPreTraining")

    @staticmethod
    def images(batch):
        hidden = {"bool_masked_pos": HIDDEN_PATCHES, "codebook_pixel_values": CODEBOOK_PIXELS}
        return {"pixel_values": batch["pixel_values"]} | hidden

    texts = {"input_ids_masked": HIDDEN_IDS, "attention_mask": MASK, "mlm_labels": LABELS}

    def test_trainer_evaluates_what_is_masked(self, model, batch):
        for given in (self.images(batch), self.texts, batch | {"return_loss": True}):
            assert model(**given).loss is not None
            assert trainer_finds_loss(type(model), given)

    def objective(self, model, batch):
        """All six losses, of three batches, and what has a part in none."""
        images, pairs = self.images(batch), torch.tensor([1, 1, 1])
        losses = [
            model(**given).loss
            for given in (images, self.texts, images | self.texts | {"input_ids": IDS, "itm_labels": pairs})
        ]
        return super().objective(model, batch) + sum(losses)

    def test_every_batch_has_its_losses(self, model, batch):
        images = self.images(batch)
        found = {
            kind: {name.removesuffix("_loss") for name in model(**given) if name.endswith("_loss")}
            for kind, given in {
                "images": images,
                "texts": self.texts,
                "both": images | self.texts | {"input_ids": IDS},
            }.items()
        }
        assert found == {
            "images": {"mim"},
            "texts": {"mlm"},
            "both": {"mmm_image", "mmm_text", "itm", "contrastive"},
        }
        with pytest.raises(ValueError, match="needs pixel_values, or texts in input_ids_masked"):
            model(input_ids=IDS, return_loss=True)

    def test_loss_is_the_weighted_sum(self, batch):
        weights = {"mmm_image_weight": 2.0, "mmm_text_weight": 3.0, "itm_weight": 5.0, "contrastive_weight": 7.0}
        plain, weighted = (
            HfvlmFLAVAForPreTraining(config("HfvlmFLAVAForPreTraining", **w)).eval() for w in ({}, weights)
        )
        weighted.load_state_dict(plain.state_dict())
        given = self.images(batch) | self.texts | {"input_ids": IDS, "itm_labels": torch.tensor([1, 0, 1])}
        first, second = plain(**given), weighted(**given)
        expected = sum(weight * first[name.replace("weight", "loss")] for name, weight in weights.items())
        close(second.loss, expected, 1e-5, "sum")
        none = HfvlmFLAVAForPreTraining(config("HfvlmFLAVAForPreTraining", **dict.fromkeys(weights, 0)))
        assert none(**given).loss is None

    def test_what_does_not_belong_together_counts_once(self, model, batch):
        given = self.images(batch) | self.texts | {"input_ids": IDS}
        some = model(**given, itm_labels=torch.tensor([[1], [0], [1]]))
        rows = torch.tensor([0, 2])
        logits = some.logits_per_image[rows], some.logits_per_text[rows]
        close(some.contrastive_loss, sum(F.cross_entropy(x, rows) for x in logits) / 2, 1e-5, "contrastive")
        assert len(some.mmm_text_logits) == (LABELS[rows] >= 0).sum()
        assert len(some.mmm_image_logits) == HIDDEN_PATCHES[rows].sum()
        close(some.itm_loss, F.cross_entropy(some.itm_logits, torch.tensor([1, 0, 1])), 1e-5, "matching")
        all_of_them, none = model(**given), model(**given, itm_labels=torch.zeros(3, dtype=torch.long))
        assert all_of_them.matched_mask is None
        assert none.matched_mask.all()
        close(none.contrastive_loss, all_of_them.contrastive_loss, 1e-5, "all rows")
        close(all_of_them.contrastive_loss, model.contrast(all_of_them), 1e-6, "from the output's fields")

    def test_codes_are_of_hidden_patches_alone(self, model, batch):
        images = self.images(batch)
        codes = model.codes(images["codebook_pixel_values"], HIDDEN_PATCHES)
        expected = model.codebook_model(images["codebook_pixel_values"]).codes.flatten(1)
        hidden = HIDDEN_PATCHES.flatten(1).bool()
        assert torch.equal(codes[hidden], expected[hidden])
        assert (codes[~hidden] == -100).all()
        own = model(pixel_values=images["pixel_values"], bool_masked_pos=HIDDEN_PATCHES, mim_labels=codes)
        close(own.mim_loss, model(**images).mim_loss, 1e-6, "own labels")
        with pytest.raises(ValueError, match="codebook_pixel_values need bool_masked_pos"):
            model(pixel_values=images["pixel_values"], codebook_pixel_values=images["codebook_pixel_values"])
        with pytest.raises(ValueError, match="16 codes an image, for 9 patches"):
            model.codes(torch.rand(3, 3, 32, 32), HIDDEN_PATCHES)

    def test_where_nothing_is_to_be_predicted_the_loss_is_zero(self, model):
        assert model(input_ids_masked=IDS, mlm_labels=torch.full_like(IDS, -100)).loss == 0
        assert model(input_ids_masked=IDS).mlm_logits.shape == (3, 6, 50)
        assert model(pixel_values=random_images()).mim_logits.shape == (3, 9, 30)

    def test_the_codebook_stays(self, model):
        assert not any(p.requires_grad for p in model.codebook_model.parameters())
        half = HfvlmFLAVAForPreTraining.from_pretrained(
            None, config=self.config(), state_dict=model.state_dict(), dtype=torch.bfloat16
        )
        assert half.codebook_model.head.weight.dtype == half.logit_scale.scale.dtype == torch.float32
        assert half.mim_head.decoder.weight.dtype == torch.bfloat16

    def test_the_temperature_is_bounded(self, model, batch):
        torch.nn.init.constant_(model.logit_scale.scale, 9.0)
        model(**batch, return_loss=True)
        assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)
        torch.nn.init.constant_(model.logit_scale.scale, -9.0)
        model(**batch, return_loss=True)
        assert model.logit_scale.exp().item() == 1

    def test_heads_need_encoders_of_one_width(self):
        wide = MULTIMODAL | {"hidden_size": 48}
        with pytest.raises(ValueError, match="hidden_size must be the same"):
            HfvlmFLAVAForPreTraining(HfvlmFLAVAConfig(vision_config=VISION, text_config=TEXT, multimodal_config=wide))


def matched_on_rank(rank, a, b, matched):
    """The loss of a process's rows, and the gradients that it has for them."""
    from hfvlm.models.flava.modeling_flava_pretraining import matched_contrastive_loss

    rows = slice(2 * rank, 2 * rank + 2)
    own_a, own_b = a[rows].clone().requires_grad_(), b[rows].clone().requires_grad_()
    loss = matched_contrastive_loss(own_a, own_b, torch.tensor([5.0]), matched[rows], torch.distributed.group.WORLD)
    loss.backward()
    return loss.detach(), own_a.grad, own_b.grad


def test_pairs_are_compared_over_processes():
    a, b = (F.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    matched = torch.tensor([True, False, True, True])
    results = run_processes(matched_on_rank, 2, a, b, matched)
    a, b = a.requires_grad_(), b.requires_grad_()
    losses = []
    for rows in ([0], [2, 3]):
        target = torch.tensor(rows)
        losses.append(sum(F.cross_entropy(5 * x[rows] @ y.t(), target) for x, y in ((a, b), (b, a))) / 2)
    sum(losses).backward()
    for rank, (loss, grad_a, grad_b) in enumerate(results):
        close(loss, losses[rank].detach(), 1e-5, "loss")
        close(grad_a, a.grad[2 * rank : 2 * rank + 2], 1e-5, "gradient of a")
        close(grad_b, b.grad[2 * rank : 2 * rank + 2], 1e-5, "gradient of b")


@pytest.mark.parametrize("kind", [HfvlmFLAVAModel, HfvlmFLAVAForPreTraining])
def test_contrastive_batches_in_parts(kind):
    """As ContrastiveTrainer computes batches that are larger than memory."""
    model = kind(config(kind.__name__))
    batch = {"input_ids": IDS, "pixel_values": random_images(), "attention_mask": MASK}
    model.contrast(model(**batch)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = cached_backward(model, model.contrast, batch, 2)
    close(loss, model(**batch, return_loss=True).loss, 1e-5, "loss")
    # Keys' biases have no gradient but rounding.
    parameters = {name: p for name, p in model.named_parameters() if not name.endswith("k_proj.bias")}
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    same(found, {name: expected[name] for name in found}, 1e-4)
    assert {"logit_scale.scale", "text_model.projection.weight", "vision_model.position"} <= set(found)


# LoRA


def trained(model):
    return {name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad}


def test_recipes():
    model = HfvlmFLAVAForPreTraining(config("HfvlmFLAVAForPreTraining"))
    names = trained(hfvlm.lora(model, quiet=True))
    assert {name.split(".")[0] for name in names} == {"vision_model", "text_model", "multimodal_model"}
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    model = HfvlmFLAVAModel(config())
    assert {name.split(".")[0] for name in trained(hfvlm.lora(model, quiet=True))} == {"vision_model", "text_model"}
    model = HfvlmFLAVAForClassification(config("HfvlmFLAVAForClassification"))
    assert any(name.startswith("multimodal_model") for name in trained(hfvlm.lora(model, quiet=True)))
    model = HfvlmFLAVAModel(config())
    names = trained(hfvlm.lora(model, "text+projection+scale", quiet=True))
    assert {name for name in names if "lora_" not in name} == {
        *(
            f"{kind}_model.projection.modules_to_save.default.{part}"
            for kind in ("vision", "text")
            for part in ("weight", "bias")
        ),
        "logit_scale.modules_to_save.default.scale",
    }
