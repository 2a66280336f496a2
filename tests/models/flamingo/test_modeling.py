import copy
import re

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, OPTConfig, OPTForCausalLM

from hfvlm.modeling.compat import cache_of, with_cache
from hfvlm.models.flamingo import (
    HfvlmFlamingoConfig,
    HfvlmFlamingoForConditionalGeneration,
    HfvlmFlamingoMPTConfig,
    HfvlmFlamingoMPTForCausalLM,
    HfvlmFlamingoResampler,
    HfvlmFlamingoResamplerConfig,
    HfvlmFlamingoTokenizer,
)
from hfvlm.models.flamingo.modeling_flamingo import Gate
from hfvlm.training.lora import lora
from tests.support.generation import NEW, GenerationSuite
from tests.support.suite import ModelSuite, PartSuite, close, relative

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "projection_dim": None}
RESAMPLER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RESAMPLER |= {"head_dim": 8, "num_latents": 5}
NEOX = {"model_type": "gpt_neox", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4}
NEOX |= {"num_attention_heads": 4, "intermediate_size": 48, "rotary_pct": 1.0, "max_position_embeddings": 64}
NEOX |= {"use_parallel_residual": False}
MPT = {"model_type": "mpt", "vocab_size": 60, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64}
MPT |= {"learned_pos_emb": False, "use_cache": True}
MPT_1B = MPT | {"model_type": "hfvlm_flamingo_mpt", "attn_config": {"qk_ln": True}}
LLAMA = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE, END, PADDING = 58, 57, 59
SIZES = {"image_token_id": IMAGE, "eos_token_id": END, "pad_token_id": PADDING, "cross_attention_interval": 2}
SIZES |= {"cross_attention_heads": 2, "cross_attention_head_dim": 8, "initializer_range": 0.1}


def config_on(text):
    return HfvlmFlamingoConfig(vision_config=VISION, resampler_config=RESAMPLER, text_config=text, **SIZES)


def opened(model):
    """With gates that are not closed, as they are before training."""
    with torch.no_grad():
        for gate in (module for module in model.modules() if isinstance(module, Gate)):
            gate.weight.fill_(0.7)
    return model.eval()


def tiny(text=None):
    torch.manual_seed(0)
    return opened(HfvlmFlamingoForConditionalGeneration(config_on(text or NEOX)))


class TestFlamingo(GenerationSuite, ModelSuite):
    """On a GPT-NeoX, as RedPajama is."""

    model_class, auto_class = HfvlmFlamingoForConditionalGeneration, AutoModelForImageTextToText
    lora_layers = ["attention.q_proj", "attention.v_proj", "query_key_value", "dense"]
    text = NEOX

    @pytest.fixture
    def shallow(self, model):
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls):
        return tiny(cls.text)

    def config(self):
        return config_on(self.text)

    def inputs(self):
        ids = torch.tensor([[5, IMAGE, 7, 8, 9], [IMAGE, 6, 3, 2, 4], [9, IMAGE, 9, 8, 7]])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
        }

    def loss_inputs(self):
        ids = self.inputs()["input_ids"]
        return {"labels": ids.masked_fill(ids == IMAGE, -100)}


class TestOnMPT(TestFlamingo):
    """Whose output layer is its table of words."""

    test_compiles_as_one_graph = None  # MPT is transformers'
    # Its attention is its own alone, and cuts its biases by lengths that are not known to a graph.
    test_attention_implementations_of_tower_and_language_model = None
    test_decoding_compiles_as_one_graph = None
    lora_layers = ["attention.q_proj", "attention.v_proj", "Wqkv", "up_proj"]
    text = MPT


class TestResampler(PartSuite):
    model_class, auto_class = HfvlmFlamingoResampler, AutoModel

    def config(self):
        return HfvlmFlamingoResamplerConfig(**RESAMPLER)

    def inputs(self):
        return {"patches": torch.randn(3, 7, 32)}


class TestMPT1B(ModelSuite):
    test_compiles_as_one_graph = None  # what it adds to the language model is exported
    model_class, auto_class = HfvlmFlamingoMPTForCausalLM, AutoModelForCausalLM
    lora_layers = ["attn.q_proj", "attn.v_proj"]

    def config(self):
        return HfvlmFlamingoMPTConfig(
            **{name: value for name, value in MPT_1B.items() if name != "model_type"} | {"use_cache": False}
        )

    def inputs(self):
        ids = torch.tensor([[5, 1, 7, 8, 9], [6, 6, 3, 2, 4]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def loss_inputs(self):
        return {"labels": self.inputs()["input_ids"]}


# Who sees what


@pytest.fixture(scope="module")
def model():
    return tiny()


def logits(model, ids, pixels, **inputs):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), pixel_values=pixels, **inputs).logits


