import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.dalle_mini import (
    CONVERSION,
    DVAE_OPTIONS,
    MIN_DALLE_OPTIONS,
    OPTIONS,
    config_from_original,
    dvae_rows,
    min_dalle_rows,
)
from hfvlm.conversion.vqgan import VQGAN_OPTIONS, vqgan_rows
from hfvlm.modeling.image_codecs import seamless
from hfvlm.modeling.text_to_image import guided
from hfvlm.models.dalle_mini import HfvlmDALLEMiniTokenizer
from hfvlm.models.dalle_mini.text_normalization import Words, normalized
from hfvlm.modules.context import Context
from tests.originals.common import converted, fitting
from tests.support.golden import Golden, Recorder, read_key_list, stem_of
from tests.support.shapes import shapes_of

RUN = ("name", "condition_scale", "top_k", "top_p", "temperature", "min_length", "prng_key", "do_sample")
MIN_RUN = ("name", "image_count", "temperature", "top_k", "supercondition_factor", "seed")


def compare(golden: Golden) -> None:
    state = golden.state_dict
    kinds = {"lm_head.kernel": flax, "encoder.blocks.input.w": dvae, "decoder.lm_head.weight": min_dalle}
    run = next((run for key, run in kinds.items() if key in state), vqgan)
    (texts if "texts" in golden.case else run)(golden)


def model_of(golden: Golden, state, layout="flax"):
    config = config_from_original(golden.case, state)
    return converted("dalle_mini", state, config, layout)


def flat_names(state):
    """Names of Flax's parameters as its files have them."""
    return {key.replace(".", "/"): tensor for key, tensor in state.items()}


def flax(golden: Golden) -> None:
    golden.check(config=OPTIONS)
    for run in golden.case.get("runs", []):
        assert set(run) <= set(RUN), set(run) - set(RUN)
    model = model_of(golden, flat_names(golden.state_dict))
    if "runs" in golden.case:
        flax_generation(golden, model)
        return
    inputs = golden.inputs
    labels, ids = inputs["labels"].long(), inputs["input_ids"].long()
    decoder_ids = inputs["decoder_input_ids"].long() if "decoder_input_ids" in inputs else None
    start = model.config.decoder_config.bos_token_id
    if decoder_ids is not None:
        assert torch.equal(decoder_ids, F.pad(labels, (1, 0), value=start)[:, :-1])
    model.set_attn_implementation("eager")
    mask = golden.mask().long()
    if "grad_norms" in golden.outputs:
        flax_gradients(golden, model, ids, mask, labels)
    with torch.no_grad():
        output = model(ids, mask, labels=labels, output_hidden_states=True, output_attentions=True)
    text, decoder = output.text_model_output, output.decoder_output
    values = {"logits": output.logits, "loss": output.loss.reshape(1)}
    values["encoder_last_hidden_state"] = text.last_hidden_state
    for half, part in (("encoder", text), ("decoder", decoder)):
        values |= {f"{half}_hidden_{i}": states for i, states in enumerate(part.hidden_states)}
        values |= {f"{half}_attention_{i}": weights for i, weights in enumerate(part.attentions)}
    values |= {f"cross_attention_{i}": weights for i, weights in enumerate(decoder.cross_attentions)}
    # Neither implementation changes anything.
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        golden.compare("logits", model(ids, mask, labels=labels).logits)
    for name in golden.in_order():
        if name in values:
            golden.compare(name, values[name])


def flax_gradients(golden: Golden, model, ids, mask, labels) -> None:
    """The gradients of our parameters, in the layout of the original's."""
    model.zero_grad()
    model(ids, mask, labels=labels).loss.backward()
    state = flat_names(golden.state_dict)
    rows = CONVERSION.keys_for(model.config, "flax", state)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {}
    for name in golden.case["grad_norms_order"]:
        key = name.replace(".", "/")
        row = next(row for row in rows if row.source == key)
        targets = row.target if isinstance(row.target, tuple) else (row.target,)
        parts = [grads[target] for target in targets]
        flat = parts[0] if len(parts) == 1 else torch.stack(parts)
        theirs[name] = flat.mT if key.endswith("kernel") else flat
    golden.compare("grad_norms", torch.stack([grad.norm() for grad in theirs.values()]))
    for name in golden.case["gradients"]:
        golden.compare(f"grad.{name}", theirs[name])


