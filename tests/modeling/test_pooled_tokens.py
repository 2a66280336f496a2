"""Embeddings are those of towers that compute all tokens; the last layer computes only what is pooled."""

import pytest
import torch
from transformers import AutoModel

from hfvlm.modeling import text
from hfvlm.modeling.base import unit
from hfvlm.modeling.text import length_buckets
from hfvlm.modules.transformer import PostNormLayer, PreNormLayer
from hfvlm.presets import load_preset
from hfvlm.registry import architectures

ROWS, LENGTH, SHORT = 3, 9, 5
# What towers with one pooled token embed; the others' outputs are made of all tokens, or they are no transformers.
POOLED = {
    "align": ("text",),
    "blip": ("image",),
    "clip": ("image", "text"),
    "coca": ("text",),
    "filip": (),
    "flava": ("image", "text"),
    "imagebind": ("image", "text", "audio", "depth", "thermal", "imu"),
    "languagebind": ("image", "video", "text", "audio", "depth", "thermal"),
    "mammut": (),
    "siglip": ("text",),
    "wukong": (),
}
CASES = [(name, modality, "sdpa") for name, modalities in POOLED.items() for modality in modalities]
CASES += [("clip", modality, kind) for modality in ("image", "text") for kind in ("eager", "flex_attention")]


def tiny(name):
    torch.manual_seed(0)
    model = AutoModel.from_config(load_preset(f"{name}/tiny").make_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough to matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs_of(tower, modality, left=False):
    """A batch for a tower; texts of different lengths, padded on one side."""
    config = tower.config
    generator = torch.Generator().manual_seed(1)
    if modality == "text":
        ids = torch.randint(5, 60, (ROWS, LENGTH), generator=generator)
        end = getattr(config, "eos_token_id", None)
        ids[:, SHORT - 1] = 61 if end is None else end
        mask = (torch.arange(LENGTH) < SHORT).long().expand(ROWS, -1).clone()
        ids[0], mask[0] = ids[0].roll(LENGTH - SHORT), 1
        ids = ids.masked_fill(mask == 0, getattr(config, "pad_token_id", None) or 0)
        if left:
            ids[1:], mask[1:] = ids[1:].roll(LENGTH - SHORT, dims=1), mask[1:].roll(LENGTH - SHORT, dims=1)
        return {"input_ids": ids, "attention_mask": mask}
    size, channels = getattr(config, "image_size", 64), getattr(config, "num_channels", 1)
    height, width = (size, size) if isinstance(size, int) else size
    shapes = {
        "video": (3, getattr(config, "num_frames", 2), height, width),
        "audio": (channels, getattr(config, "num_mel_bins", height), getattr(config, "num_frames", width)),
        "imu": (6, 2000),
    }
    values = torch.randn(ROWS, *shapes.get(modality, (channels, height, width)), generator=generator)
    return {tower.main_input_name: values} if modality != "video" else {"pixel_values_videos": values}


class Tokens:
    """How many tokens the MLP of each of a tower's layers got."""

    def __init__(self, tower):
        self.counts = []
        for layer in tower.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: self.counts.append(args[0].shape[1]))

    def __call__(self):
        counts, self.counts = self.counts, []
        return counts


def one_in_the_last(counts):
    return counts[-1] == 1 and (len(counts) == 1 or min(counts[:-1]) > 1)


def gradients(tower, embeds, weights):
    tower.zero_grad()
    (embeds * weights).sum().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "modality", "attention"), CASES)
def test_the_last_layer_computes_what_is_pooled(name, modality, attention, uncompiled_flex_attention):
    model = tiny(name)
    model.set_attn_implementation(attention)
    tower = getattr(model, model.towers[modality])
    tokens = Tokens(tower)
    trains = attention != "flex_attention"  # it has no backward pass on CPUs
    for left in (False, True) if modality == "text" else (False,):
        inputs = inputs_of(tower, modality, left)
        with torch.set_grad_enabled(trains):
            expected = getattr(model, f"get_{modality}_features")(**inputs).pooler_output
            assert min(tokens()) > 1
            found = model.embeddings(modality, **inputs)
            assert one_in_the_last(tokens())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if trains:
            weights = torch.randn_like(found)
            whole, ours = (gradients(tower, embeds, weights) for embeds in (expected, found))
            assert ours.keys() == whole.keys()
            for key, gradient in whole.items():
                assert (ours[key] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), key


def pair(model):
    inputs = [inputs_of(getattr(model, model.towers[m]), m) for m in ("image", "text")]
    return inputs[0] | inputs[1]


