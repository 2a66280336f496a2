import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
)

import hfvlm
from hfvlm.checkpoints.key_table import KeyTableError
from hfvlm.modeling.compat import cache_of
from hfvlm.models.blip import (
    HfvlmBLIPConfig,
    HfvlmBLIPForConditionalGeneration,
    HfvlmBLIPForImageTextRetrieval,
    HfvlmBLIPForPreTraining,
    HfvlmBLIPForQuestionAnswering,
    HfvlmBLIPForRetrievalTraining,
    HfvlmBLIPForVisualReasoning,
    HfvlmBLIPModel,
    HfvlmBLIPTextConfig,
    HfvlmBLIPTextDecoder,
    HfvlmBLIPTextModel,
    HfvlmBLIPVisionConfig,
    HfvlmBLIPVisionModel,
)
from hfvlm.models.blip.modeling_blip_momentum import Teacher
from hfvlm.modules.context import Context
from hfvlm.presets import load_preset
from tests.support.golden import Golden
from tests.support.paths import OURS
from tests.support.processes import run_processes
from tests.support.suite import ModelSuite, PartSuite, close, same, tensors

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"initializer_range": 0.2}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 16, "context_size": 32, "projection_dim": 16}
TEXT |= {
    "bos_token_id": 48,
    "encoder_token_id": 49,
    "eos_token_id": 3,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
# [CLS] 2, [SEP] 3, padding 0
IDS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 10, 11, 12, 3]])
MASK = (IDS != 0).long()
LEFT = torch.tensor([[0, 0, 2, 7, 8, 3], [2, 9, 10, 11, 12, 3]])


def config(head: str = "HfvlmBLIPModel", joint: int | None = 16, **fields) -> HfvlmBLIPConfig:
    width = {"projection_dim": joint}
    return HfvlmBLIPConfig(
        architectures=[head],
        vision_config=VISION | width,
        text_config=TEXT | width,
        initializer_range=0.2,
        queue_size=6,
        **fields,
    )


def random_images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24)


class TestVision(PartSuite):
    model_class, auto_class = HfvlmBLIPVisionModel, AutoModel

    def config(self):
        return HfvlmBLIPVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": random_images()}

    def test_any_size_with_interpolated_positions(self, model, batch):
        close(
            model(**batch, interpolate_pos_encoding=True).pooler_output,
            model(**batch).pooler_output,
            1e-6,
            "same size",
        )
        larger = torch.randn(1, 3, 40, 32)
        expected = model(larger, interpolate_pos_encoding=True).last_hidden_state
        assert expected.shape == (1, 21, 32)
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            model(larger)
        model.resize_positions((40, 32))
        close(model(larger).last_hidden_state, expected, 1e-6, "resized for good")

    def test_layers_are_dropped_in_training_alone(self, batch):
        model = HfvlmBLIPVisionModel(HfvlmBLIPVisionConfig(**VISION | {"drop_path_rate": 0.9}))
        assert [layer.drop_path.rate for layer in model.layers] == [0.0, 0.9]
        calm = model.eval()(**batch).pooler_output
        assert torch.equal(model(**batch).pooler_output, calm)
        assert not torch.equal(model.train()(**batch).pooler_output, calm)