def flax_generation(golden: Golden, model) -> None:
    inputs = golden.inputs
    ids, mask = inputs["input_ids"].long(), golden.mask().long()
    other, other_mask = (inputs.get(name) for name in ("input_ids_uncond", "attention_mask_uncond"))
    codes = model.config.decoder_config
    for run in golden.case["runs"]:
        scale = run.get("condition_scale", 1.0)
        options = {
            "top_k": 50,
            **{n: run[n] for n in ("top_k", "top_p", "temperature", "min_length") if run.get(n) is not None},
        }
        noise = inputs[f"{run['name']}.gumbel"]
        found = model.generate(
            ids,
            mask,
            guidance_scale=scale,
            negative_prompt_ids=None if other is None else other.long(),
            negative_prompt_attention_mask=None if other_mask is None else other_mask.long(),
            noise=noise,
            max_length=golden.case["config"].get("max_length", codes.max_position_embeddings + 1),
            **options,
        )
        expected = golden.outputs[f"{run['name']}.sequences"].long()
        found = F.pad(found, (0, expected.shape[1] - found.shape[1]), value=codes.pad_token_id)
        golden.compare(f"{run['name']}.sequences", found)
        logits = guided_logits(model, ids, mask, other, other_mask, scale, expected[:, :-1])
        golden.compare(
            f"{run['name']}.guided_logits",
            logits.transpose(0, 1)[: len(golden.outputs[f"{run['name']}.guided_logits"])],
        )
        warpers = LogitsProcessorList()
        if run.get("min_length") is not None:
            warpers.append(MinLengthLogitsProcessor(run["min_length"], codes.eos_token_id, device="cpu"))
        warpers.append(TemperatureLogitsWarper(float(options.get("temperature", 1.0))))
        if options["top_k"]:
            warpers.append(TopKLogitsWarper(options["top_k"]))
        if options.get("top_p", 1.0) < 1:
            warpers.append(TopPLogitsWarper(options["top_p"]))
        warped = torch.stack([warpers(expected[:, : i + 1], logits[:, i]) for i in range(logits.shape[1])])
        stored = golden.outputs[f"{run['name']}.allowed"]
        golden.compare(f"{run['name']}.allowed", warped.isfinite()[: len(stored)])
        golden.compare(f"{run['name']}.warped_step0", warped[0].masked_fill(warped[0].isinf(), 0))


@torch.no_grad()
def guided_logits(model, ids, mask, other, other_mask, scale, decoder_ids):
    context = model.read(ids, mask)
    if scale != 1:
        other = model.empty_texts(ids) if other is None else other.long()
        context = guided(context, model.read(other, None if other_mask is None else other_mask.long()), scale)
    return model.image_decoder(decoder_ids, context=context).logits


