import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoModelForCausalLM

import hfvlm
from hfvlm.modeling.compat import cache_of
from hfvlm.modeling.image_codecs import seamless
from hfvlm.modeling.text_to_image import GuidedContext
from hfvlm.models.dalle_mini import (
    HfvlmDALLEMiniConfig,
    HfvlmDALLEMiniDecoder,
    HfvlmDALLEMiniDecoderConfig,
    HfvlmDALLEMiniDVAEConfig,
    HfvlmDALLEMiniDVAEModel,
    HfvlmDALLEMiniForConditionalGeneration,
    HfvlmDALLEMiniTextConfig,
    HfvlmDALLEMiniTextModel,
    HfvlmDALLEMiniVQGANConfig,
    HfvlmDALLEMiniVQGANModel,
)
from hfvlm.modules.context import Context
from tests.support.suite import ModelSuite, PartSuite, close, relative

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
# Attention that is even would leave its queries without gradients.
SIZES |= {"initializer_range": 0.2}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8}
CODES = SIZES | {"vocab_size": 21, "max_position_embeddings": 16, "context_length": 8}
CODES |= {"bos_token_id": 20, "pad_token_id": 20, "eos_token_id": 20}
CODEC = {"hidden_size": 32, "channel_ratios": [1, 2], "blocks_per_level": 1, "attention_levels": [1]}
CODEC |= {"latent_channels": 12, "code_size": 8, "num_codes": 16, "image_size": 8}
IDS = torch.tensor([[0, 7, 2, 1, 1, 1, 1, 1], [0, 9, 4, 3, 2, 1, 1, 1], [0, 8, 9, 5, 6, 7, 8, 2]])
MASK = (IDS != 1).long()
PLAIN = {"do_sample": False}
# Every kind of norm, with what the releases do not have.
VARIANTS = {
    "normformer": {},
    "cogview": {"norms": "cogview", "bias": True, "activation": "relu"},
    "subln": {"norms": "subln", "norm_type": "rmsnorm", "head_scale": True, "activation": "smelu"},
    "swinv2": {"norms": "swinv2", "cosine_temperature": 0.05, "relative_positions": True, "absolute_positions": False},
    "deepnet": {"norms": "preln", "gated": False, "residual_scale": 1.3, "init_gain": 0.6, "scale_embedding": True},
}


class TestText(PartSuite):
    model_class, auto_class = HfvlmDALLEMiniTextModel, AutoModel
    variant = "normformer"

    def config(self):
        return HfvlmDALLEMiniTextConfig(**TEXT, **VARIANTS[self.variant])

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK}

    def objective(self, model, batch):
        """Not squares, whose sum a norm leaves constant."""
        return model(**batch).last_hidden_state.pow(3).sum()

    def test_padding_changes_no_token(self, model, batch):
        expected = model(**batch).last_hidden_state
        assert torch.equal(model(IDS).last_hidden_state, expected)
        close(model(IDS[1:2, :5]).last_hidden_state, expected[1:2, :5], 1e-5, "without padding")
        with pytest.raises(ValueError, match="9 tokens, the text tower has positions for 8"):
            model(torch.cat([IDS, IDS[:, :1]], dim=1))


class TestSwinText(TestText):
    variant = "swinv2"
    implementations = ("sdpa",)

    def test_other_implementations_are_refused(self, model):
        with pytest.raises(ValueError, match="flex_attention|flex attention"):
            model.set_attn_implementation("flex_attention")


class TestSinkhorn:
    @torch.no_grad()
    def test_weights_are_normalised_over_keys_and_queries(self):
        """The last normalisation is over queries; padding takes part as a query, as in the original, not as a key."""
        torch.manual_seed(0)
        model = HfvlmDALLEMiniTextModel(HfvlmDALLEMiniTextConfig(**TEXT, sinkhorn_iterations=4)).eval()
        expected = model(IDS, MASK).last_hidden_state
        model.set_attn_implementation("eager")
        output = model(IDS, MASK, output_attentions=True)
        close(output.last_hidden_state, expected, 1e-5, "eager")
        for weights in output.attentions:
            assert not weights[0, :, :, 3:].any()
            close(weights[0, :, :, :3].sum(1), torch.ones(2, 3), 1e-5, "over queries")