class TestText(PartSuite):
    model_class, auto_class = HfvlmBLIPTextModel, AutoModel

    def config(self):
        return HfvlmBLIPTextConfig(**TEXT)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK, "context": Context(torch.randn(2, 5, 32))}

    def test_rows_of_a_batch_do_not_influence_each_other(self, model, batch):
        expected = model(**batch).pooler_output
        for i in range(2):
            context = Context(batch["context"].tokens[i : i + 1])
            close(model(IDS[i : i + 1], MASK[i : i + 1], context).pooler_output[0], expected[i], 1e-5, "row")

    def test_padding_on_either_side_changes_nothing(self, model, batch):
        right = model(**batch).pooler_output
        close(model(LEFT, (LEFT != 0).long(), batch["context"]).pooler_output, right, 1e-5, "left")
        short = model(IDS[:1, :4], None, Context(batch["context"].tokens[:1])).pooler_output
        close(short, right[:1], 1e-5, "none")

    def test_without_a_context_nothing_is_looked_at(self, model, batch):
        seen, plain = model(**batch).pooler_output, model(IDS, MASK).pooler_output
        assert (seen - plain).abs().max() > 1e-2
        model.layers[0].cross_attention.forward = None
        close(model(IDS, MASK).pooler_output, plain, 0.0, "without")

    def test_several_texts_attend_to_one_image(self, model, batch):
        tokens = batch["context"].tokens[:1]
        together = model(IDS, MASK, Context(tokens)).pooler_output
        close(model(IDS, MASK, Context(tokens.expand(2, -1, -1))).pooler_output, together, 1e-5, "shared")
        with pytest.raises(ValueError, match="3 texts cannot be shared out evenly among the 2 rows"):
            model(torch.cat([IDS, IDS[:1]]), None, batch["context"])

    def test_too_many_tokens_are_refused(self, model):
        with pytest.raises(ValueError, match="17 tokens.*positions for 16"):
            model(torch.ones(1, 17, dtype=torch.long))


class TestDecoder(PartSuite):
    model_class, auto_class = HfvlmBLIPTextDecoder, AutoModelForCausalLM

    def config(self):
        return HfvlmBLIPTextConfig(**TEXT)

    inputs = TestText.inputs

    def test_rows_of_a_batch_do_not_influence_each_other(self, model, batch):
        expected = model(**batch).logits
        for i in range(2):
            context = Context(batch["context"].tokens[i : i + 1])
            close(model(IDS[i : i + 1], MASK[i : i + 1], context).logits[0], expected[i], 1e-5, "row")

    def test_steps_equal_one_forward(self, model, batch):
        ids, context = IDS[1:], Context(batch["context"].tokens[:1])
        whole = model(ids, None, context).logits
        reused = context.for_reuse()
        output = model(ids[:, :3], None, reused, use_cache=True)
        close(output.logits, whole[:, :3], 1e-5, "prefill")
        kept = reused.kept[0]
        for i in range(3, 6):
            output = model(ids[:, i : i + 1], None, reused, cache=cache_of(output))
            close(output.logits[:, 0], whole[:, i], 1e-5, f"step {i}")
        assert reused.kept[0] is kept
        close(model(ids, None, context, logits_to_keep=2).logits, whole[:, -2:], 1e-6, "last")

    def test_the_future_is_not_seen(self, model, batch):
        changed = IDS.clone()
        changed[1, 4] = 20
        before, after = model(**batch).logits, model(**batch | {"input_ids": changed}).logits
        assert torch.equal(after[1, :4], before[1, :4])
        assert not torch.equal(after[1, 4:], before[1, 4:])

    def test_head_and_words_are_one_tensor(self, model):
        assert model.lm_head.decoder.weight is model.embeddings.token.weight


class TestModel(ModelSuite):
    model_class, auto_class = HfvlmBLIPModel, AutoModelForZeroShotImageClassification

    def config(self):
        return config()

    implementations = ("sdpa",)

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": random_images(), "attention_mask": MASK}

    def loss_inputs(self):
        return {"return_loss": True}

    def objective(self, model, batch):
        both = model.get_multimodal_features(**batch).pooler_output
        return super().objective(model, batch) + both.square().mean()

    def test_texts_are_read_with_their_images(self, model, batch):
        both = model.get_multimodal_features(**batch).pooler_output
        changed = model.get_multimodal_features(**batch | {"pixel_values": batch["pixel_values"].flip(0)})
        assert (both - changed.pooler_output).abs().max() > 1e-2

    def test_other_heads_folders_are_read(self, batch, tmp_path):
        whole = HfvlmBLIPForPreTraining(config("HfvlmBLIPForPreTraining")).eval()
        whole.save_pretrained(tmp_path)
        model, info = HfvlmBLIPModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        close(model.eval()(**batch).logits_per_image, whole(**batch).logits_per_image, 1e-6, "logits")
        for head in (HfvlmBLIPForConditionalGeneration, HfvlmBLIPForImageTextRetrieval):
            _, info = head.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info.values()), (head, info)

    def test_cosines_without_a_temperature(self, batch):
        model = HfvlmBLIPModel(config(similarity_temperature=None)).eval()
        output = model(**batch)
        close(output.logits_per_image, output.image_embeds @ output.text_embeds.t(), 1e-6, "cosines")
        assert not any("logit_scale" in name for name in model.state_dict())

    def test_widths_must_agree(self):
        with pytest.raises(
            StrictDataclassClassValidationError, match="context_size of 8, vision_config's hidden_size"
        ):
            HfvlmBLIPConfig(vision_config=VISION, text_config=TEXT | {"context_size": 8})
        with pytest.raises(StrictDataclassClassValidationError, match="projection_dim differs: 16"):
            HfvlmBLIPConfig(vision_config=VISION, text_config=TEXT | {"projection_dim": 8})