def min_dalle(golden: Golden) -> None:
    golden.check(config=MIN_DALLE_OPTIONS)
    model = model_of(golden, golden.state_dict, "min-dalle")
    ids = golden.inputs["text_tokens"].long()
    mask = (ids != model.config.text_config.pad_token_id).long()
    if "runs" in golden.case:
        min_dalle_sampling(golden, model, ids)
        return
    paths = {
        "encoder_embedding_ln": "text_model.embeddings",
        "encoder_layer0_self_attn": "text_model.layers.0.attention",
        "encoder_layer0_glu": "text_model.layers.0.mlp",
        "encoder_layer0": "text_model.layers.0",
        "decoder_embedding_ln": "image_decoder.embeddings",
        "decoder_layer0_self_attn": "image_decoder.layers.0.attention",
        "decoder_layer0": "image_decoder.layers.0",
        "decoder_final_ln": "image_decoder.final_norm",
    }
    given = golden.inputs["image_tokens"].long()
    with torch.no_grad(), Recorder(model, list(paths.values())) as seen:
        text = model.text_model(ids, mask).last_hidden_state
        given = given.repeat(2, 1)
        rows = torch.tensor([0, 1]).repeat_interleave(len(given) // 2)
        context = Context(text[rows], mask[rows])
        logits = model.image_decoder(given, context=context).logits
        values = {name: seen[path] for name, path in paths.items()}
    values |= {"encoder_state": text, "logits": logits, "logits_cached": stepwise(model, given, context)}
    count, steps = len(golden.outputs["greedy"]), golden.case["new_tokens"]
    values["greedy"] = model.generate(
        ids[1:].repeat(count, 1),
        negative_prompt_ids=ids[:1].repeat(count, 1),
        guidance_scale=golden.case["supercondition_factor"],
        do_sample=False,
        max_new_tokens=steps,
    )[:, 1:]
    for name in golden.in_order():
        golden.compare(name, values[name])


@torch.no_grad()
def stepwise(model, ids, context):
    context, cache, found = context.for_reuse(), None, []
    for i in range(ids.shape[1]):
        output = model.image_decoder(ids[:, i : i + 1], context=context, cache=cache, use_cache=True)
        cache = output.get("cache", output.get("past_key_values"))
        found.append(output.logits)
    return torch.cat(found, dim=1)


def min_dalle_sampling(golden: Golden, model, ids) -> None:
    with torch.no_grad():
        golden.compare("encoder_state", model.text_model(ids).last_hidden_state)
    for run in golden.case["runs"]:
        assert set(run) <= set(MIN_RUN), set(run) - set(MIN_RUN)
        name, n, scale = run["name"], run["image_count"], run["supercondition_factor"]
        noise = -golden.inputs[f"{name}.exponential"].log()
        expected = golden.outputs[f"{name}.tokens"].long()
        text, other = ids[1:].repeat(n, 1), ids[:1].repeat(n, 1)
        found = model.generate(
            text,
            negative_prompt_ids=other,
            guidance_scale=scale,
            noise=noise,
            temperature=float(run["temperature"]),
            top_k=run["top_k"],
            max_new_tokens=golden.case["steps"],
        )
        golden.compare(f"{name}.tokens", found[:, 1:])
        path = torch.cat([found[:, :1], expected[:, :-1]], dim=1)
        both = torch.cat([other, text])
        with torch.no_grad():
            logits = model(both, decoder_input_ids=path.repeat(2, 1)).logits
        golden.compare(f"{name}.logits", logits.transpose(0, 1))
        weights = guided_logits(model, text, None, other, None, scale, path)
        kept = TopKLogitsWarper(run["top_k"])(None, weights.flatten(0, 1)).unflatten(0, weights.shape[:2])
        kept = ((kept - kept.amax(-1, keepdim=True)) / run["temperature"]).exp()
        golden.compare(f"{name}.weights", kept.transpose(0, 1))


def vqgan(golden: Golden) -> None:
    golden.check(config=VQGAN_OPTIONS)
    state = golden.state_dict
    state = flat_names(state) if "post_quant_conv.kernel" in state else state
    model = model_of(golden, state)
    if "encoder" not in golden.outputs:
        detokenizer(golden, model)
        return
    pixels = next(t for t in golden.inputs.values() if t.ndim == 4).permute(0, 3, 1, 2)
    with torch.no_grad(), Recorder(model, ["encoder"]) as seen:
        output = model.encode(pixels)
    channels, stride = golden.case["channel_stride"], golden.case["stride"]
    last = lambda tensor: tensor.permute(0, 2, 3, 1)  # noqa: E731
    golden.compare("encoder", last(seen["encoder"])[..., ::channels])
    golden.compare("z", last(output.latents)[..., ::channels])
    codes = golden.outputs["indices"].long()
    found = output.codes.flatten(1)
    margin = golden.outputs["margin"]
    golden.compare("indices", found, margin > 1e-4 * margin.abs().max())
    quantized = model.codes(codes.view_as(output.codes))
    golden.compare("quantized", quantized[..., ::channels])
    z, table = last(output.latents).flatten(0, 2), model.codes.weight
    nearest = (
        (z.double().unsqueeze(1) - table.double()).square().sum(-1)
        if len(table) < 1000
        else torch.cdist(z.double(), table.double()).square()
    )
    two = nearest.topk(2, largest=False).values
    # A difference of distances, whose rounding is that of these.
    assert ((two[:, 1] - two[:, 0]).view_as(margin) - margin).abs().max() <= 1e-4 * two.max()
    golden.compared.add("margin")
    with torch.no_grad():
        image = last(model.decode(codes))
    golden.compare("decoded", image[:, ::stride, ::stride])
    golden.compare(
        "decoded_mean_std", torch.stack([image.mean(dim=(0, 1, 2)), image.std(dim=(0, 1, 2), correction=0)])
    )


def detokenizer(golden: Golden, model) -> None:
    codes = golden.inputs["image_tokens"].long()
    stride, is_seamless = golden.case["stride"], golden.case.get("is_seamless", False)
    paths = {
        "conv_in": "decoder.stem",
        "mid": "decoder.middle",
        "up4": "decoder.levels.4",
        "up3": "decoder.levels.3",
        "conv_out": "decoder.head",
    }
    with torch.no_grad(), Recorder(model, list(paths.values())) as seen:
        image = model.decode(seamless(codes) if is_seamless else codes).clamp(0, 1) * 255
    golden.compare("conv_in", seen["decoder.stem"][:, ::32])
    golden.compare("mid", seen["decoder.middle"][:, ::32])
    golden.compare("up4", seen["decoder.levels.4"][:, ::64, ::4, ::4])
    golden.compare("up3", seen["decoder.levels.3"][:, ::64, ::8, ::8])
    golden.compare("conv_out", seen["decoder.head"][:, :, ::stride, ::stride])
    edge = round(len(image) ** 0.5)
    # Column by column.
    grid = image.unflatten(0, (edge, edge)).permute(1, 3, 0, 4, 2).flatten(0, 1).flatten(1, 2)
    golden.compare("image", grid[::stride, ::stride])
    golden.compare("image_mean", grid.mean(dim=(0, 1)))
    golden.compare("unclipped_note", torch.stack([(grid == 0).float().mean(), (grid == 255).float().mean()]))


def dvae(golden: Golden) -> None:
    golden.check(config=("encoder", "decoder"), **{f"config__{half}": names for half, names in DVAE_OPTIONS.items()})
    model = model_of(golden, golden.state_dict, "openai")
    pixels, codes = golden.inputs["pixels"], golden.inputs["codes"].long()
    stride, channels = golden.case["stride"], golden.case["channel_stride"]
    with torch.no_grad():
        output = model.encode(pixels)
        golden.compare("z_logits", output.latents[:, ::channels])
        two = output.latents.topk(2, dim=1).values
        golden.compare("z_margin", two[:, 0] - two[:, 1])
        golden.compare("z", output.codes)
        statistics = model.statistics(codes)
    golden.compare("x_stats", statistics[:, :, ::stride, ::stride])
    golden.compare("x_rec", model.pixels(statistics)[:, :, ::stride, ::stride])


def texts(golden: Golden) -> None:
    for package in ("emoji", "unidecode"):
        pytest.importorskip(package, reason=f"{package} comes with hfvlm[draw]")
    golden.check()
    case, folder = golden.case, golden.folder
    words = Words(case["hashtag_words"])
    for i, text in enumerate(case["texts"]):
        draws = iter(case["uniforms"][i] if "uniforms" in case else [])
        assert normalized(text, words, lambda: next(draws)) == case["normalized"][i], text  # noqa: B023
    length = case.get("max_text_length", 64)
    options = {"clean": "min-dalle", "model_max_length": length, "split_special_tokens": True}
    with tempfile.TemporaryDirectory() as room:
        plain = HfvlmDALLEMiniTokenizer.from_vocabulary(without_dead_merges(folder, Path(room)), **options)
    for text, ids in zip(case["texts"], case.get("ids", case.get("min_dalle_ids")), strict=True):
        assert plain(text, padding=False, truncation=False)["input_ids"] == ids, text
    for text, rows in zip(case["texts"], case.get("min_dalle_text_tokens", []), strict=False):
        assert [*plain.min_dalle_rows(text)] == rows, text
    for section, clean in (("processor", "dalle-mini"), ("processor_without_normalizer", "none")):
        if section in case:
            whole_batch(golden, section, clean, length, words)


def without_dead_merges(folder: Path, room: Path) -> Path:
    """A copy of a vocabulary without merges of pieces that it lacks and that no merge makes: they never happen."""
    known = json.loads((folder / "vocab.json").read_text())
    head, *merges = (folder / "merges.txt").read_text().split("\n")
    made = {merge.replace(" ", "") for merge in merges}
    kept = [m for m in merges if m and all(part in known or part in made for part in m.split(" "))]
    (room / "merges.txt").write_text("\n".join([head, *kept, ""]))
    (room / "vocab.json").write_text(json.dumps(known))
    return room / "vocab.json"


def whole_batch(golden: Golden, section: str, clean: str, length: int, words: Words) -> None:
    case = golden.case
    options = {"clean": clean, "model_max_length": length}
    tokenizer = HfvlmDALLEMiniTokenizer.from_vocabulary(golden.folder / "vocab.json", **options)
    random.seed(case["seed"])
    tokenizer.words, tokenizer.draw = words, random.random
    found = tokenizer(case["texts"])
    empty = tokenizer("", padding="max_length") if clean == "none" else None
    for name, expected in case[section].items():
        if name in found:
            assert found[name] == expected, (section, name)
            continue
        assert name in ("input_ids_uncond", "attention_mask_uncond"), name
        if empty is not None:
            key = name.removesuffix("_uncond")
            assert all(row == empty[key] for row in (expected if isinstance(expected[0], list) else [expected]))


def compose(path: Path):
    """A released file and, without memory, the others that its preset names: the configuration, the tables, and the
    weights of norms that have none in the file. The first preset that fits counts."""
    keys = read_key_list(path)
    return fitting("dalle_mini", stem_of(path), lambda preset: composed(path, keys, preset))


def composed(path: Path, keys, preset):
    config = preset.make_config()
    layout, own = preset.source["layout"], shapes_of(config)[0]
    sources = {role: Source(path, part, {}) for role, part in files_of(config, layout, keys, own).items()}
    tables = CONVERSION.tables_for(config, layout, sources)
    return config, tables, CONVERSION.fresh_parameters(config, layout, sources["main"].tensors, own)


def files_of(config, layout, keys, own):
    """The file itself, and others that are made of the model's shapes, by their roles."""
    halves = {"main": ("", [])}
    if layout == "min-dalle":
        rows = {half: min_dalle_rows(half) for half in ("encoder", "decoder")}
        halves = {"main": ("text_model.", rows["encoder"]), "decoder": ("image_decoder.", rows["decoder"])}
    elif layout == "openai":
        rows = {half: dvae_rows(config, half) for half in ("encoder", "decoder")}
        halves = {"main": ("encoder.", rows["encoder"]), "decoder": ("decoder.", rows["decoder"])}
    # The decoder has an output layer, or begins with a convolution of one pixel.
    embeds = "blocks.input.w" in keys and keys["blocks.input.w"].shape[-1] == 1
    given = "decoder" if "decoder" in halves and ("lm_head.weight" in keys or embeds) else "main"
    found = {given: keys}
    for role, (prefix, rows) in halves.items():
        if role != given:
            found[role] = restore_keys({key: t for key, t in own.items() if key.startswith(prefix)}, rows)
    if getattr(config, "codec_config", None) is not None:
        codec = {key: tensor for key, tensor in own.items() if key.startswith("codec.")}
        names = ["embedding.weight"] if layout == "min-dalle" else ["a/b"]
        found["codec"] = restore_keys(codec, vqgan_rows(config.codec_config, names, "codec."))
    return found
