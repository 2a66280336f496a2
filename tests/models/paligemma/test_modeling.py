import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText

from hfvlm.modeling.compat import cache_of
from hfvlm.models.paligemma import (
    HfvlmPaliGemmaConfig,
    HfvlmPaliGemmaForConditionalGeneration,
    HfvlmPaliGemmaForImageClassification,
    HfvlmPaliGemmaMaskConfig,
    HfvlmPaliGemmaMaskModel,
    HfvlmPaliGemmaVisionConfig,
    HfvlmPaliGemmaVisionModel,
)
from hfvlm.models.paligemma.beams import every_beam_may_end
from tests.support.generation import NEW, GenerationSuite
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close, relative, same

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
GEMMA = {"model_type": "gemma", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128}
GEMMA |= {"initializer_range": 0.2}
GEMMA2 = GEMMA | {"model_type": "gemma2", "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
GEMMA2 |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
IMAGE = 60


class TestVisionModel(PartSuite):
    model_class, auto_class = HfvlmPaliGemmaVisionModel, AutoModel

    def config(self):
        return HfvlmPaliGemmaVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}

    def test_other_image_sizes(self, model):
        images = torch.randn(1, 3, 42, 28)
        with pytest.raises(ValueError, match="image_size 28"):
            model(images)
        assert model(images, interpolate_pos_encoding=True).last_hidden_state.shape == (1, 6, 32)