class TestRetrieval(TestModel):
    model_class, auto_class = HfvlmBLIPForImageTextRetrieval, AutoModel
    test_compiles_as_one_graph = test_exports = None  # without a loss, it computes what the model above does

    def config(self):
        return config("HfvlmBLIPForImageTextRetrieval")

    def objective(self, model, batch):
        return ModelSuite.objective(self, model, batch)

    def test_loss_is_of_both_kinds(self, model, batch):
        output = model(**batch, return_loss=True)
        close(output.loss, output.contrastive_loss + output.matching_loss, 1e-6, "sum")
        close(output.contrastive_loss, model.contrast(output), 1e-6, "from the output's fields")
        assert output.matching_logits.shape == (6, 2)
        with pytest.raises(ValueError, match="at least two pairs"):
            model(IDS[:1], random_images(1), MASK[:1], return_loss=True)

    def test_reranking_is_a_match_plus_a_cosine(self, model, batch):
        images, ids, mask = random_images(3), torch.cat([IDS, LEFT]), torch.cat([MASK, (LEFT != 0).long()])
        scores = model.rerank(images, ids, mask, top_k=4)
        output = model(ids, images, mask)
        cosines = output.image_embeds @ output.text_embeds.t()
        tokens = model.vision_model(images).last_hidden_state
        one = [(slice(i, i + 1), slice(t, t + 1)) for i in range(3) for t in range(4)]
        matched = [model.match(ids[text], mask[text], Context(tokens[image]))[0, 1] for image, text in one]
        close(scores.per_image, torch.stack(matched).view(3, 4) + cosines, 1e-5, "all pairs")
        close(scores.per_text, scores.per_image.t(), 1e-5, "all")
        few = model.rerank(images, ids, mask, top_k=2)
        assert ((few.per_image > -100).sum(dim=1) == 2).all()
        assert ((few.per_text > -100).sum(dim=1) == 2).all()
        best = cosines.topk(2, dim=1).indices
        close(few.per_image.gather(1, best), scores.per_image.gather(1, best), 1e-5, "best")