class TestDecoder(PartSuite):
    model_class, auto_class = HfvlmDALLEMiniDecoder, AutoModelForCausalLM
    row_inputs = ("input_ids",)

    def config(self):
        return HfvlmDALLEMiniDecoderConfig(**CODES)

    def inputs(self):
        codes = torch.tensor([[20, 3, 9, 1, 7, 2], [20, 8, 8, 15, 0, 4], [20, 5, 11, 6, 13, 10]])
        return {"input_ids": codes, "context": Context(torch.randn(3, 8, 32), MASK)}

    def objective(self, model, batch):
        return model(**batch, labels=batch["input_ids"]).loss

    def test_rows_of_a_batch_do_not_influence_each_other(self, model, batch):
        expected, context = model(**batch).logits, batch["context"]
        for i in range(3):
            alone = Context(context.tokens[i : i + 1], context.mask[i : i + 1])
            close(model(batch["input_ids"][i : i + 1], context=alone).logits[0], expected[i], 1e-5, f"row {i}")

    def test_the_future_is_not_seen(self, model, batch):
        before = model(**batch).logits
        batch["input_ids"][1, 4] = 12
        after = model(**batch).logits
        assert torch.equal(after[1, :4], before[1, :4])
        assert not torch.equal(after[1, 4:], before[1, 4:])

    def test_it_decodes_of_texts_alone(self, model, batch):
        with pytest.raises(ValueError, match="decodes images of texts: give `context`"):
            model(batch["input_ids"])


class TestDecoding:
    """Of each variant: a cache, a guided context and texts that share one change nothing."""

    @pytest.fixture(params=VARIANTS)
    def model(self, request):
        torch.manual_seed(0)
        config = HfvlmDALLEMiniDecoderConfig(**CODES, **VARIANTS[request.param])
        return HfvlmDALLEMiniDecoder(config).eval()

    @pytest.fixture
    def context(self):
        torch.manual_seed(1)
        return Context(torch.randn(3, 8, 32), MASK)

    @torch.no_grad()
    def test_steps_are_one_forward(self, model, context):
        ids = torch.randint(0, 16, (3, 6))
        whole = model(ids, context=context).logits
        for kind in (context, GuidedContext(context.tokens.repeat(2, 1, 1), MASK.repeat(2, 1), None, 3.0)):
            kept, cache, steps = kind.for_reuse(), None, []
            for i in range(6):
                output = model(ids[:, i : i + 1], context=kept, cache=cache, use_cache=True)
                cache = cache_of(output)
                steps.append(output.logits)
            close(torch.cat(steps, dim=1), whole, 2e-5, type(kind).__name__)

    @torch.no_grad()
    def test_guidance_adds_up_logits(self, model, context):
        ids, other = torch.randint(0, 16, (3, 6)), Context(torch.randn(3, 8, 32), MASK.flip(0))
        text, plain = (model(ids, context=each).logits for each in (context, other))
        both = GuidedContext(
            torch.cat([context.tokens, other.tokens]), torch.cat([context.mask, other.mask]), None, 4.0
        )
        close(model(ids, context=both).logits, plain + 4 * (text - plain), 1e-4, "guided")

    @torch.no_grad()
    def test_rows_may_share_a_text(self, model, context):
        ids = torch.randint(0, 16, (6, 6))
        apart = Context(context.tokens.repeat_interleave(2, 0), MASK.repeat_interleave(2, 0))
        close(model(ids, context=context).logits, model(ids, context=apart).logits, 1e-5, "shared")

    @torch.no_grad()
    def test_implementations_agree(self, model, context):
        ids = torch.randint(0, 16, (3, 6))
        expected = model(ids, context=context).logits
        model.set_attn_implementation("eager")
        close(model(ids, context=context).logits, expected, 1e-5, "eager")


