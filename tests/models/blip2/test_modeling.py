import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    BitsAndBytesConfig,
)

import hfvlm
from hfvlm.losses.processes import positives
from hfvlm.modeling.compat import cache_of
from hfvlm.models.blip2 import (
    HfvlmBLIP2CLIPVisionConfig,
    HfvlmBLIP2CLIPVisionModel,
    HfvlmBLIP2Config,
    HfvlmBLIP2ForConditionalGeneration,
    HfvlmBLIP2ForImageTextRetrieval,
    HfvlmBLIP2ForPreTraining,
    HfvlmBLIP2QFormerConfig,
    HfvlmBLIP2QFormerModel,
    HfvlmBLIP2T5ForConditionalGeneration,
    HfvlmBLIP2VisionConfig,
    HfvlmBLIP2VisionModel,
)
from hfvlm.models.blip2.modeling_blip2_retrieval import QFormerDecoder
from tests.support.generation import GenerationSuite
from tests.support.processes import run_processes
from tests.support.seq2seq import T5, Seq2SeqSuite
from tests.support.suite import ModelSuite, PartSuite, close, relative, same

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"initializer_range": 0.2}
VISION = SIZES | {"hidden_size": 24, "image_size": 28, "patch_size": 14}
QFORMER = SIZES | {"num_queries": 3, "context_size": 24, "hidden_dropout": 0.0, "attention_dropout": 0.0}
WORDS = QFORMER | {"vocab_size": 40, "max_position_embeddings": 20, "bos_token_id": 39, "eos_token_id": 3}
OPT = {"model_type": "opt", "vocab_size": 60, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "dropout": 0.0}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}
OPT |= {"bos_token_id": 2, "eos_token_id": 5}
LLAMA = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
IMAGE, VIDEO = 60, 61