class Generating:
    """What holds for every model that writes."""

    def generate(self, model, images, inputs, **options):
        ids = model.generate(images, **inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4, **options)
        return [row[row != 0].tolist() for row in ids]

    def batches(self):
        return [
            {"input_ids": IDS, "attention_mask": MASK},
            {"input_ids": LEFT, "attention_mask": (LEFT != 0).long()},
        ]

    @pytest.mark.parametrize("beams", [1, 3])
    def test_a_batch_generates_what_its_rows_generate(self, model, beams):
        images = random_images()
        written = [self.generate(model, images, batch, num_beams=beams) for batch in self.batches()]
        alone = [
            self.generate(model, images[i : i + 1], {"input_ids": IDS[i : i + 1, : MASK[i].sum()]}, num_beams=beams)[0]
            for i in range(2)
        ]
        assert written[0] == written[1] == alone

    def test_another_image_gives_another_text(self, model):
        images, batch = random_images(), self.batches()[0]
        assert self.generate(model, images, batch) != self.generate(model, -images, batch)

    def test_the_image_is_encoded_once(self, model):
        """For all beams and returned texts; so are its keys and values in every layer."""
        counts = {"vision": 0, "keys": 0}

        def count(name):
            return lambda *_: counts.__setitem__(name, counts[name] + 1)

        model.vision_model.register_forward_hook(count("vision"))
        for layer in model.text_decoder.layers:
            layer.cross_attention.k_proj.register_forward_hook(count("keys"))
        options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 4}
        ids = model.generate(random_images(), **self.batches()[0], **options)
        assert len(ids) == 4
        assert counts == {"vision": 1, "keys": 2}

    def test_sampling_is_seeded(self, model):
        images, batch = random_images(1), {"input_ids": IDS[1:]}
        options = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3, "max_new_tokens": 4}
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(model.generate(images, **batch, **options))
        assert torch.equal(*runs)
        assert len(runs[0]) == 3

    def test_greedy_equals_steps_by_hand(self, model):
        images, batch = random_images(1), {"input_ids": IDS[1:]}
        written = model.generate(images, **batch, max_new_tokens=5)
        context, ids = self.reference(model, images, batch["input_ids"])
        for _ in range(5):
            ids = torch.cat([ids, model.text_decoder(ids, None, context).logits[:, -1:].argmax(-1)], dim=1)
        length = written.shape[1]
        assert torch.equal(written, ids[:, :length])
        assert length == ids.shape[1] or written[0, -1] == 3

    def test_beams_equal_a_plain_search(self, model):
        """Scores are log probabilities over the length of the whole text, without its [SEP]."""
        images, batch = random_images(1), {"input_ids": IDS[1:]}
        context, start = self.reference(model, images, batch["input_ids"])
        written = model.generate(images, **batch, num_beams=3, max_length=start.shape[1] + 4)
        beams, finished = [(0.0, start[0].tolist())], []
        for _ in range(4):
            grown = []
            for score, ids in beams:
                chances = model.text_decoder(torch.tensor([ids]), None, context).logits[0, -1].log_softmax(-1)
                grown += [(score + chance, [*ids, token]) for token, chance in enumerate(chances.tolist())]
            grown.sort(key=lambda beam: -beam[0])
            ended = [beam for beam in grown[:3] if beam[1][-1] == 3]
            finished += [(score / (len(ids) - 1), ids) for score, ids in ended]
            beams = [beam for beam in grown if beam[1][-1] != 3][:3]
        finished += [(score / len(ids), ids) for score, ids in beams]
        assert written[0].tolist() == max(finished)[1]


class TestCaptioning(Generating, ModelSuite):
    model_class, auto_class = HfvlmBLIPForConditionalGeneration, AutoModelForImageTextToText
    implementations = ("sdpa",)

    def config(self):
        return config("HfvlmBLIPForConditionalGeneration", None)

    def inputs(self):
        return {"pixel_values": random_images(), "input_ids": IDS, "attention_mask": MASK}

    def loss_inputs(self):
        return {"labels": IDS.masked_fill(MASK == 0, -100)}

    def reference(self, model, images, ids):
        ids = ids[:, :-1].clone()
        ids[:, 0] = 48
        return model.read(images), ids

    def test_without_a_prompt_it_starts_from_nothing(self, model):
        ids = model.generate(random_images(), max_new_tokens=3)
        assert ids.shape[0] == 2
        assert (ids[:, 0] == 48).all()

    def test_several_prompts_for_one_image(self, model):
        image = random_images(1)
        together = self.generate(model, image, self.batches()[0])
        assert together == self.generate(model, image.expand(2, -1, -1, -1), self.batches()[0])

    def test_accumulated_batches_average_over_all_tokens(self, model, batch):
        labels = self.loss_inputs()["labels"]
        whole = model(**batch, labels=labels).loss
        count = (labels[:, 1:] != -100).sum()
        parts = [
            model(
                **{k: v[i : i + 1] for k, v in batch.items()}, labels=labels[i : i + 1], num_items_in_batch=count
            ).loss
            for i in range(2)
        ]
        close(sum(parts), whole, 1e-6, "sum of parts")

    def test_loss_is_smoothed(self, batch):
        losses = [
            HfvlmBLIPForConditionalGeneration(config("", None, label_smoothing=smoothing)) for smoothing in (0.0, 0.1)
        ]
        losses[1].load_state_dict(losses[0].state_dict())
        plain, smooth = (model.eval()(**batch, **self.loss_inputs()) for model in losses)
        labels = self.loss_inputs()["labels"][:, 1:]
        chances = plain.logits[:, :-1].log_softmax(-1)[labels != -100]
        expected = 0.9 * plain.loss - 0.1 * chances.mean()
        close(smooth.loss, expected, 1e-5, "loss")