def changed(left, right):
    """The columns in which two batches of logits differ."""
    return ((left - right).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist()


def test_a_token_attends_to_the_last_image_before_it(model):
    """Through the language model, earlier images change later tokens, too."""
    ids, pixels = [[3, 4, IMAGE, 5, 6, END, IMAGE, 7, 8]], torch.randn(2, 3, 28, 28)
    before = logits(model, ids, pixels)
    assert changed(before, logits(model, ids, torch.stack([pixels[0], pixels[1] + 1]))) == [6, 7, 8]
    assert changed(before, logits(model, ids, torch.stack([pixels[0] + 1, pixels[1]]))) == [2, 3, 4, 5, 6, 7, 8]
    masks = []
    handle = model.gates["1"].attention.register_forward_hook(lambda _, args, out: masks.append(args[2][0, 0]))
    logits(model, ids, pixels)
    handle.remove()
    seen = (masks[0] == 0).unflatten(1, (2, 5))
    assert seen.all(dim=2)[2:].tolist() == [[True, False]] * 4 + [[False, True]] * 3


def test_before_any_image_only_the_feed_forward_runs(model):
    ids = [[3, 4, 5, IMAGE, 6]]
    alone = logits(model, [[3, 4, 5]], None)
    close(logits(model, ids, torch.randn(1, 3, 28, 28))[:, :3], alone, 1e-6, "before the image")
    plain = model.language_model(torch.tensor([[3, 4, 5]])).logits
    assert relative(alone, plain) > 1e-3


def test_closed_gates_change_no_logit():
    model = HfvlmFlamingoForConditionalGeneration(config_on(NEOX)).eval()
    ids = torch.tensor([[3, IMAGE, 5]])
    with torch.no_grad():
        expected = model.language_model(ids).logits
        close(model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits, expected, 0.0, "closed")


@pytest.mark.parametrize("text", [NEOX, MPT_1B, LLAMA], ids=["neox", "mpt_1b", "llama"])
def test_rows_with_different_numbers_of_images(text):
    model, pixels = tiny(text), torch.randn(4, 3, 28, 28)
    rows = [[IMAGE, 5, IMAGE, 6, IMAGE, 7], [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, IMAGE, 8]]
    together = logits(model, rows, pixels)
    for i, own in enumerate((pixels[:3], None, pixels[3:])):
        close(logits(model, rows[i : i + 1], own), together[i : i + 1], 1e-5, f"row {i}")
    new = model.generate(torch.tensor(rows), pixel_values=pixels, num_beams=3, **NEW)
    for i, own in enumerate((pixels[:3], None, pixels[3:])):
        alone = model.generate(
            torch.tensor(rows[i : i + 1]), **({} if own is None else {"pixel_values": own}), num_beams=3, **NEW
        )
        assert torch.equal(alone[0], new[i]), i


def test_few_shot_prompts_of_different_lengths_padded_on_the_left(model):
    pixels = torch.randn(3, 3, 28, 28)
    long, short = [IMAGE, 5, 6, END, IMAGE, 5], [IMAGE, 9]
    ids = torch.tensor([long, [PADDING] * 4 + short])
    mask = (ids != PADDING).long()
    together = model.generate(ids, attention_mask=mask, pixel_values=pixels, **NEW)
    first = model.generate(torch.tensor([long]), pixel_values=pixels[:2], **NEW)
    second = model.generate(torch.tensor([short]), pixel_values=pixels[2:], **NEW)
    assert torch.equal(together[0], first[0])
    assert torch.equal(together[1, 4:], second[0])


def test_frames_are_more_patches_of_one_image(model):
    frames = torch.randn(2, 3, 3, 28, 28)
    features = model.get_image_features(frames).pooler_output
    assert [tuple(rows.shape) for rows in features] == [(5, 32)] * 2
    same = model.get_image_features(frames[:, :1].expand(-1, 3, -1, -1, -1)).pooler_output
    one = model.get_image_features(frames[:, 0]).pooler_output
    assert relative(same[0], one[0]) > 1e-4  # latents, which are attended to as well, weigh less among more patches
    assert relative(features[0], same[0]) > 1e-4
    ids = [[IMAGE, 5], [IMAGE, 6]]
    assert relative(logits(model, ids, frames), logits(model, ids, frames[:, 0])) > 1e-4


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_frames_have_times(count):
    """Frames beyond the learned embeddings are spread over them, as the paper interpolates."""
    torch.manual_seed(0)
    resampler = HfvlmFlamingoResampler(HfvlmFlamingoResamplerConfig(**RESAMPLER | {"max_num_frames": 4})).eval()
    patches = torch.randn(1, count, 6, 32)
    table = resampler.frame_positions.detach()
    assert table.std() > 0.5
    if count > 4:
        wide = torch.nn.functional.interpolate(table.T[None], size=count, mode="linear", align_corners=True)[0].T
    else:
        wide = table[:count]
    plain = copy.deepcopy(resampler)
    plain.frame_positions = None
    with torch.no_grad():
        expected = plain((patches + wide[:, None]).flatten(1, 2)).last_hidden_state
        close(resampler(patches).last_hidden_state, expected, 1e-5, "times")
        longer = torch.cat([patches, torch.randn(1, 2, 6, 32)], dim=1)
        found = resampler(longer, torch.tensor([count])).last_hidden_state
        close(found, expected, 1e-5, "with frames that are not there")
        assert relative(plain(patches).last_hidden_state, expected) > 1e-3


def with_order(count):
    """A model whose resampler has embeddings of the order of images."""
    torch.manual_seed(0)
    config = config_on(NEOX)
    config.resampler_config.max_num_media = count
    return opened(HfvlmFlamingoForConditionalGeneration(config))


def test_images_have_places_in_their_texts():
    """As OpenFlamingo's `media_time_embs`: one for all patches of a text's first image, one for its second."""
    model, patches = with_order(2), torch.randn(3, 2, 6, 32)
    plain = copy.deepcopy(model.resampler)
    plain.media_positions = None
    table = model.resampler.media_positions.detach()
    with torch.no_grad():
        expected = plain(patches + table[[1, 0, 1], None, None]).last_hidden_state
        found = model.resampler(patches, media_order=torch.tensor([1, 0, 1])).last_hidden_state
    close(found, expected, 1e-6, "places")
    for order, message in ((None, "not none"), (torch.tensor([0, 1]), "of 3, not 2")):
        with pytest.raises(ValueError, match=message):
            model.resampler(patches, media_order=order)
    with pytest.raises(ValueError, match="A text has 3 images; the resampler has embeddings for 2"):
        model.resampler(patches, media_order=torch.tensor([0, 1, 2]))


def test_the_order_of_images_is_counted_in_each_text():
    model, pixels = with_order(3), torch.randn(4, 3, 28, 28)
    rows = [[PADDING, IMAGE, 5, IMAGE, 6, 7], [IMAGE, 3, 4, 5, IMAGE, 8]]
    ids, mask = torch.tensor(rows), torch.tensor(rows) != PADDING
    together = logits(model, rows, pixels, attention_mask=mask)
    orders = [model.get_image_features(pixels, media_order=torch.tensor(order)) for order in ([0, 1, 0, 1], [0] * 4)]
    with torch.no_grad():
        given, same = (
            model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": o}).logits for o in orders
        )
    assert torch.equal(together, given)
    assert relative(together, same) > 1e-3
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, pixel_values=pixels, attention_mask=mask)[0]
        close(model.get_output_embeddings()(hidden), together, 1e-6, "without the output layer")
    new = model.generate(ids, pixel_values=pixels, attention_mask=mask, num_beams=2, **NEW)
    by_hand = model.generate(ids, mm_encoder_outputs={"image": orders[0]}, attention_mask=mask, num_beams=2, **NEW)
    assert torch.equal(new, by_hand)
    whole = logits(model, [rows[1]], pixels[2:])
    with torch.no_grad():
        output = model(input_ids=ids[1:, :3], pixel_values=pixels[2:3], use_cache=True)
        rest = model(input_ids=ids[1:, 3:], pixel_values=pixels[3:], cache=cache_of(output), use_cache=True)
        output = model(input_ids=ids[1:, :3], pixel_values=pixels[2:3], use_cache=True)
        continued = model.generate(ids[1:], pixel_values=pixels[3:], **with_cache(cache_of(output)), **NEW)
    close(rest.logits, whole[:, 3:], 1e-5, "in two parts")
    assert torch.equal(continued, model.generate(ids[1:], pixel_values=pixels[2:], **NEW))