class TestPaliGemma(GenerationSuite, ModelSuite):
    model_class, auto_class = HfvlmPaliGemmaForConditionalGeneration, AutoModelForImageTextToText

    def config(self):
        return HfvlmPaliGemmaConfig(vision_config=VISION, text_config=GEMMA, image_token_id=IMAGE)

    def inputs(self):
        words = torch.tensor([[2, 5, 8, 7, 4], [2, 6, 3, 9, 4], [2, 9, 9, 11, 4]])
        ids = torch.cat([torch.full((3, 4), IMAGE), words], dim=1)
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        labels = self.inputs()["input_ids"].clone()
        labels[:, :7] = -100
        return {"labels": labels}

    def test_prefill_steps_and_one_forward_agree(self, model, batch):
        """Of a forward over all, the types say where the suffix begins; a prompt is all prefix."""
        alone = self.one(batch, 0)
        ids, mask = alone.pop("input_ids"), alone.pop("attention_mask")
        prompt = ids.shape[1] - 3
        types = (torch.arange(ids.shape[1]) >= prompt).long()[None]
        with torch.no_grad():
            whole = model(input_ids=ids, token_type_ids=types, **alone).logits
            close(model(input_ids=ids, prefix_length=prompt, **alone).logits, whole, 0.0, "length")
            labelled = ids.masked_fill(types == 0, -100)
            close(model(input_ids=ids, labels=labelled, **alone).logits, whole, 1e-6, "labels")
            output = model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **alone)
            steps = [output.logits]
            for i in range(prompt, ids.shape[1]):
                step = {"input_ids": ids[:, i : i + 1], "attention_mask": mask[:, : i + 1]}
                output = model(**step, cache=cache_of(output), use_cache=True)
                steps.append(output.logits)
        close(torch.cat(steps, dim=1), whole, 1e-5, "step by step")
        assert relative(model(input_ids=ids, **alone).logits, whole) > 1e-3

    def test_generate_follows_the_forward(self, model, batch):
        batch = self.one(batch, 0)
        rest = {"pixel_values": batch["pixel_values"], "prefix_length": batch["input_ids"].shape[1]}
        ids, expected = batch["input_ids"], []
        with torch.no_grad():
            for _ in range(NEW["max_new_tokens"]):
                best = model(input_ids=ids, **rest).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, best], dim=1)
                expected.append(best)
        expected = torch.cat(expected, dim=1)
        assert len(set(expected[0].tolist())) > 1
        types = torch.zeros_like(batch["input_ids"])
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"token_type_ids": types}):
            assert torch.equal(self.answer(model, batch, **options), expected), options
        without = self.answer(model, batch, token_type_ids=types, use_cache=False)
        assert torch.equal(without, expected)

    def test_shifted_labels_give_the_same_loss(self, model, batch):
        labels = self.loss_inputs()["labels"]
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        with torch.no_grad():
            expected = model(**batch, labels=labels).loss
            close(model(**batch, shift_labels=shifted).loss, expected, 1e-6, "shifted alone")
            close(model(**batch, labels=labels.flip(1), shift_labels=shifted).loss, expected, 1e-6, "both")

    def test_the_loss_is_a_mean_over_rows_of_means(self, model, batch):
        """One row has a suffix of three tokens, one of one, and one none."""
        labels = self.loss_inputs()["labels"]
        labels[0, 6], labels[1, :8], labels[2] = batch["input_ids"][0, 6], -100, -100
        losses = []
        with torch.no_grad():
            for i in range(2):
                alone = self.one(batch, i)
                logits = model(**alone, labels=labels[i : i + 1]).logits
                losses.append(F.cross_entropy(logits[0, :-1], labels[i, 1:], ignore_index=-100))
            output = model(**batch, labels=labels)
        close(output.loss, sum(losses) / 3, 1e-6, "mean of means")
        total = model(**batch, labels=labels, num_items_in_batch=4).loss
        close(total, (3 * losses[0] + losses[1]) / 4, 1e-6, "counted")

    def test_label_smoothing(self, model, batch):
        labels, share = self.loss_inputs()["labels"], 0.1
        with torch.no_grad():
            logs = model(**batch, labels=labels).logits[:, 6:8].log_softmax(-1)
            model.config.label_smoothing = share
            loss = model(**batch, labels=labels).loss
        target = torch.full_like(logs, share / 59).scatter(2, labels[:, 7:9, None], 1 - share)
        close(loss, -(target * logs).sum(-1).mean(), 1e-6, "smoothed")

    def test_beams_end_as_the_authors(self, model, batch):
        """Every beam's end is considered; the sum of the log probabilities is at least that of greedy decoding."""
        alone = self.one(batch, 0)
        end = int(self.answer(model, alone)[0, 2])
        options = NEW | {"eos_token_id": end, "pad_token_id": 0, "num_beams": 3, "custom_generate": every_beam_may_end}
        found = model.generate(**batch, **options)[:, alone["input_ids"].shape[1] :]
        for i in range(3):
            row = model.generate(**self.one(batch, i), **options)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(row[0], found[i])
            again = model.generate(**self.one(batch, i), **options | {"use_cache": False})
            assert torch.equal(again[:, -NEW["max_new_tokens"] :][0], found[i])
        after = (found == end).cumsum(1) - (found == end).long() > 0
        assert (found[after] == 0).all()
        assert (found == end).any(dim=1).all()

    def test_several_images(self, model, batch):
        ids = torch.cat([torch.full((1, 8), IMAGE), torch.tensor([[2, 5, 4]])], dim=1)
        with torch.no_grad():
            two = model(input_ids=ids, pixel_values=batch["pixel_values"][:2]).logits
            other = model(input_ids=ids, pixel_values=batch["pixel_values"][[0, 2]]).logits
        assert relative(other[:, -1], two[:, -1]) > 1e-3

    def test_flash_attention_is_refused(self):
        with pytest.raises((ValueError, ImportError), match="(?i)flash"):
            HfvlmPaliGemmaForConditionalGeneration._from_config(self.config(), attn_implementation="flash_attention_2")


class TestImageClassification(ImageClassifierSuite):
    model_class, auto_class = HfvlmPaliGemmaForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmPaliGemmaForConditionalGeneration
    pooled_output = "last_hidden_state"

    def config(self):
        return HfvlmPaliGemmaConfig(vision_config=VISION, text_config=GEMMA, image_token_id=IMAGE, num_labels=4)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}