class TestVisionModel(ModelSuite):
    test_compiles_as_one_graph = test_exports = None  # the wholes below hold its graph
    model_class, auto_class = HfvlmBLIP2VisionModel, AutoModel
    config_class = HfvlmBLIP2VisionConfig

    def config(self):
        return self.config_class(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_other_image_sizes(self, model):
        pictures = torch.randn(1, 3, 42, 28)
        with pytest.raises(ValueError, match="image_size 28"):
            model(pictures)
        output = model(pictures, interpolate_pos_encoding=True)
        assert output.last_hidden_state.shape == (1, 7, 24)
        model.resize_positions((42, 28))
        close(model(pictures).last_hidden_state, output.last_hidden_state, 1e-6, "resized")


class TestCLIPVisionModel(TestVisionModel):
    model_class, config_class = HfvlmBLIP2CLIPVisionModel, HfvlmBLIP2CLIPVisionConfig


class TestQFormer(PartSuite):
    """Images and texts together."""

    model_class, auto_class = HfvlmBLIP2QFormerModel, AutoModel
    records = ("hidden_states", "attentions")

    def config(self):
        return HfvlmBLIP2QFormerConfig(**WORDS)

    def inputs(self):
        ids = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 3, 0, 0], [2, 5, 6, 3, 0]])
        return {"image_tokens": torch.randn(3, 5, 24), "input_ids": ids, "attention_mask": (ids != 0).long()}

    def test_padding_on_either_side_changes_nothing(self, model, batch):
        text = {"input_ids": batch["input_ids"][1:2, :3], "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        image = batch["image_tokens"][1:2]
        right = {name: batch[name][1:2] for name in text}
        left = {name: right[name].roll(2, dims=1) for name in text}
        with torch.no_grad():
            for tokens in (None, image):
                expected = model(tokens, **text).pooler_output
                close(model(tokens, **right).pooler_output, expected, 1e-5, "right")
                close(model(tokens, **left).pooler_output, expected, 1e-5, "left")

    def test_several_texts_about_one_image(self, model, batch):
        with torch.no_grad():
            text = {name: batch[name] for name in ("input_ids", "attention_mask")}
            together = model(batch["image_tokens"][:1], **text).pooler_output
            copied = model(batch["image_tokens"][:1].expand(3, -1, -1), **text).pooler_output
        close(together, copied, 1e-6, "shared")

    def test_queries_alone_look_at_the_image(self, model, batch):
        """Of a single layer: words hear of the image through queries, in the next layer."""
        model.layers = model.layers[:1]
        with torch.no_grad():
            one = model(**batch).last_hidden_state
            other = model(**batch | {"image_tokens": batch["image_tokens"].flip(0)}).last_hidden_state
        close(one[:, 3:], other[:, 3:], 0.0, "words")
        assert relative(one[:, :3], other[:, :3]) > 1e-3

    def test_a_mask_needs_texts(self, model, batch):
        with pytest.raises(ValueError, match="attention_mask is that of texts"):
            model(batch["image_tokens"], attention_mask=batch["attention_mask"])

    def test_texts_need_words(self, batch):
        model = HfvlmBLIP2QFormerModel(HfvlmBLIP2QFormerConfig(**QFORMER))
        with pytest.raises(ValueError, match="takes no texts: its config.vocab_size is None"):
            model(**batch)

    def test_words_attend_to_all_queries_and_to_words_before(self, model, batch):
        decoder, ids, mask = QFormerDecoder(model, nn.Identity()), batch["input_ids"], batch["attention_mask"]
        context, other_context = (model.read(batch["image_tokens"][rows]) for rows in ([0, 1, 2], [2, 1, 0]))
        with torch.no_grad():
            whole = decoder(ids, mask, context).logits
            changed = ids.clone()
            changed[0, 3] = 11
            again = decoder(changed, mask, context).logits
            other = decoder(ids, mask, other_context).logits
        close(again[0, :3], whole[0, :3], 1e-6, "before the change")
        assert relative(again[0, 3:], whole[0, 3:]) > 1e-3
        assert relative(other[:, 0], whole[:, 0]) > 1e-4


class Stage1(ModelSuite):
    implementations = ("sdpa",)
    records = ()

    def config(self):
        return HfvlmBLIP2Config(
            architectures=[self.model_class.__name__],
            vision_config=VISION,
            qformer_config=WORDS | {"projection_dim": 16},
        )

    def inputs(self):
        ids = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 3, 0, 0], [2, 5, 6, 3, 0]])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": (ids != 0).long(),
        }

    def loss_inputs(self):
        torch.manual_seed(0)  # hard negatives are drawn
        return {"return_loss": True}

    def test_records_hidden_states_and_attentions(self, model, batch):
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)
        assert len(output.vision_model_output.hidden_states) == 3

    def test_similarity_is_the_best_query(self, model, batch):
        with torch.no_grad():
            output = model(**batch)
            cosines = torch.einsum("iqd,td->itq", output.image_embeds, output.text_embeds)
        close(output.logits_per_image, cosines.max(dim=-1).values / 0.07, 1e-5, "max")
        assert torch.equal(output.logits_per_text, output.logits_per_image.t())
        close(model.score(output.text_embeds, output.image_embeds), cosines.max(-1).values.t(), 1e-5, "score")

    def test_pairs_about_one_image_share_the_target(self, model, batch):
        with torch.no_grad():
            output = model(**batch)
            alone = model.contrast(output)
            shared = model.contrast(output, pair_ids=torch.tensor([4, 9, 4]))
            target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]) * 0.9 + 0.1 / 3
            logits = output.logits_per_image
            costs = [-(x.log_softmax(1) * target).sum(1).mean() for x in (logits, logits.t())]
        close(shared, sum(costs) / 2, 1e-6, "shared")
        assert relative(alone, shared) > 1e-4

    def test_positives_are_never_drawn_as_negatives(self, model):
        for _ in range(5):
            scores = torch.randn(2, 3, 3)
            images, texts = model.hard_negatives(*scores, positives(3, torch.tensor([4, 9, 4]), scores.device, None))
            assert images[[0, 2]].tolist() == texts[[0, 2]].tolist() == [1, 1]
        with pytest.raises(ValueError, match="at least two pairs"):
            model.hard_negatives(*scores, positives(3, torch.tensor([4, 4, 4]), scores.device, None))

    def test_candidates_are_looked_at_together(self, model, batch):
        images, ids, mask = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
        scores = model.rerank(images, ids, mask, top_k=2)
        with torch.no_grad():
            output = model(**batch)
            cosines = model.score(output.image_embeds, output.text_embeds)
            looked = model.match(ids, mask, model.encode_image(images[1:2]).image_tokens)[:, 1] + cosines[1]
        best = cosines[1].topk(2).indices
        close(scores.per_image[1, best], looked[best], 1e-5, "scores")
        assert (scores.per_image == -100).sum() == 3
        assert (scores.per_text == -100).sum() == 3