OTHERS = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    "gptj": {"rotary_dim": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 2},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "hfvlm_flamingo_mpt": {"expansion_ratio": 3},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_language_models(kind, tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = tiny(sizes | OTHERS[kind] | {"model_type": kind})
    ids, pixels = [[3, 4, IMAGE, 5, 6, END, IMAGE, 7, 8]], torch.randn(2, 3, 28, 28)
    before = logits(model, ids, pixels)
    assert changed(before, logits(model, ids, torch.stack([pixels[0], pixels[1] + 1]))) == [6, 7, 8]
    cached, whole = (
        model.generate(torch.tensor(ids), pixel_values=pixels, use_cache=use, **NEW) for use in (True, False)
    )
    assert torch.equal(cached, whole)
    model.save_pretrained(tmp_path)
    close(logits(AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), ids, pixels), before, 0.0, "saved")
    if kind == "hfvlm_flamingo_mpt":
        block = model.language_model.transformer.blocks[0].layer
        assert block.ffn.up_proj.out_features == 3 * 32
        assert hasattr(block.attn.Wqkv, "weight")  # without qk_ln its attention is MPT's


def test_a_model_begins_from_a_tower_and_a_language_model(tmp_path):
    from tests.models.flamingo.tiny import PIECES, opt_vocabulary

    torch.manual_seed(0)
    tokenizer = HfvlmFlamingoTokenizer.from_vocabulary(opt_vocabulary(tmp_path))
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    language = OPTForCausalLM(OPTConfig(vocab_size=PIECES + 3, word_embed_proj_dim=32, **sizes)).eval()
    tower = tiny().vision_model
    ids = torch.tensor([[2, 9, 11]])
    with torch.no_grad():
        expected = language(ids).logits
    model = HfvlmFlamingoForConditionalGeneration.from_towers(
        tower, language, tokenizer, resampler_config=RESAMPLER, cross_attention_interval=2
    ).eval()
    close(logits(model, ids.tolist(), None)[..., : PIECES + 3], expected, 1e-6, "as before")
    assert model.config.text_config.vocab_size == len(tokenizer) == PIECES + 5
    assert (model.config.image_token_id, model.config.pad_token_id) == (PIECES + 4, 1)
    for name, value in tower.state_dict().items():
        close(model.vision_model.state_dict()[name], value, 0.0, name)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    close(logits(loaded, ids.tolist(), None), logits(model, ids.tolist(), None), 0.0, "saved")


