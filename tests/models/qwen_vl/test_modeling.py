import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hfvlm
from hfvlm.conversion.qwen_vl import processor_for
from hfvlm.inference.chat import Chat
from hfvlm.modeling.compat import cache_of
from hfvlm.models.qwen_vl import (
    HfvlmQwenVLConfig,
    HfvlmQwenVLForCausalLM,
    HfvlmQwenVLForConditionalGeneration,
    HfvlmQwenVLForImageClassification,
    HfvlmQwenVLResampler,
    HfvlmQwenVLResamplerConfig,
    HfvlmQwenVLTextConfig,
    HfvlmQwenVLTextModel,
    HfvlmQwenVLVisionConfig,
    HfvlmQwenVLVisionModel,
)
from tests.support.generation import GenerationSuite
from tests.support.paths import OURS
from tests.support.suite import ImageClassifierSuite, ModelSuite, PartSuite, close, relative

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 7}
PROJECTOR = {"context_size": 32, "hidden_size": 48, "num_attention_heads": 2, "num_queries": 4}
TEXT = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1}
IMAGE = 63
VOCABULARY = OURS / "qwen_vl" / "processor-tokenizer" / "qwen.tiktoken"


def config(**text):
    return HfvlmQwenVLConfig(
        vision_config=VISION, projector_config=PROJECTOR, text_config=TEXT | text, image_token_id=IMAGE
    )


class TestQwenVL(GenerationSuite, ModelSuite):
    model_class, auto_class = HfvlmQwenVLForConditionalGeneration, AutoModelForImageTextToText
    implementations = ("sdpa",)  # flex is tried on the towers

    def config(self):
        return config()

    def inputs(self):
        ids = torch.tensor([[2, start, 61, *[IMAGE] * 4, 62, 7, 8, end] for start, end in ((5, 9), (6, 4), (9, 3))])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        ids = self.inputs()["input_ids"]
        return {"labels": ids.masked_fill(ids == IMAGE, -100)}

    def test_images_of_another_size_have_as_many_tokens(self, model):
        (features,) = model.get_image_features(torch.randn(1, 3, 42, 21)).pooler_output
        assert features.shape == (4, 48)

    def test_a_static_cache_takes_the_frequencies_of_each_prompt(self, batch):
        """Beyond the trained length the frequencies are the prompt's, whatever ran before."""
        model = HfvlmQwenVLForConditionalGeneration(config(trained_length=6)).eval()
        expected = self.answer(model, batch)
        for _ in range(2):
            assert torch.equal(self.answer(model, batch, cache_implementation="static"), expected)
            self.answer(model, self.padded(batch, 20), cache_implementation="static")


class TestVision(PartSuite):
    model_class, auto_class = HfvlmQwenVLVisionModel, AutoModel

    def config(self):
        return HfvlmQwenVLVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}


class TestImageClassification(ImageClassifierSuite):
    model_class, auto_class = HfvlmQwenVLForImageClassification, AutoModelForImageClassification
    whole_class = HfvlmQwenVLForConditionalGeneration
    pooled_output = "last_hidden_state"

    def config(self):
        sizes = config()
        sizes.num_labels = 4
        return sizes

    def inputs(self):
        return {"pixel_values": torch.randn(3, 3, 28, 28)}


class TestText(PartSuite):
    model_class, auto_class = HfvlmQwenVLTextModel, AutoModel
    implementations: tuple[str, ...] = ("sdpa",)  # flex with the output layer, below

    def config(self):
        return HfvlmQwenVLTextConfig(**TEXT | {"use_cache": False})

    def inputs(self):
        ids = torch.arange(27).reshape(3, 9) * 17 % 61 + 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestCausalLM(TestText):
    model_class, auto_class = HfvlmQwenVLForCausalLM, AutoModelForCausalLM
    implementations = ("sdpa", "flex_attention")

    def loss_inputs(self):
        return {"labels": self.inputs()["input_ids"]}

    @pytest.mark.parametrize("bias", [False, True])
    def test_up_to_the_trained_length_it_equals_qwen2(self, batch, bias):
        own = HfvlmQwenVLForCausalLM(HfvlmQwenVLTextConfig(**TEXT | {"trained_length": 9, "linear_bias": bias})).eval()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: TEXT[name] for name in names}
        native = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=4, rms_norm_eps=1e-6)).eval()
        unknown = native.load_state_dict(own.state_dict(), strict=False).unexpected_keys
        assert len(unknown) == bias * 8
        with torch.no_grad():
            close(own(**batch).logits, native(**batch).logits, 1e-5, "Qwen2")  # biases begin at zero

    def test_part_of_a_head_may_be_rotated(self, batch):
        model = HfvlmQwenVLForCausalLM(HfvlmQwenVLTextConfig(**TEXT | {"rotary_share": 0.5})).eval()
        with torch.no_grad():
            whole = model(**batch).logits
            first = model(batch["input_ids"][:, :5], use_cache=True)
            rest = model(batch["input_ids"][:, 5:], cache=cache_of(first))
        close(torch.cat([first.logits, rest.logits], dim=1), whole, 1e-5, "in two parts")