class TestRetrieval(Stage1):
    model_class, auto_class = HfvlmBLIP2ForImageTextRetrieval, AutoModel


class TestPreTraining(Stage1):
    model_class, auto_class = HfvlmBLIP2ForPreTraining, AutoModelForPreTraining
    test_compiles_as_one_graph = test_exports = None  # without a loss, it computes what the model above does

    def test_prefill_steps_and_one_forward_agree(self, model, batch):
        ids = batch["input_ids"][:, :3]
        context = model.read(batch["pixel_values"])
        with torch.no_grad():
            whole = model(ids, context=context).logits
            cache, steps = None, []
            for i in range(3):
                output = model(ids[:, i : i + 1], context=context.for_reuse(), cache=cache, use_cache=True)
                cache, steps = cache_of(output), [*steps, output.logits]
        close(torch.cat(steps, dim=1), whole, 1e-5, "steps")

    def test_captions_are_those_of_their_images(self, model, batch):
        options = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
        calls = []
        model.vision_model.register_forward_hook(lambda *_: calls.append(1))
        for more in ({}, {"num_beams": 3}):
            calls.clear()
            together = model.generate(batch["pixel_values"], **options, **more)
            assert len(calls) == 1
            assert together[:, 0].tolist() == [39] * 3
            alone = [model.generate(image[None], **options, **more) for image in batch["pixel_values"]]
            assert torch.equal(together, torch.cat(alone))
        with torch.no_grad():
            expected = [39]
            for _ in range(6):
                logits = model(torch.tensor([expected]), context=model.read(batch["pixel_values"][:1])).logits
                expected.append(int(logits[0, -1].argmax()))
        if 3 in expected:  # [SEP], behind which is padding
            end = expected.index(3) + 1
            expected[end:] = [0] * len(expected[end:])
        assert model.generate(batch["pixel_values"][:1], **options)[0].tolist() == expected

    def test_labels_choose_what_is_captioned(self, model, batch):
        plain = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            expected = model(**batch, return_loss=True).captioning_loss
            close(model(**batch, labels=plain).captioning_loss, expected, 1e-6, "all words")
            some = model(**batch, labels=plain.index_fill(1, torch.tensor([1]), -100)).captioning_loss
        assert abs(some - expected) > 1e-5

    def test_texts_are_continued_without_their_end_and_padding(self, model, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        options = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
        together = model.generate(batch["pixel_values"], ids, mask, **options)
        alone = model.generate(batch["pixel_values"][1:2], ids[1:2, :3], **options)
        assert torch.equal(together[1, -5:], alone[0, -5:])
        assert together[0, :4].tolist() == [39, 7, 8, 9]

    def test_its_folder_serves_the_other_head(self, model, batch, tmp_path):
        model.save_pretrained(tmp_path)
        other, info = HfvlmBLIP2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            expected = {k: v for k, v in model(**batch).items() if k.startswith("logits_per")}
            same({k: other(**batch)[k] for k in expected}, expected, exact=True)


def one_of_two(rank, folder):
    """A process' share of a batch; its texts are shorter than the other's."""
    model = HfvlmBLIP2ForPreTraining.from_pretrained(folder).train()
    suite = TestPreTraining()
    torch.manual_seed(1)
    batch = {name: torch.cat([value, value.flip(0)[:1]]) for name, value in suite.inputs().items()}
    own = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
    if rank:
        length = int(own["attention_mask"].sum(1).max())
        own |= {name: own[name][:, :length] for name in ("input_ids", "attention_mask")}
    drawn = []
    model.draw = lambda weights: drawn.append(weights) or weights.argmax(dim=1)
    output = model(**own, return_loss=True)
    output.loss.backward()
    same = torch.arange(4)[None] == torch.arange(2)[:, None] + 2 * rank
    assert all(weights.shape == (2, 4) and not weights[same].any() for weights in drawn)
    assert output.matching_logits.shape == (6, 2)
    return output.contrastive_loss.detach(), batch


def test_processes_compare_and_match_with_one_another(tmp_path):
    model = HfvlmBLIP2ForPreTraining(TestPreTraining().config())
    model.save_pretrained(tmp_path)
    (one, batch), (other, _) = run_processes(one_of_two, 2, tmp_path)
    with torch.no_grad():
        whole = model.eval().contrast(model(**batch))
    close(one, whole, 1e-5, "first")
    close(other, whole, 1e-5, "second")


class Stage2:
    implementations = ("sdpa",)
    text, qformer = OPT, QFORMER

    def config(self):
        return HfvlmBLIP2Config(
            architectures=[self.model_class.__name__],
            vision_config=VISION,
            qformer_config=self.qformer,
            text_config=self.text,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )

    def inputs(self):
        queries = [IMAGE] * 3
        ids = torch.tensor([[*queries, 2, 7, 8, 9], [*queries, 2, 9, 8, 7], [*queries, 2, 4, 6, 4]])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        ids = self.inputs()["input_ids"]
        return {"labels": ids.masked_fill(ids == IMAGE, -100)}

    def test_stage_1_is_what_it_begins_with(self, model, tmp_path):
        config = self.config()
        config.architectures, config.text_config = ["HfvlmBLIP2ForPreTraining"], None
        if config.qformer_config.vocab_size is None:
            config.qformer_config = HfvlmBLIP2QFormerConfig(**WORDS)
        config.qformer_config.projection_dim = 16
        first = HfvlmBLIP2ForPreTraining(config)
        first.save_pretrained(tmp_path)
        begun, info = self.model_class.from_pretrained(tmp_path, config=self.config(), output_loading_info=True)
        assert all(key.startswith(("projector", "language_model")) for key in info["missing_keys"])
        assert not info["unexpected_keys"]
        alone = self.model_class(self.config()).generation_config
        assert begun.generation_config.eos_token_id == alone.eos_token_id == self.config().text_config.eos_token_id
        for name in ("vision_model", "qformer_model"):
            for key, value in getattr(begun, name).state_dict().items():
                assert torch.equal(value, getattr(first, name).state_dict()[key]), key


class TestBLIP2(Stage2, GenerationSuite, ModelSuite):
    """With OPT."""

    model_class, auto_class = HfvlmBLIP2ForConditionalGeneration, AutoModelForImageTextToText

    def test_no_penalty_for_what_the_prompt_says(self, model, batch):
        """As the original, which generates from embeddings alone."""
        plain = self.answer(model, batch, max_new_tokens=1)
        again = dict(batch) | {"input_ids": torch.cat([batch["input_ids"], plain], dim=1)}
        again["attention_mask"] = torch.ones_like(again["input_ids"])
        expected = self.answer(model, again, max_new_tokens=1)
        assert torch.equal(self.answer(model, again, max_new_tokens=1, repetition_penalty=50.0), expected)

    def test_images_are_seen_by_both_towers(self, model, batch):
        seen = model.get_image_features(batch["pixel_values"], output_hidden_states=True)
        tokens = model.vision_model(batch["pixel_values"]).last_hidden_state
        assert torch.equal(seen.last_hidden_state, tokens)
        assert torch.equal(seen.hidden_states[-1], tokens)
        assert torch.equal(seen.pooler_output, model.projector(seen.qformer_outputs.last_hidden_state))
        assert len(seen.qformer_outputs.hidden_states) == 3

    def test_a_video_has_frames(self, model, batch):
        with pytest.raises(ValueError, match=r"shape \(3, 3, 28, 28\).*\(videos, frames, channels"):
            model.get_video_features(batch["pixel_values"])

    def test_instructions_are_refused(self, model, batch):
        with pytest.raises(ValueError, match="takes no qformer_input_ids"):
            model(**batch, qformer_input_ids=torch.tensor([[2, 3]] * 3))


class TestInstructBLIP(Stage2, GenerationSuite, ModelSuite):
    """With LLaMA, and a Q-Former that reads what is asked."""

    test_compiles_as_one_graph = None  # only the Q-Former's ids are new
    model_class, auto_class = HfvlmBLIP2ForConditionalGeneration, AutoModelForImageTextToText
    text, qformer = LLAMA, WORDS
    test_decoding_compiles_as_one_graph = None  # after the first step it is LLaMA, as LLaVA is

    def inputs(self):
        asked = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0], [2, 5, 6, 3]])
        return super().inputs() | {"qformer_input_ids": asked, "qformer_attention_mask": (asked != 0).long()}

    def test_queries_look_for_what_is_asked(self, model, batch):
        with torch.no_grad():
            one = model(**batch).logits
            other = model(**batch | {"qformer_input_ids": batch["qformer_input_ids"].flip(0)}).logits
        assert relative(one, other) > 1e-4
        with pytest.raises(ValueError, match="takes qformer_input_ids, which are missing"):
            model(**{name: batch[name] for name in ("input_ids", "pixel_values")})

    def test_videos_are_their_frames(self, model, batch):
        asked = {name: batch[name][:2] for name in ("qformer_input_ids", "qformer_attention_mask")}
        videos = torch.randn(2, 3, 3, 28, 28)
        with torch.no_grad():
            features = model.get_video_features(videos, **asked).pooler_output
            frames = [model.get_image_features(videos[:, i], **asked).pooler_output for i in range(3)]
            close(features, torch.cat(frames, dim=1), 1e-6, "frames")
            ids = torch.tensor([[VIDEO] * 9 + [2, 7, 8], [VIDEO] * 9 + [2, 9, 8]])
            one = model(input_ids=ids, pixel_values_videos=videos, **asked).logits
            other = model(input_ids=ids, pixel_values_videos=videos.flip(1), **asked).logits
            model.config.return_dict = False
            assert isinstance(model.get_video_features(videos, **asked), tuple)
        assert relative(one[:, -1], other[:, -1]) > 1e-5
        assert model.generate(input_ids=ids, pixel_values_videos=videos, **asked, max_new_tokens=2).shape[1] <= 14