# What a cache remembers


def test_images_stay_with_the_cache(model):
    ids, pixels = torch.tensor([[IMAGE, 5, 6, IMAGE, 7, 8, 9]]), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels).logits
        output = model(input_ids=ids[:, :5], pixel_values=pixels, use_cache=True)
        rest = model(input_ids=ids[:, 5:], cache=cache_of(output), use_cache=True)
    close(torch.cat([output.logits, rest.logits], dim=1), whole, 1e-5, "several tokens at once")


def test_images_may_follow_in_a_later_part(model):
    ids, pixels = torch.tensor([[IMAGE, 5, 6, IMAGE, 7, 8], [3, 4, IMAGE, 6, 5, 9]]), torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels).logits
        output = model(input_ids=ids[:, :3], pixel_values=pixels[[0, 2]], use_cache=True)
        rest = model(input_ids=ids[:, 3:], pixel_values=pixels[1:2], cache=cache_of(output), use_cache=True)
    close(torch.cat([output.logits, rest.logits], dim=1), whole, 1e-5, "in two parts")


def test_images_cropped_from_a_cache_are_not_attended_to(model):
    pixels = torch.randn(2, 3, 28, 28)
    ids, tail = torch.tensor([[IMAGE, 5, 6, IMAGE, 7]]), torch.tensor([[8, 9, 4]])
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, pixel_values=pixels, use_cache=True))
        cache.crop(-2)
        steps = [model(input_ids=tail[:, i : i + 1], cache=cache).logits for i in range(3)]
        found = torch.cat(steps, dim=1)
        expected = model(input_ids=torch.cat([ids[:, :3], tail], 1), pixel_values=pixels[:1]).logits[:, 3:]
    close(found, expected, 1e-5, "after the first image")


def test_a_cached_prompt_serves_several_answers(model):
    prompt, pixels = torch.tensor([[IMAGE, 5, END, IMAGE, 6]]), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        output = model(input_ids=prompt, pixel_values=pixels, use_cache=True)
        for answer in ([7, 8, 9], [4]):
            ids = torch.tensor([answer])
            found = model(input_ids=ids, cache=copy.deepcopy(cache_of(output))).logits
            whole = model(input_ids=torch.cat([prompt, ids], dim=1), pixel_values=pixels).logits
            close(found, whole[:, prompt.shape[1] :], 1e-5, str(answer))