class TestQuestionAnswering(Generating, ModelSuite):
    test_compiles_as_one_graph = None  # its parts are in the graph of captioning
    model_class, auto_class = HfvlmBLIPForQuestionAnswering, AutoModelForVisualQuestionAnswering
    answers = torch.tensor([[2, 20, 3, -100], [2, 21, 22, 3], [2, 23, 3, -100]])
    implementations = ("sdpa",)

    def config(self):
        return config("HfvlmBLIPForQuestionAnswering", None)

    def inputs(self):
        return {"pixel_values": random_images(), "input_ids": IDS, "attention_mask": MASK}

    def loss_inputs(self):
        return {"labels": self.answers[:2]}

    def reference(self, model, images, ids):
        return model.read(images, ids), torch.tensor([[48]])

    def test_loss_weighs_answers(self, model, batch):
        counts, weights = torch.tensor([2, 1]), torch.tensor([0.75, 0.25, 1.0])
        loss = model(**batch, labels=self.answers, answer_counts=counts, answer_weights=weights).loss
        expected = 0.0
        for i, question in enumerate((0, 0, 1)):
            row = {k: v[question : question + 1] for k, v in batch.items()}
            expected += weights[i] * model(**row, labels=self.answers[i : i + 1]).loss
        close(loss, expected / 2, 1e-5, "loss")

    def test_ranking_finds_the_likeliest(self, model, batch):
        ranked = model.rank(**batch, candidates=self.answers, top_k=3)
        assert ranked.indices.shape == ranked.scores.shape == (2, 3)
        for question in range(2):
            row = {k: v[question : question + 1] for k, v in batch.items()}
            losses = torch.stack([model(**row, labels=answer[None]).loss for answer in self.answers])
            close(ranked.scores[question], -losses[ranked.indices[question]], 1e-5, "scores")
            assert ranked.best[question] == losses.argmin()
        assert model.rank(**batch, candidates=self.answers, top_k=1).scores.shape == (2, 1)