class TestBeyondTheTrainedLength:
    @pytest.fixture
    def model(self):
        return HfvlmQwenVLForCausalLM(HfvlmQwenVLTextConfig(**TEXT | {"trained_length": 8})).eval()

    @pytest.mark.parametrize(("length", "stretch"), [(1, 1), (8, 1), (9, 3), (16, 3), (17, 7), (32, 7), (33, 15)])
    def test_the_prompt_decides_the_frequencies(self, model, length, stretch):
        ids = torch.randint(2, 60, (1, length))
        cache = cache_of(model(ids, use_cache=True))
        assert cache.stretch == stretch
        for _ in range(9):
            cache = cache_of(model(ids[:, :1], cache=cache, use_cache=True))
        assert cache.stretch == stretch

    def test_steps_equal_one_forward_with_the_same_frequencies(self, model):
        ids = torch.randint(2, 60, (2, 16))
        with torch.no_grad():
            whole = model(ids).logits
            output = model(ids[:, :12], use_cache=True)
            parts = [output.logits]
            for i in range(12, 16):
                output = model(ids[:, i : i + 1], cache=cache_of(output), use_cache=True)
                parts.append(output.logits)
        close(torch.cat(parts, dim=1), whole, 1e-5, "steps")

    @pytest.mark.parametrize("name", ["dynamic_ntk", "logn_attention"])
    def test_each_extension_matters_beyond_the_trained_length_alone(self, model, name):
        plain = HfvlmQwenVLForCausalLM(HfvlmQwenVLTextConfig(**TEXT | {"trained_length": 8, name: False})).eval()
        plain.load_state_dict(model.state_dict())
        ids = torch.randint(2, 60, (2, 24))
        with torch.no_grad():
            close(model(ids[:, :8]).logits, plain(ids[:, :8]).logits, 0.0, "trained length")
            assert relative(model(ids).logits[:, -1], plain(ids).logits[:, -1]) > 1e-5

    def test_no_extension_is_part_of_training(self, model):
        ids = torch.randint(2, 60, (2, 24))
        plain = HfvlmQwenVLForCausalLM(HfvlmQwenVLTextConfig(**TEXT | {"trained_length": 64})).eval()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            close(model.train()(ids).logits, plain(ids).logits, 1e-6, "training")


class TestResampler(PartSuite):
    model_class, auto_class = HfvlmQwenVLResampler, AutoModel
    records, row_inputs = (), ("patches",)

    def config(self):
        return HfvlmQwenVLResamplerConfig(**PROJECTOR)

    def inputs(self):
        return {"patches": torch.randn(3, 16, 32), "grid": (4, 4)}

    def test_queries_attend_to_the_positions_of_patches(self):
        model = HfvlmQwenVLResampler(HfvlmQwenVLResamplerConfig(**PROJECTOR)).eval()
        patches = torch.randn(2, 16, 32)
        with torch.no_grad():
            moved = model(patches.flip(1), (4, 4)).last_hidden_state
            assert relative(moved, model(patches, (4, 4)).last_hidden_state) > 1e-4
            model.position.zero_()
            moved = model(patches.flip(1), (4, 4)).last_hidden_state
            close(moved, model(patches, (4, 4)).last_hidden_state, 1e-5, "no places")

    def test_equals_an_independent_formulation(self):
        model = HfvlmQwenVLResampler(HfvlmQwenVLResamplerConfig(**PROJECTOR)).eval()
        other = torch.nn.MultiheadAttention(48, 2)
        own = model.attention
        with torch.no_grad():
            for name in ("weight", "bias"):
                parts = [getattr(part, name) for part in (own.q_proj, own.k_proj, own.v_proj)]
                getattr(other, f"in_proj_{name}").copy_(torch.cat(parts))
                getattr(other.out_proj, name).copy_(getattr(own.out_proj, name))
            patches = torch.randn(3, 4, 32)
            context = model.context_norm(model.kv_proj(patches)).transpose(0, 1)
            place = model.position.unsqueeze(1)
            query = model.query_norm(model.query).unsqueeze(1).expand(-1, 3, -1) + place
            expected = other(query, context + place, context)[0].transpose(0, 1)
            actual = model(patches, (2, 2)).last_hidden_state
            close(actual, model.projection(model.post_norm(expected)), 1e-5, "resampler")

    def test_patches_of_its_own_width_are_not_projected(self):
        model = HfvlmQwenVLResampler(HfvlmQwenVLResamplerConfig(**PROJECTOR | {"context_size": 48}))
        assert not list(model.kv_proj.parameters())
        assert model(torch.randn(1, 9, 48), (3, 3)).last_hidden_state.shape == (1, 4, 48)