@pytest.mark.parametrize("name", POOLED)
def test_training_has_the_outputs_of_evaluation(name):
    model = tiny(name)
    pooled = {m for m in model.modalities if getattr(model, model.towers[m]).pools_one_token}
    assert {m for m in pooled if (name, m) != ("imagebind", "video")} == set(POOLED[name])
    expected = model(**pair(model))
    model.training = True  # its towers' dropout and batch norms stay off
    found = model(**pair(model))
    for key in ("image_embeds", "text_embeds", "logits_per_text"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
    for modality, field in (("image", "vision_model_output"), ("text", "text_model_output")):
        tokens = found[field].last_hidden_state
        assert expected[field].last_hidden_state is not None
        assert (tokens is None) == (modality in pooled and not model.needs_tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_computes_one_token_in_the_last_layer(checkpointing):
    model = tiny("clip").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    tokens = [Tokens(model.vision_model), Tokens(model.text_model)]
    loss = model(**pair(model), return_loss=True).loss
    assert all(one_in_the_last(each()) for each in tokens)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_records_are_whole(flag):
    model = tiny("clip").train()
    model.set_attn_implementation("eager")
    batch = pair(model)
    asked = model(**batch, **{flag: True})
    for tower in (model.vision_model, model.text_model):
        setattr(tower.config, flag, True)
    for output in (asked, model(**batch)):
        for tower in (output.vision_model_output, output.text_model_output):
            assert tower.last_hidden_state.shape[1] > 1
            recorded = tower.hidden_states if flag == "output_hidden_states" else tower.attentions
            assert recorded[-1].shape[-2] == tower.last_hidden_state.shape[1] or tower is output.text_model_output
            assert recorded[-1].shape[-2] > 1


def test_a_tower_returns_all_tokens_and_a_classifier_needs_one():
    clip = architectures()["clip"]
    model = tiny("clip")
    inputs = inputs_of(model.vision_model, "image")
    assert model.train().vision_model(**inputs).last_hidden_state.shape[1] > 1
    classifier = clip.HfvlmCLIPForImageClassification(model.config).eval()
    tokens = Tokens(classifier.vision_model)
    found = classifier(**inputs).logits
    assert one_in_the_last(tokens())
    whole = classifier(**inputs, output_hidden_states=True)
    assert min(tokens()) > 1
    assert len(whole.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    torch.testing.assert_close(found, whole.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [PreNormLayer, PostNormLayer])
def test_layers_at_some_tokens(kind):
    config = load_preset("align/tiny").make_config().text_config
    layer, x = kind(config).eval(), torch.randn(2, 5, config.hidden_size)
    torch.testing.assert_close(layer(x[:, 2:4], None, x), layer(x)[:, 2:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lengths", "size", "expected"), [
    ([5, 3, 5, 9, 3], 1, [[1, 4], [0, 2], [3]]),
    ([5, 3, 5, 9, 3], 7, [[0, 1, 2, 4], [3]]),
    ([5, 3, 5, 9, 3], 100, [[0, 1, 2, 3, 4]]),
    ([2], 1, [[0]]),
])  # fmt: skip
def test_buckets_of_length(lengths, size, expected):
    assert length_buckets(lengths, size) == expected


@pytest.mark.parametrize("name", ["clip", "imagebind", "languagebind"])
def test_texts_cost_their_own_length(name, monkeypatch):
    model = tiny(name)
    inputs = inputs_of(model.text_model, "text")
    read = []
    model.text_model.layers[0].register_forward_hook(lambda module, args, output: read.append(args[0].shape[:2]))
    whole = model.text_model(**inputs).embeds
    sizes = {1: [(2, SHORT), (1, LENGTH)], 1000: [(3, LENGTH)]}
    assert read == sizes[1000]
    for size, expected in sizes.items():
        monkeypatch.setattr(text, "bucket_size", lambda device, size=size: size)
        for given in (inputs, {"input_ids": inputs["input_ids"]}):
            read.clear()
            embeds = model.embeddings("text", **given)
            assert read == expected
            torch.testing.assert_close(unit(embeds), unit(whole), rtol=1e-5, atol=1e-5)
    read.clear()
    monkeypatch.setattr(text, "bucket_size", lambda device: 1)
    found = model.get_text_features(**inputs)
    torch.testing.assert_close(unit(found.pooler_output), unit(whole), rtol=1e-5, atol=1e-5)
    tokens = model.text_model(**inputs).last_hidden_state
    if name == "clip":
        assert read[:2] == sizes[1]
        tokens = tokens * inputs["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(found.last_hidden_state, tokens, rtol=1e-4, atol=1e-4)


TEMPLATES = ((7, 8, 9, None, 61), (7, 8, None, None, 61), (7, None, 8, 9, 61))


def prompts(config, generator):
    """Texts of templates with names of one or two tokens, two of them equal, padded on the right."""
    end, pad = (61 if (x := getattr(config, name)) is None else x for name in ("eos_token_id", "pad_token_id"))
    ids = torch.full((8 * len(TEMPLATES), LENGTH), pad)
    for row, template in enumerate(TEMPLATES * 8):
        text = [int(torch.randint(10, 60, (), generator=generator)) if x is None else x for x in template]
        ids[row, : len(text)] = torch.tensor([*text[:-1], end])
    ids[-1] = ids[2]
    return ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["clip", "imagebind", "coca"])
def test_what_texts_begin_with_is_computed_once(name, attention, monkeypatch):
    monkeypatch.setattr(text, "bucket_size", lambda device: 100)
    model = tiny(name)
    model.set_attn_implementation(attention)
    tower = model.text_model
    ids = prompts(tower.config, torch.Generator().manual_seed(1))
    if name == "coca":
        ids[3, 2] = tower.config.pad_token_id  # also a piece of words
    given = {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < 5).long().expand(len(ids), -1)}
    nodes = len({tuple(row[: n + 1]) for row in ids[:, :5].tolist() for n in range(5)})
    if name == "coca":  # the original lets a text see the first padding after it; and the class token
        nodes += 2 * len({tuple(row) for row in ids.tolist()})
    expected = model.get_text_features(**given, output_hidden_states=True).pooler_output
    read = []
    tower.layers[0].register_forward_hook(lambda module, args, output: read.append(args[0].shape[:2]))
    weights = torch.randn_like(expected)
    whole = gradients(tower, expected, weights)
    for inputs in (given, {"input_ids": ids}):
        found = model.embeddings("text", **inputs)
        assert read.pop() == (1, nodes)
        torch.testing.assert_close(unit(found), unit(expected), rtol=1e-5, atol=1e-5)
        for key, gradient in gradients(tower, found, weights).items():
            assert (gradient - whole[key]).abs().max() <= 1e-5 * max(1, whole[key].abs().max()), key
    # What pays is tokens of rows where few are alike, where padding comes first, and where dropout differs.
    if name != "coca":
        left = given["attention_mask"].roll(LENGTH - 5, dims=1)
        found = model.embeddings("text", input_ids=ids.roll(LENGTH - 5, dims=1), attention_mask=left)
        torch.testing.assert_close(unit(found), unit(expected), rtol=1e-5, atol=1e-5)
        assert read.pop() == (len(ids), LENGTH)
        different = torch.randint(10, 60, (24, LENGTH), generator=torch.Generator().manual_seed(2))
        model.embeddings("text", input_ids=different.index_fill(1, torch.tensor([LENGTH - 1]), 61))
        assert read.pop() == (24, LENGTH)
        tower.train()
        tower.config.attention_dropout = 0.5
        model.embeddings("text", **given)
        assert read.pop() == (len(ids), 5)


@pytest.mark.parametrize("name", ["align", "flava"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_of_all_texts_is_not_read(name, left, monkeypatch):
    model = tiny(name)
    inputs = inputs_of(model.text_model, "text", left)
    tower, mask = model.text_model, inputs["attention_mask"]
    read = []
    tower.layers[0].register_forward_hook(lambda module, args, output: read.append(args[0].shape[:2]))
    whole = tower(**inputs)
    tokens = whole.last_hidden_state * mask.unsqueeze(-1)
    short = {key: value[1:] for key, value in inputs.items()}
    for given, rows, size, expected in (
        (inputs, slice(None), 1000, [(3, LENGTH)]),
        (inputs, slice(None), 1, [(3, LENGTH)] if left else [(2, SHORT), (1, LENGTH)]),
        (short, slice(1, None), 1000, [(2, SHORT)]),
    ):
        monkeypatch.setattr(text, "bucket_size", lambda device, size=size: size)
        read.clear()
        found = model.get_text_features(**given)
        assert read == expected
        torch.testing.assert_close(found.pooler_output, whole.embeds[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.last_hidden_state, tokens[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.embeddings("text", **given), whole.embeds[rows], rtol=1e-5, atol=1e-5)
    read.clear()
    recorded = model.get_text_features(**short, output_hidden_states=True)
    assert read == [(2, LENGTH)]
    assert recorded.hidden_states[-1].shape[1] == LENGTH


def test_processes_of_one_batch_read_in_one_pass(monkeypatch):
    assert text.bucket_size(torch.device("cpu")) < text.bucket_size(torch.device("cuda"))
    monkeypatch.setattr(text, "rank_and_size", lambda group: (0, 2))
    assert len(length_buckets([1, 1000000], text.bucket_size(torch.device("cpu")))) == 1