class TestT5(Seq2SeqSuite, Stage2, ModelSuite):
    """With FLAN-T5, whose encoder reads the queries."""

    test_compiles_as_one_graph = None  # T5 is transformers'
    model_class, auto_class = HfvlmBLIP2T5ForConditionalGeneration, AutoModelForImageTextToText
    # FLAN-T5's GELU is the exact one.
    text = T5 | {"dense_act_fn": "gelu"}

    def inputs(self):
        return super().inputs() | self.decoder_inputs()

    def test_each_image_and_text_is_encoded_once(self, model, batch):
        calls = []
        model.vision_model.register_forward_hook(lambda *_: calls.append("picture"))
        model.language_model.encoder.register_forward_hook(lambda *_: calls.append("text"))
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            calls.clear()
            self.answer(model, batch, **options)
            assert calls == ["picture", "text"], options

    def test_a_batch_answers_as_its_rows_padded_on_either_side(self, model, batch):
        together = self.answer(model, batch, num_beams=2)
        for i in range(3):
            row = {name: batch[name][i : i + 1] for name in ("input_ids", "attention_mask", "pixel_values")}
            assert torch.equal(self.answer(model, row, num_beams=2)[0], together[i]), i
            zeros = torch.zeros(1, 2, dtype=torch.long)
            for order in (1, -1):
                parts = {name: [zeros, row[name]][::order] for name in ("input_ids", "attention_mask")}
                padded = row | {name: torch.cat(two, dim=1) for name, two in parts.items()}
                assert torch.equal(self.answer(model, padded, num_beams=2)[0], together[i]), i

    def test_writing_begins_with_the_start_token(self, model, batch):
        given = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
        with torch.no_grad():
            begun = model(**given, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long)).logits
            close(model(**given).logits, begun, 0.0, "first")

    def test_its_output_layer_is_its_own(self, model, tmp_path):
        """FLAN-T5's is not its table of words, and neither is scaled; its GELU is the exact one."""
        language = model.language_model
        assert language.lm_head.weight is not language.shared.weight
        assert language.encoder.embed_tokens.weight is language.decoder.embed_tokens.weight is language.shared.weight
        model.save_pretrained(tmp_path)
        loaded = HfvlmBLIP2T5ForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded.language_model.lm_head.weight, language.lm_head.weight)
        assert loaded.config.text_config.dense_act_fn == "gelu"
        assert not loaded.config.text_config.scale_decoder_outputs