def test_cached_media_come_before_the_text(model):
    ids, pixels = torch.tensor([[IMAGE, 5, IMAGE], [3, IMAGE, 4]]), torch.randn(3, 3, 28, 28)
    tail = torch.tensor([[7, 8], [7, 8]])
    with torch.no_grad():
        found = model(input_ids=tail, cache=model.cache_media(ids, pixels)).logits
        for i, last in enumerate((1, 2)):
            cached = model.cache_media(torch.tensor([[IMAGE]]), pixels[last : last + 1])
            alone = model(input_ids=tail[i : i + 1], cache=cached).logits
            close(found[i : i + 1], alone, 1e-5, f"row {i}")
    assert relative(found[0], found[1]) > 1e-4


def test_keys_of_images_are_computed_once(model):
    calls = []
    handle = model.gates["3"].attention.k_proj.register_forward_hook(lambda *_: calls.append(1))
    model.generate(torch.tensor([[IMAGE, 5, 6]]), pixel_values=torch.randn(1, 3, 28, 28), num_beams=2, **NEW)
    handle.remove()
    assert len(calls) == 1


def test_no_image_token_is_generated(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[IMAGE] = 100 * head.mean(dim=0).sign()
    new = model.generate(torch.tensor([[IMAGE, 5, 6]]), pixel_values=torch.randn(1, 3, 28, 28), **NEW)
    assert IMAGE not in new[0, 3:]


def test_texts_end_where_chunks_do(model, tmp_path):
    assert model.generation_config.eos_token_id == END
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (END, PADDING)


# Training


def test_the_parts_that_the_authors_train():
    model = tiny()
    model.freeze_pretrained()
    ids = torch.tensor([[IMAGE, 5, 6, END]])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(
        input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28), labels=ids.masked_fill(ids == IMAGE, -100)
    ).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"resampler", "gates", "language_model"}
    words = "language_model.gpt_neox.embed_in.weight"
    assert {name for name in moved if name.startswith("language_model")} == {words}
    rows = (model.state_dict()[words] != before[words]).any(dim=1).nonzero().flatten().tolist()
    assert set(rows) <= {IMAGE, END}
    assert IMAGE in rows


@pytest.mark.parametrize("text", [NEOX, MPT, MPT_1B, LLAMA], ids=["neox", "mpt", "mpt_1b", "llama"])
def test_the_recipe_trains_new_layers_in_full_and_adapts_the_language_model(text):
    """Resampler and gates are trained in full, the language model adapted, the tower frozen."""
    tuned = lora(tiny(text), quiet=True)
    adapted = {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in tuned.named_parameters() if "lora_A" in name
    }
    assert len(adapted & {"q_proj", "v_proj", "Wqkv", "query_key_value"}) > 0
    assert len(adapted & {"down_proj", "dense_4h_to_h"}) == 1
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert not [name for name in names if "vision_model" in name]
    assert all("lora_" in name for name in names if "language_model" in name)
    whole = {
        name.partition(".modules_to_save.")[0].rpartition("model.")[2] for name in names if "modules_to_save" in name
    }
    assert whole == {"resampler", "gates.1", "gates.3"}
    ids = torch.tensor([[IMAGE, 5, 6, END]])
    loss = tuned(
        input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28), labels=ids.masked_fill(ids == IMAGE, -100)
    ).loss
    loss.backward()
    dead = [name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None]
    assert dead == []
    gates = [p.grad for name, p in tuned.named_parameters() if "modules_to_save" in name and "gate.weight" in name]
    assert len(gates) == 4
    assert all(grad.abs().max() > 0 for grad in gates)


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resampler_config": RESAMPLER | {"hidden_size": 16}}, "hidden_size 16 is not vision_config.hidden_size 32"),
        ({"cross_attention_interval": 5}, r"cross_attention_interval 5 is not in 1..4"),
        ({"image_token_id": 60}, "image_token_id 60 .* need rows"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        HfvlmFlamingoConfig(
            **{"vision_config": VISION, "resampler_config": RESAMPLER, "text_config": NEOX} | SIZES | changes
        )


@pytest.mark.parametrize("text", [NEOX, LLAMA])
def test_plans_for_several_devices_name_existing_modules(text):
    model = tiny(text)
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    assert any(".layers.*.layer." in name for name in model._tp_plan)
    assert set(model._tp_plan) <= names
    inner = model.language_model
    assert {f"language_model.{name}" for name in inner._tp_plan} == set(model._tp_plan)
    assert set(inner.base_model._tp_plan) <= {name.partition(".")[2].partition(".")[2] for name in names}