class TestDALLEMini(ModelSuite):
    model_class, auto_class = HfvlmDALLEMiniForConditionalGeneration, AutoModel
    records = ()

    def config(self):
        return HfvlmDALLEMiniConfig(text_config=TEXT, decoder_config=CODES, codec_config=CODEC, guidance_scale=3.0)

    def inputs(self):
        return {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": torch.randint(0, 16, (3, 16))}

    def loss_inputs(self):
        return {"labels": torch.arange(48).view(3, 16) % 16}

    def test_another_text_changes_the_logits(self, model, batch):
        before = model(**batch).logits
        after = model(**batch | {"input_ids": IDS.roll(1, 0), "attention_mask": MASK.roll(1, 0)}).logits
        assert relative(after, before) > 1e-3

    def test_the_loss_is_of_all_classes(self, model, batch):
        labels = torch.randint(0, 16, (3, 16))
        output = model(IDS, MASK, labels=labels)
        shifted = torch.cat([torch.full((3, 1), 20), labels[:, :-1]], dim=1)
        logits = model(IDS, MASK, decoder_input_ids=shifted).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        close(output.loss, expected, 1e-6, "loss")
        assert output.logits.shape == (3, 16, 21)

    def test_generate_follows_the_forward(self, model):
        for options in ({"guidance_scale": 1.0}, {}):
            ids = torch.full((3, 1), 20)
            other = model.empty_texts(IDS)
            with torch.no_grad():
                for _ in range(16):
                    text, plain = (model(each, decoder_input_ids=ids).logits[:, -1] for each in (IDS, other))
                    scores = plain + options.get("guidance_scale", 3.0) * (text - plain)
                    ids = torch.cat([ids, scores[:, :16].argmax(-1, keepdim=True)], dim=1)
            assert torch.equal(model.generate(IDS, MASK, **PLAIN, **options), ids), options
            assert torch.equal(model.generate(IDS, MASK, **PLAIN, **options, use_cache=False), ids), options

    def test_rows_are_drawn_as_alone(self, model):
        together = model.generate(IDS, MASK, **PLAIN)
        for i in range(3):
            assert torch.equal(model.generate(IDS[i : i + 1], MASK[i : i + 1], **PLAIN), together[i : i + 1])

    def test_given_noise_decides_what_is_drawn(self, model):
        noise = -torch.rand(16, 6, 21).log().neg().log()
        options = {"noise": noise, "num_return_sequences": 2, "eos_token_id": None, "temperature": 2.0}
        first = model.generate(IDS, MASK, **options)
        torch.manual_seed(5)
        assert torch.equal(model.generate(IDS, MASK, **options), first)
        assert first.shape == (6, 17)
        assert not torch.equal(first[0::2], first[1::2])
        with pytest.raises(ValueError, match=r"noise is \(16, 6, 21\), step 0 of \(3, 21\) needs"):
            model.generate(IDS, MASK, noise=noise)

    def test_a_text_to_move_away_from(self, model):
        found = model.generate(IDS, MASK, negative_prompt_ids=IDS.roll(1, 0), **PLAIN)
        empty = model.generate(IDS, MASK, negative_prompt_ids=model.empty_texts(IDS), **PLAIN)
        assert torch.equal(empty, model.generate(IDS, MASK, **PLAIN))
        assert not torch.equal(found, empty)

    def test_what_cannot_be_is_refused(self, model):
        with pytest.raises(ValueError, match="Beams cannot be guided"):
            model.generate(IDS, MASK, num_beams=2)
        with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
            model.generate(IDS, MASK, guidance_scale=float("nan"))
        with pytest.raises(TypeError, match="made_up"):
            model.generate(IDS, MASK, made_up=1)
        with pytest.raises(TypeError, match="made_up"):
            model(IDS, made_up=1)
        assert model.generate(IDS, MASK, num_beams=2, guidance_scale=1, **PLAIN).shape == (3, 17)

    def test_images_are_drawn(self, model):
        torch.manual_seed(0)
        images = model.draw(IDS, MASK, num_return_sequences=2)
        assert images.shape == (6, 3, 8, 8)
        assert not torch.equal(images[0], images[1])
        assert 0 <= images.min() <= images.max() <= 1

    def test_the_loss_of_pixels_is_that_of_their_codes(self, model):
        pixels = torch.rand(3, 3, 8, 8)
        output = model(IDS, MASK, pixels, return_loss=True)
        codes = model.codec.encode(pixels).codes.flatten(1)
        assert torch.equal(output.labels, codes)
        close(output.loss, model(IDS, MASK, labels=codes).loss, 1e-6, "loss")

    # The codec is not trained.

    def test_every_parameter_gets_a_gradient(self, model, batch):
        super().test_every_parameter_gets_a_gradient(model, batch)
        assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "codec" in name)

    def test_recipes(self, model):
        tuned = hfvlm.lora(model, quiet=True)
        adapted = {name for name, p in tuned.named_parameters() if p.requires_grad}
        assert all(".codec." not in name and "lora_" in name for name in adapted)
        assert any(".image_decoder." in name for name in adapted)