class TestLoRA:
    def test_lora_adapts_the_authors_layers_by_default(self):
        model = HfvlmQwenVLForConditionalGeneration(config())
        tuned = hfvlm.lora(model, quiet=True)
        names = {name.split(".lora_")[0] for name, p in tuned.named_parameters() if p.requires_grad}
        assert all(".language_model.model.layers." in name for name in names)
        parts = {name.rpartition(".")[2] for name in names}
        assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}

    def test_the_resampler_is_trained_in_full_and_saved_with_the_adapter(self, tmp_path):
        torch.manual_seed(0)
        base = HfvlmQwenVLForConditionalGeneration(config()).eval()
        base.save_pretrained(tmp_path / "base")
        batch = TestQwenVL().inputs()
        tuned = hfvlm.lora(base, "language+projection", quiet=True)
        trained = {name for name, p in tuned.named_parameters() if p.requires_grad and "lora_" not in name}
        assert trained
        assert all(".projector.modules_to_save." in name for name in trained)
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
        before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
        for _ in range(2):
            tuned(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)).loss.backward()
            optimizer.step()
        moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
        # The keys' bias shifts all of a query's scores alike.
        still = {name for name in trained if name.endswith("k_proj.bias")}
        assert moved | still == {name for name, p in tuned.named_parameters() if p.requires_grad} | still
        expected = tuned.eval()(**batch).logits
        tuned.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        again = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
        close(again(**batch).logits, expected, 1e-5, "reloaded")
        close(again.merge_and_unload()(**batch).logits, expected, 1e-4, "merged")


class TestChatBeyondTheTrainedLength:
    def test_cached_answers_equal_those_to_the_whole_conversation(self):
        settings = hfvlm.load_preset("qwen_vl/tiny").make_config()
        settings.text_config.trained_length = 64
        processor = processor_for(settings, {}, VOCABULARY)
        model = HfvlmQwenVLForConditionalGeneration(settings).eval()
        options = {"max_new_tokens": 6, "eos_token_id": None}
        chat = Chat(model, processor, **options)
        sizes = []
        for question in ("What is this?", "And " * 20, "Why?"):
            answer = chat.ask(question, images=[Image.new("RGB", (40, 30), (90 * len(sizes), 40, 200))])
            sizes.append(chat.cache.stretch)
            fresh = Chat(model, processor, **options)
            fresh.messages = chat.messages[:-2]
            fresh.counts, fresh.features = chat.counts[:-1], chat.features[:-1]
            assert fresh.ask(question, images=[Image.new("RGB", (40, 30), (90 * len(sizes) - 90, 40, 200))]) == answer
        assert sizes[0] < sizes[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_config": PROJECTOR | {"num_queries": 5}}, "num_queries 5 is no square number"),
        ({"projector_config": PROJECTOR | {"context_size": 16}}, "takes 16 and makes 48"),
        ({"projector_config": PROJECTOR | {"num_attention_heads": 5}}, "multiple of num_attention_heads"),
        ({"text_config": TEXT | {"rotary_share": 0.1}}, "rotary_share 0.1 of a head of 12 is 1"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        HfvlmQwenVLConfig(**{"vision_config": VISION, "projector_config": PROJECTOR, "text_config": TEXT} | changes)


def test_answers_end_where_turns_do(tmp_path):
    model = HfvlmQwenVLForConditionalGeneration(config(eos_token_id=[1, 5]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [1, 5]
    assert hfvlm.load_preset("qwen-vl-chat").make_config().text_config.eos_token_id == [151643, 151645, 151644]