class TestLoRA:
    """Each recipe adapts what it says, and the rest of it is trained in full."""

    @pytest.fixture
    def model(self):
        suite = TestInstructBLIP()
        return suite.model_class(suite.config()).eval()

    @pytest.fixture
    def batch(self):
        torch.manual_seed(1)
        suite = TestInstructBLIP()
        return suite.inputs() | suite.loss_inputs()

    @pytest.mark.parametrize(
        ("recipe", "adapted"),
        [
            (None, {"language_model"}),
            ("qformer+projection", {"qformer_model"}),
            ("vision+qformer+language+projection", {"vision_model", "qformer_model", "language_model"}),
        ],
    )
    def test_recipes(self, model, batch, recipe, adapted, tmp_path):
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            untouched = model(**batch).logits
        tuned = hfvlm.lora(model, recipe, r=2, quiet=True)
        with torch.no_grad():
            close(tuned(**batch).logits, untouched, 1e-6, "identity")
        trained = {n.removeprefix("base_model.model."): p for n, p in tuned.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in trained if "lora_" in name} == adapted
        assert {name.split(".")[0] for name in trained if "lora_" not in name} == {"projector"}
        optimizer = torch.optim.SGD(list(trained.values()), lr=0.5)
        before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
        for _ in range(2):
            tuned(**batch).loss.backward()
            optimizer.step()
        moved = {n.removeprefix("base_model.model.") for n, p in tuned.named_parameters() if (p != before[n]).any()}
        assert moved == set(trained)
        with torch.no_grad():
            expected = tuned(**batch).logits
        assert relative(expected, untouched) > 1e-3
        tuned.save_pretrained(tmp_path / "adapter")
        base = HfvlmBLIP2ForConditionalGeneration.from_pretrained(tmp_path / "base")
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        with torch.no_grad():
            close(again(**batch).logits, expected, 1e-5, "reloaded")
            close(again.merge_and_unload()(**batch).logits, expected, 1e-4, "merged")

    @pytest.mark.filterwarnings("ignore")
    def test_adapters_over_four_bits(self, model, batch, tmp_path):
        pytest.importorskip("bitsandbytes", reason="comes with hfvlm[quantization]")
        model.save_pretrained(tmp_path)
        quantised = HfvlmBLIP2ForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        assert type(quantised.language_model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        kept = (quantised.qformer_model.layers[0].query_mlp.fc1, quantised.vision_model.layers[0].mlp.fc1)
        assert {type(layer).__name__ for layer in kept} == {"Linear"}
        tuned = hfvlm.lora(quantised, r=2, quiet=True)
        tuned(**batch).loss.backward()
        grads = [p.grad.abs().max() for n, p in tuned.named_parameters() if p.requires_grad and "lora_A" not in n]
        assert grads
        assert all(grad > 0 for grad in grads)