class TestVisualReasoning(ModelSuite):
    test_compiles_as_one_graph = None  # its parts are in the graph of the model above
    model_class, auto_class = HfvlmBLIPForVisualReasoning, AutoModel
    implementations = ("sdpa",)

    def config(self):
        small = config("HfvlmBLIPForVisualReasoning", None)
        small.text_config.num_hidden_layers = 8
        return small

    def inputs(self):
        return {"pixel_values": torch.randn(2, 2, 3, 24, 24), "input_ids": IDS, "attention_mask": MASK}

    def loss_inputs(self):
        return {"labels": torch.tensor([1, 0])}

    def test_records_hidden_states_and_attentions(self, model, batch):
        model.set_attn_implementation("eager")
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        assert (len(output.hidden_states), len(output.attentions)) == (9, 8)

    def test_the_order_of_the_images_matters(self, model, batch):
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(1)}).logits
        assert (model(**batch).logits - other).abs().max() > 1e-3

    @pytest.mark.parametrize("head", ["HfvlmBLIPForPreTraining", "HfvlmBLIPForImageTextRetrieval", "HfvlmBLIPModel"])
    def test_begins_with_a_model_of_single_images(self, head, tmp_path):
        small = config(head)
        small.text_config.num_hidden_layers = 8
        other = AutoModel.from_config(small).eval()
        other.save_pretrained(tmp_path)
        begun, info = HfvlmBLIPForVisualReasoning.from_pretrained(tmp_path, output_loading_info=True)
        assert {name.split(".")[-3] if "merge" in name else "classifier" for name in info["missing_keys"]} == {
            "cross_attention",
            "classifier",
        }
        assert all("merge_layer" in name or name.startswith("classifier") for name in info["missing_keys"])
        for one, two in zip(other.text_model.layers, begun.text_model.layers, strict=True):
            for pair in (two.cross_attention.first, two.cross_attention.second):
                same(tensors(pair.state_dict()), tensors(one.cross_attention.state_dict()))
        # Twice the same image, in layers that average, is the image once.
        begun.text_model.layers = begun.text_model.layers[:6]
        other.text_model.layers = other.text_model.layers[:6]
        image = torch.randn(2, 3, 24, 24)
        context = Context(other.vision_model(image).last_hidden_state)
        twice = Context(torch.cat([context.tokens, context.tokens], dim=1))
        close(
            begun.eval().text_model.ground(IDS, MASK, twice).last_hidden_state,
            other.text_model.ground(IDS, MASK, context).last_hidden_state,
            1e-5,
            "tokens",
        )
        begun.save_pretrained(tmp_path / "begun")
        again = HfvlmBLIPForVisualReasoning.from_pretrained(tmp_path / "begun")
        assert type(again) is HfvlmBLIPForVisualReasoning

    @pytest.mark.parametrize("case", ["pretrain-base", "itm-base", "retrieval-base", "features-base"])
    def test_converts_from_the_file_of_a_model_of_single_images(self, case, tmp_path):
        """As the authors' loader reads it; what such a file lacks is initialised, the same way each time."""
        golden = Golden(OURS / "blip" / case)
        torch.save({"model": golden.state_dict}, tmp_path / "model.pth")
        original = {"class": "models.blip_nlvr.BLIP_NLVR", "sep_token_id": 3, "arguments": golden.case["arguments"]}
        made = [
            hfvlm.convert(tmp_path / "model.pth", "blip", tmp_path / name, original=original, vocabulary="none")
            for name in ("one", "two")
        ]
        one, two = (AutoModel.from_pretrained(folder, output_loading_info=True) for folder in made)
        assert type(one[0]) is HfvlmBLIPForVisualReasoning
        assert not any(one[1].values())
        same(one[0].state_dict(), two[0].state_dict(), exact=True)
        theirs = golden.state_dict["text_encoder.encoder.layer.1.crossattention.self.key.weight"]
        pair = one[0].text_model.layers[1].cross_attention
        assert torch.equal(pair.first.k_proj.weight, theirs)
        assert torch.equal(pair.second.k_proj.weight, theirs)

    def test_does_not_convert_from_a_captioner(self, tmp_path):
        golden = Golden(OURS / "blip" / "caption-base")
        torch.save({"model": golden.state_dict}, tmp_path / "model.pth")
        original = {"class": "models.blip_nlvr.BLIP_NLVR", "arguments": golden.case["arguments"]}
        with pytest.raises(KeyTableError, match="left unfilled: text_model"):
            hfvlm.convert(tmp_path / "model.pth", "blip", tmp_path / "out", original=original, vocabulary="none")

    def test_does_not_begin_with_a_captioner(self, tmp_path):
        AutoModel.from_config(config("HfvlmBLIPForConditionalGeneration", None)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no text encoder"):
            HfvlmBLIPForVisualReasoning.from_pretrained(tmp_path)

    def test_upper_layers_learn_to_merge(self, model):
        merging = [hasattr(layer.cross_attention, "merge_layer") for layer in model.text_model.layers]
        assert merging == [False] * 6 + [True] * 2


class Momentum:
    """What holds for training with momentum towers."""

    # Without `return_loss` it computes what the suite of retrieval compiles and exports.
    test_compiles_as_one_graph = test_exports = None

    def gradients(self, model, batch):
        """From the same teacher each time: in training, every step moves it."""
        teacher = next(module for module in model.modules() if isinstance(module, Teacher))
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        gradients = super().gradients(model, batch)
        teacher.load_state_dict(before)
        return gradients

    def test_every_parameter_gets_a_gradient(self, model, batch):
        """But for the teacher's, which follow."""
        grads = self.gradients(model.train(), batch)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        without = {name for name, _ in model.named_parameters() if name not in grads}
        assert without == {name for name, _ in model.named_parameters() if name.startswith("teacher.")}

    def test_towers_alone_equal_those_inside(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for tower in (HfvlmBLIPVisionModel, HfvlmBLIPTextModel):
            alone, info = tower.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info.values()), info
            same(alone.state_dict(), getattr(model, tower.base_model_prefix).state_dict(), exact=True)

    def test_the_teacher_starts_as_a_copy_and_follows_in_training_alone(self, model, batch):
        own = dict(model.teacher.named_parameters())
        same({name: own[name] for name in own}, {n: model.get_parameter(n) for n in own}, exact=True)
        with torch.no_grad():
            model.vision_model.class_token += 1
        start = own["vision_model.class_token"].clone()
        model.eval()(**batch, return_loss=True)
        assert torch.equal(own["vision_model.class_token"], start)
        assert model.teacher.pointer == 0
        model.train()(**batch, return_loss=True)
        close(own["vision_model.class_token"], start + 0.005, 1e-5, "followed")
        assert model.teacher.pointer == 2

    def test_the_queue_keeps_the_last(self, model, batch):
        model.train()
        seen = [model(**batch, return_loss=True).momentum_image_embeds for _ in range(4)]
        close(model.teacher.image_queue, torch.cat([seen[3], *seen[1:3]]), 1e-6, "queue")
        with pytest.raises(ValueError, match="8 pairs does not fit into a queue of 6"):
            model.teacher.remember(image_queue=torch.zeros(8, 16))

    def test_targets_mix_what_belongs_together_with_what_the_teacher_finds(self, model, batch):
        hard = model.eval()(**batch, return_loss=True, distillation=0.0)
        assert torch.equal(hard.targets_per_image, torch.eye(2, 8))
        soft = model(**batch, return_loss=True, distillation=1.0)
        assert soft.targets_per_image.min() > 0
        close(soft.targets_per_text.sum(dim=1), torch.ones(2), 1e-5, "probabilities")

    def test_a_folder_without_a_teacher_gives_a_copy(self, tmp_path):
        source = HfvlmBLIPForImageTextRetrieval(config("HfvlmBLIPForImageTextRetrieval"))
        source.save_pretrained(tmp_path)
        model = self.model_class.from_pretrained(tmp_path)
        own = dict(model.teacher.named_parameters())
        same({name: own[name] for name in own}, {n: source.get_parameter(n) for n in own}, exact=True)
        close(model.teacher.image_queue.norm(dim=1), torch.ones(6), 1e-5, "queue")


class TestRetrievalTraining(Momentum, TestRetrieval):
    model_class, auto_class = HfvlmBLIPForRetrievalTraining, AutoModel

    def config(self):
        return config("HfvlmBLIPForRetrievalTraining")

    def test_loss_is_of_both_kinds(self, model, batch):
        output = model(**batch, return_loss=True)
        close(output.loss, output.contrastive_loss + output.matching_loss, 1e-6, "sum")

    def test_pairs_about_one_image_belong_together(self, model, batch):
        ids = torch.tensor([7, 7])
        model.train()
        assert not (model.right_columns(None, 2, 8)[:, 2:]).any()
        with pytest.raises(ValueError, match="a negative for each pair"):
            model(**batch, pair_ids=ids, return_loss=True)
        model(**batch, pair_ids=torch.tensor([7, 9]), return_loss=True)
        output = model(**batch, pair_ids=torch.tensor([9, 4]), return_loss=True, distillation=0.0)
        assert output.targets_per_image.tolist() == [[0.5, 0, 0, 0.5, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]

    def test_trained_towers_load_for_use(self, model, batch, tmp_path):
        model.save_pretrained(tmp_path)
        again, info = HfvlmBLIPForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        same(tensors(again.eval()(**batch)), tensors(model.eval()(**batch)), 1e-6)


class TestPreTraining(Momentum, TestRetrieval):
    model_class, auto_class = HfvlmBLIPForPreTraining, AutoModelForPreTraining

    def config(self):
        return config("HfvlmBLIPForPreTraining")

    def test_loss_is_of_both_kinds(self, model, batch):
        output = model(**batch, return_loss=True)
        parts = output.contrastive_loss + output.matching_loss + output.captioning_loss
        close(output.loss, parts, 1e-6, "sum")

    def test_decoder_and_encoder_share_all_but_self_attention(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for whole in (model, HfvlmBLIPForPreTraining.from_pretrained(tmp_path)):
            ours = dict(whole.text_model.named_parameters())
            theirs = dict(whole.text_decoder.named_parameters(remove_duplicate=False))
            shared = {name for name in theirs if name in ours and theirs[name] is ours[name]}
            apart = {name for name in theirs if name not in shared}
            assert all(".attention" in name or name.startswith("lm_head") for name in apart)
            assert {name for name in ours if name not in shared} == {
                name for name in ours if ".attention" in name or "projection" in name
            }
            assert whole.text_decoder.lm_head.decoder.weight is whole.text_model.embeddings.token.weight

    def test_its_captioner_writes_what_it_would(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        captioner = HfvlmBLIPForConditionalGeneration.from_pretrained(tmp_path).eval()
        images = random_images()
        context = Context(model.vision_model(images).last_hidden_state)
        ids = torch.full((2, 1), 48)
        close(captioner(images, ids).logits, model.eval().text_decoder(ids, None, context).logits, 1e-6, "scores")


def pairs_of(rank: int) -> dict:
    torch.manual_seed(10 + rank)
    return {"input_ids": IDS + rank * (IDS > 3), "pixel_values": random_images(), "attention_mask": MASK}


def train_step(rank: int) -> dict:
    """A step of two processes that share their negatives and their queue."""
    torch.manual_seed(0)
    model = HfvlmBLIPForRetrievalTraining(
        config("HfvlmBLIPForRetrievalTraining", negatives_from_all_ranks=True)
    ).train()
    weights = []
    model.draw = lambda given: (weights.append(given), given.argmax(dim=1))[1]
    output = model(**pairs_of(rank), pair_ids=torch.tensor([rank, 5]), return_loss=True)
    output.loss.backward()
    return {
        "weights": weights,
        "queue": model.teacher.image_queue,
        "ids": model.teacher.id_queue,
        "embeds": output.momentum_image_embeds,
        "gradient": model.vision_model.class_token.grad,
    }


def test_processes_share_negatives_and_the_queue():
    first, second = run_processes(train_step, 2)
    for found in (first, second):
        assert found["weights"][0].shape == (2, 4)
        close(found["queue"][:4], torch.cat([first["embeds"], second["embeds"]]), 1e-5, "queue")
        assert found["ids"].tolist() == [0, 5, 1, 5, -100, -100]
        assert torch.isfinite(found["gradient"]).all()
    # The pair of the other process that is about the same image is no negative.
    assert (first["weights"][0] == 0).tolist() == [[True, False, False, False], [False, True, False, True]]


def test_recipes_adapt_self_and_cross_attention():
    model = HfvlmBLIPForQuestionAnswering(config("HfvlmBLIPForQuestionAnswering", None))
    tuned = hfvlm.lora(model, "text+text_decoder", quiet=True)
    names = {name.split("base_model.model.")[1] for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in names} == {"text_model", "text_decoder"}
    assert {name.split(".")[3] for name in names} == {"attention", "cross_attention"}
    momentum = hfvlm.lora(HfvlmBLIPForPreTraining(config("HfvlmBLIPForPreTraining")), quiet=True)
    assert not any("teacher" in name for name, p in momentum.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hard_negatives_far_below_the_positives(dtype):
    """Where a softmax over all would leave them nothing, the more similar are still the likelier."""
    model = hfvlm.HfvlmBLIPForImageTextRetrieval(load_preset("blip/tiny").make_config())
    scores = torch.full((4, 4), -60.0).fill_diagonal_(60.0)
    scores[0, 2] = -50.0
    same = torch.eye(4, dtype=torch.bool)
    torch.manual_seed(0)
    drawn = torch.stack([model.hard_negatives(scores.to(dtype), scores.to(dtype), same)[0] for _ in range(50)])
    assert (drawn[:, 0] == 2).all()
    assert set(drawn[:, 1].tolist()) == {0, 2, 3}
    with pytest.raises(ValueError, match="at least two pairs"):
        model.hard_negatives(scores[:1, :1], scores[:1, :1], same[:1, :1])