class TestWithoutPadding:
    """Of a configuration without a token for padding, and of one without an end."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        config = HfvlmDALLEMiniConfig(
            text_config=TEXT | {"pad_token_id": None}, decoder_config=CODES | {"pad_token_id": None}
        )
        return HfvlmDALLEMiniForConditionalGeneration(config).eval()

    @torch.no_grad()
    def test_all_tokens_of_a_text_are_read(self, model):
        whole = model(IDS, torch.ones_like(IDS)).logits
        assert torch.equal(model(IDS).logits, whole)
        close(model.text_model(IDS).last_hidden_state, model(IDS).text_model_output.last_hidden_state, 0.0, "text")
        assert relative(model(IDS, MASK).logits, whole) > 1e-4

    def test_the_end_fills_images_up(self, model):
        noise = torch.zeros(16, 3, 21)
        noise[0, :, 18], noise[1, 0, 20], noise[1, 1:, 18], noise[2:, :, 20] = 1e6, 1e6, 1e6, 1e6
        found = model.generate(IDS, noise=noise, top_k=0, guidance_scale=1)
        assert found.tolist() == [[20, 18, 20, 20], [20, 18, 18, 20], [20, 18, 18, 20]]

    def test_the_empty_text_needs_it(self, model):
        with pytest.raises(ValueError, match="text_config has no pad_token_id. Set it, give negative_prompt_ids"):
            model.generate(IDS, guidance_scale=3.0)
        assert model.generate(IDS, guidance_scale=3.0, negative_prompt_ids=IDS.roll(1, 0), **PLAIN).shape[0] == 3
        with pytest.raises(StrictDataclassClassValidationError, match="bos_token_id is None: images need a start"):
            HfvlmDALLEMiniDecoderConfig(**CODES | {"bos_token_id": None})


class TestWithoutCodec:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return HfvlmDALLEMiniForConditionalGeneration(
            HfvlmDALLEMiniConfig(text_config=TEXT, decoder_config=CODES)
        ).eval()

    def test_all_ids_may_be_drawn_and_the_end_ends(self, model, tmp_path):
        noise = torch.zeros(16, 3, 21)
        noise[0, :, 18], noise[3:, :, 20] = 1e6, 1e6
        found = model.generate(IDS, MASK, noise=noise, top_k=0, guidance_scale=1)
        assert found.shape == (3, 5)
        assert (found[:, 1] == 18).all()
        assert (found[:, 4] == 20).all()
        model.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).codec is None

    def test_images_need_a_codec(self, model):
        for draw in (lambda: model.draw(IDS), lambda: model(IDS, pixel_values=torch.rand(3, 3, 8, 8))):
            with pytest.raises(ValueError, match="has no VQGAN .codec_config is None."):
                draw()


class TestVQGAN(PartSuite):
    model_class, auto_class = HfvlmDALLEMiniVQGANModel, AutoModel
    records = ("hidden_states",)

    def config(self):
        return HfvlmDALLEMiniVQGANConfig(**CODEC)

    def inputs(self):
        return {"pixel_values": torch.rand(3, 3, 8, 12)}

    def test_images_of_any_size_to_codes_and_back(self, model, batch):
        codes = model.encode(batch["pixel_values"]).codes
        assert codes.shape == (3, 4, 6)
        close(model.decode(codes), model(**batch).reconstruction, 1e-5, "decoded")
        with pytest.raises(ValueError, match=r"\(8, 9\): rows and columns are multiples of 2"):
            model(torch.rand(1, 3, 8, 9))
        with pytest.raises(ValueError, match="24 codes are no square image"):
            model.decode(codes.flatten(1))
        with pytest.raises(ValueError, match="codes reach from 0 to 16, the codec has 16"):
            model.decode(torch.tensor([[0, 16, 1, 2]]))

    def test_codes_are_the_nearest(self, model, batch):
        model.codes.weight.data.normal_()
        output = model.encode(batch["pixel_values"])
        latents = output.latents.permute(0, 2, 3, 1)
        nearest = torch.cdist(latents.flatten(0, 2), model.codes.weight).argmin(-1)
        assert torch.equal(output.codes.flatten(), nearest)

    def test_the_loss_trains_all_of_it(self, model, batch):
        model.codes.weight.data.normal_()
        model(**batch, return_loss=True).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.encoder.stem.weight.grad.abs().max() > 0

    def test_bfloat16(self, model, batch):
        """Which code is the nearest may change; all else is as near as rounding lets it be."""
        expected = model.encode(batch["pixel_values"])
        image = model.decode(expected.codes)
        half = model.to(torch.bfloat16)
        assert relative(half.encode(batch["pixel_values"]).latents.float(), expected.latents) < 0.1
        assert relative(half.decode(expected.codes).float(), image) < 0.1

    def test_a_decoder_alone(self):
        model = HfvlmDALLEMiniVQGANModel(HfvlmDALLEMiniVQGANConfig(**CODEC, has_encoder=False)).eval()
        assert model.decode(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 3, 8, 8)
        with pytest.raises(ValueError, match="a decoder alone"):
            model.encode(torch.rand(1, 3, 8, 8))

    def test_a_grid_as_one_image(self):
        codes = torch.arange(4 * 4).view(4, 4)
        expected = [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
        assert seamless(codes).tolist() == [expected]
        with pytest.raises(ValueError, match="3 images are no square grid"):
            seamless(codes[:3])


class TestDVAE(PartSuite):
    model_class, auto_class = HfvlmDALLEMiniDVAEModel, AutoModel
    records = ("hidden_states",)
    lora_layers = ["stem", "head"]

    def config(self):
        return HfvlmDALLEMiniDVAEConfig(
            hidden_size=8, decoder_hidden_size=8, decoder_input_size=8, blocks_per_group=1, num_codes=12,
            decoder_blocks_per_group=1, image_size=16,
        )  # fmt: skip

    def inputs(self):
        return {"pixel_values": torch.rand(3, 3, 16, 24)}

    def test_images_to_codes_and_back(self, model, batch):
        output = model.encode(batch["pixel_values"])
        assert output.codes.shape == (3, 2, 3)
        close(model.decode(output.codes), model(**batch).reconstruction, 1e-5, "decoded")
        assert 0 <= model.decode(output.codes).min() <= model.decode(output.codes).max() <= 1
        with pytest.raises(ValueError, match="multiples of 8"):
            model(torch.rand(1, 3, 8, 9))


def test_bad_sizes_are_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="norms is one of normformer"):
        HfvlmDALLEMiniTextConfig(norms="postln")
    with pytest.raises(StrictDataclassClassValidationError, match="activation 'made_up' is unknown"):
        HfvlmDALLEMiniTextConfig(activation="made_up")
    whole = {"text_config": TEXT, "decoder_config": CODES, "codec_config": CODEC}
    for name, change, message in (
        ("decoder_config", {"hidden_size": 64}, "hidden_size differs: 32 in text_config, 64"),
        ("decoder_config", {"context_length": 9}, "context_length is 9, texts have 8 tokens"),
        ("codec_config", {"num_codes": 22}, "codec_config has 22 codes"),
        ("codec_config", {"image_size": 16}, "images have 64 codes"),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            HfvlmDALLEMiniConfig(**whole | {name: whole[name] | change})
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple of 32"):
        HfvlmDALLEMiniVQGANConfig(hidden_size=40)