class TestPaliGemma2:
    """With Gemma 2: caps, norms after the branches, and no window."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        torch.manual_seed(0)
        config = HfvlmPaliGemmaConfig(vision_config=VISION, text_config=GEMMA2, image_token_id=IMAGE)
        return HfvlmPaliGemmaForConditionalGeneration(config).eval()

    @pytest.fixture
    def batch(self):
        torch.manual_seed(1)
        return TestPaliGemma().inputs()

    def test_there_is_no_window(self, model):
        assert set(model.config.text_config.layer_types) == {"full_attention"}
        sliding = {"layer_types": ["sliding_attention", "full_attention"]}
        with pytest.raises(Exception, match="no sliding window"):
            HfvlmPaliGemmaConfig(vision_config=VISION, text_config=GEMMA2 | sliding)

    def test_attention_is_capped(self, model, batch, uncompiled_flex_attention):
        assert model.language_model.config._attn_implementation == "eager"
        with torch.no_grad():
            expected = model(**batch).logits
            model.set_attn_implementation({"text_config": "flex_attention"})
            close(model(**batch).logits, expected, 1e-5, "flex attention")
            model.language_model.config._attn_implementation = "sdpa"
            with pytest.raises(ValueError, match="'sdpa' leaves out the cap"):
                model(**batch)
        model.set_attn_implementation({"text_config": "eager"})

    def test_logits_are_capped_with_and_without_a_loss(self, model, batch):
        labels = TestPaliGemma().loss_inputs()["labels"]
        with torch.no_grad():
            plain = model(**batch, prefix_length=7).logits
            output = model(**batch, labels=labels)
        assert plain.abs().max() < 3
        close(output.logits, plain, 1e-6, "with labels")
        late = model.train()(**batch, labels=labels)
        close(late.loss, output.loss, 1e-6, "in training")
        close(late.logits, plain, 1e-6, "late")
        model.eval()

    def test_cached_steps_equal_whole_forwards(self, model, batch):
        alone = {name: value[:1] for name, value in batch.items()}
        left = model.generate(**alone, **NEW)
        assert torch.equal(left, model.generate(**alone, **NEW, use_cache=False))
        assert torch.equal(left, model.generate(**alone, **NEW, cache_implementation="static"))

    def test_a_checkpoint_is_itself_again(self, model, batch, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        same({"logits": loaded(**batch).logits}, {"logits": model(**batch).logits}, exact=True)


class TestMaskModel(PartSuite):
    model_class, auto_class = HfvlmPaliGemmaMaskModel, AutoModel
    records = ()
    lora_layers = ["encoder.0", "encoder.8.net.0"]
    implementations = ()

    def config(self):
        return HfvlmPaliGemmaMaskConfig(
            encoder_channels=[4, 4, 8, 8], decoder_channels=[8, 8, 4, 4, 4], code_dim=12, num_codes=9
        )

    def inputs(self):
        return {"pixel_values": (torch.rand(3, 64, 64) > 0.5).float()}

    def loss_inputs(self):
        return {"return_loss": True}

    def test_attention_implementations_agree(self):
        """There is no attention."""
        assert not any("attention" in name.lower() for name, _ in self.model_class(self.config()).named_modules())

    test_attention_implementation_of_one_tower = None

    def test_bfloat16(self, model, batch):
        """Rounding may choose another code: what the codes decode to is compared."""
        codes = model.encode_masks(batch["pixel_values"])
        expected = model.decode_codes(codes)
        half = model.to(torch.bfloat16).decode_codes(codes)
        assert relative(half.float(), expected) < 0.1

    def test_codes_are_those_of_the_forward(self, model, batch):
        output = model(**batch)
        codes = model.encode_masks(batch["pixel_values"])
        assert torch.equal(codes, output.codes)
        assert codes.shape == (3, 16)
        close(model.decode_codes(codes), output.masks, 1e-5, "masks")

    def test_it_learns_masks(self):
        torch.manual_seed(0)
        model = self.model_class(self.config())
        edge = torch.arange(64)
        masks = torch.stack([(edge[:, None] < n) & (edge < n) for n in (20, 40, 60)]).float()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            loss = model(masks, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    def test_other_sizes_are_refused(self, model):
        with pytest.raises(ValueError, match=r"masks are \(B, 64, 64\)"):
            model(torch.zeros(1, 1, 64, 64))
        with pytest.raises(Exception, match="four halvings"):
            HfvlmPaliGemmaMaskConfig(encoder_channels=[4, 8])
