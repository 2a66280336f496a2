"""PaliGemma, Gemma and the mask codes of big_vision."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.checkpoints.key_table import Row, Table
from hfvlm.conversion.paligemma import GEMMA_OPTIONS, IMAGE_OPTIONS, config_from_original, keys_for, layout_of
from hfvlm.modeling.compat import prefix_mask
from hfvlm.models.paligemma import HfvlmPaliGemmaImageProcessor, HfvlmPaliGemmaProcessor, HfvlmPaliGemmaTokenizer
from hfvlm.models.paligemma.beams import search
from hfvlm.models.paligemma.regions import (
    CODES,
    LOCATIONS,
    SEGMENTS,
    crop_mask,
    find,
    format_box,
    format_mask,
    mask_overlap,
    paste_mask,
    pixel_box,
    shrunk,
)
from hfvlm.presets import Preset
from hfvlm.processing.assembly import IGNORE
from hfvlm.processing.grounding import intersection_over_union
from hfvlm.release.plans import empty_model
from tests.originals.common import converted, fitting
from tests.support.golden import Golden, Recorder, UnknownOptionError, read_key_list, stem_of

SIZES = ("scan", "cache_dtype")
# Of a case with both towers; sizes are those of the weights.
WHOLE = (
    *("gemma", "img", "llm", "image_size", "separator_id", "eos_id", "bos_id", "max_decode_len", "label_smoothing"),
    *("frames", "prefix_lengths (bos, words, separator)", "suffix_lengths (with eos)", "gradients", "beam_sizes"),
)
NOTEBOOK, TRANSFERS = "notebook preprocess_image", "resize"


def compare(golden: Golden) -> None:
    options = golden.section("arguments") or golden.section("config")
    name = "arguments" if golden.section("arguments") else "config"
    if "pictures [h, w]" in options:
        golden.check(arguments=("pictures [h, w]", "resizes [size, antialias]", "stride"))
        pixels(golden)
    elif "examples" in options:
        golden.check(arguments=("examples", "seqlen", "sentencepiece"))
        texts(golden)
    elif "masks" in options:
        golden.check(arguments=("masks", "decode indices", "encoder channels", "embedding dim"))
        mask_codes(golden)
    elif "decoded" in options:
        golden.check(arguments=("ground truth", "decoded", "loc0", "seg0", "vqvae"))
        mask_reading(golden)
    elif "img" in options:
        golden.check(
            **{name: WHOLE, f"{name}__gemma": GEMMA_OPTIONS, f"{name}__img": IMAGE_OPTIONS, f"{name}__llm": SIZES}
        )
        whole(golden, options)
    elif "gemma" in options:
        golden.check(
            arguments=("gemma", "cache_dtype", "prefix_lengths", "new_tokens"), arguments__gemma=GEMMA_OPTIONS
        )
        gemma(golden, options)
    else:
        raise UnknownOptionError(
            f"{golden.folder.name}: none of the kinds of cases that are known: {', '.join(options)}"
        )


def released(golden: Golden) -> dict[str, Tensor]:
    """The state dict by the names of a file."""
    return {key.replace(".", "/"): tensor for key, tensor in golden.state_dict.items()}


def model_of(golden: Golden, tensors: dict[str, Tensor]) -> Any:
    return converted("paligemma", tensors, config_from_original(golden.case, tensors), layout_of(golden.case))


# PaliGemma


def whole(golden: Golden, options: dict[str, Any]) -> None:
    tensors = released(golden)
    model = model_of(golden, tensors)
    images = golden.inputs["image"]
    frames = images.shape[1] if images.ndim == 5 else 1
    pixel_values = images.reshape(-1, *images.shape[-3:]).permute(0, 3, 1, 2)
    count = frames * model.config.count_tokens()
    cap = options["gemma"].get("final_logits_softcap")
    values: dict[str, Tensor] = {"image_tokens": torch.tensor([count])}
    if "text" in golden.inputs:
        values |= trained(golden, model, pixel_values, count, tensors)
    prompts = prompts_of(golden, model, count)
    if "beam_sizes" in options:
        for beams in options["beam_sizes"]:
            values |= beam_search(model, prompts, pixel_values, beams, options)
    new = options.get("max_decode_len", golden.case.get("new_tokens"))
    values |= greedy(model, prompts, pixel_values, new, cap)
    for name in golden.in_order():
        golden.compare(name, values[name])


def placed(model: Any, ids: Tensor, count: int) -> Tensor:
    return torch.cat([torch.full((len(ids), count), model.config.image_token_id), ids], dim=1)


def trained(
    golden: Golden, model: Any, pixel_values: Tensor, count: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    text, suffix, weights = (golden.inputs[name] for name in ("text", "mask_ar", "mask_loss"))
    assert bool((suffix.diff(dim=1) >= 0).all()), "a suffix that turns back into a prefix is another mask"
    types = torch.cat([torch.zeros(len(text), count, dtype=torch.long), suffix], dim=1)
    # The trainer leaves out the last token; older cases run over all.
    last = -1 if golden.outputs["text_logits"].shape[1] < text.shape[1] else None
    ids, own = placed(model, text[:, :last], count), types[:, :last]
    paths = ["vision_model.patches", "vision_model.layers", "vision_model.layers.0", "vision_model.post_norm"]
    with torch.no_grad(), Recorder(model, paths) as seen:
        output = model(input_ids=ids, pixel_values=pixel_values, token_type_ids=own)
        hidden = model.base_model(
            input_ids=ids, pixel_values=pixel_values, token_type_ids=own, use_cache=False
        ).last_hidden_state
    logits = output.logits[:, count:]
    nll = F.cross_entropy(logits[:, : text.shape[1] - 1].transpose(1, 2), text[:, 1:], reduction="none")
    images = torch.stack(list(output.image_outputs.pooler_output))
    edge = int(seen["vision_model.patches"].shape[1] ** 0.5)
    x = model.embed(ids, output_features(output))
    mask = prefix_mask(eager(model), x, None, None, own == 0)
    labels = placed(model, text, count).masked_fill(F.pad(weights, (count, 0)) == 0, IGNORE)
    inputs = {"input_ids": placed(model, text, count), "labels": labels}
    each = [
        model(**{k: v[i : i + 1] for k, v in inputs.items()}, pixel_values=part).loss
        for i, part in enumerate(pixel_values.split(len(pixel_values) // len(text)))
    ]
    loss = model(**inputs, pixel_values=pixel_values).loss
    loss.backward()
    gradients = {
        name: gradient_of(name.removeprefix("gradient:").replace(".", "/"), model, tensors)
        for name in golden.outputs
        if name.startswith("gradient:")
    }
    return gradients | {
        "text_logits": logits,
        "img_zimg": images.reshape(len(text), count, -1),
        "img_stem": seen["vision_model.patches"].unflatten(1, (edge, edge)),
        "img_with_posemb": seen["vision_model.layers.0:input"],
        "img_encoded": seen["vision_model.post_norm"],
        "text_embedding": x[:, count:].detach(),
        "llm_pre_logits": hidden,
        "attn_mask": (mask[:, 0] == 0).long(),
        "nll_per_token": nll,
        "token_nll_masked": nll * weights[:, 1:],
        "example_loss": torch.stack(each),
        "loss": loss.reshape(1),
    }


def output_features(output: Any) -> dict[str, Any]:
    return {"image": output.image_outputs}


def eager(model: Any) -> Any:
    """The language model's configuration, for masks in numbers."""
    config = type(model.config.get_text_config())(**model.config.get_text_config().to_dict())
    config._attn_implementation = "eager"
    return config


def gradient_of(key: str, model: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The gradient of a parameter in the original's layout, through the change that converts it."""
    rows = {row.source: row for row in map(Row._make, keys_for(model.config, "big_vision", tensors))}
    row = rows[key]
    leaf = tensors[key].clone().requires_grad_()
    parts = leaf if row.change is None else row.change.apply(leaf)
    parts = parts if isinstance(parts, tuple) else (parts,)
    targets = row.target if isinstance(row.target, tuple) else (row.target,)
    named = dict(model.named_parameters())  # of those that are tied, the first
    pairs = [(part, named[str(name)].grad) for part, name in zip(parts, targets, strict=True) if str(name) in named]
    return torch.autograd.grad([part for part, _ in pairs], leaf, [grad for _, grad in pairs])[0]


def prompts_of(golden: Golden, model: Any, count: int) -> dict[str, Tensor]:
    """Prompts without their padding, padded on the left."""
    if "prefix" in golden.inputs:
        assert not bool(
            golden.inputs["prefix_mask_ar"].bool().logical_and(golden.inputs["prefix_mask_input"].bool()).any()
        )
        rows = [
            ids[real.bool()]
            for ids, real in zip(golden.inputs["prefix"], golden.inputs["prefix_mask_input"], strict=True)
        ]
    else:
        rows = list(golden.inputs["text"][:, : golden.case["prefix_len"]])
    return left_padded([torch.cat([torch.full((count,), model.config.image_token_id), row]) for row in rows])


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]),
    }


def greedy(
    model: Any, prompts: dict[str, Tensor], pixel_values: Tensor, new: int, cap: float | None
) -> dict[str, Tensor]:
    """Ids that generation chooses, and the logits behind them. The original caps those of all steps but the first."""
    made = model.generate(
        **prompts,
        pixel_values=pixel_values,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = made.sequences[:, prompts["input_ids"].shape[1] :]
    logits = [step if i == 0 or not cap else cap * torch.tanh(step / cap) for i, step in enumerate(made.logits)]
    logs = torch.stack(logits, dim=1).log_softmax(dim=-1).gather(2, ids[..., None]).squeeze(2)
    return {"greedy": ids, "greedy_logp": logs, "prefill_logits": logits[0], "last_extend_logits": logits[-1]}


def beam_search(
    model: Any, prompts: dict[str, Tensor], pixel_values: Tensor, beams: int, options: dict[str, Any]
) -> dict[str, Tensor]:
    found: list[Any] = []

    def record(
        model: Any, ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
    ) -> Tensor:
        length = generation_config.max_length - ids.shape[1]
        found.append(search(model, ids, logits_processor, inputs, beams, length, options["eos_id"]))
        return ids

    model.generate(
        **prompts,
        pixel_values=pixel_values,
        num_beams=beams,
        max_new_tokens=options["max_decode_len"],
        eos_token_id=options["eos_id"],
        do_sample=False,
        custom_generate=record,
    )
    (own,) = found
    names = {"tokens": own.tokens, "score": own.scores, "live_tokens": own.live, "steps": torch.tensor([own.steps])}
    return {f"beam {beams}.{name}": value for name, value in names.items()}


# Gemma


def gemma(golden: Golden, options: dict[str, Any]) -> None:
    tensors = released(golden)
    model = model_of(golden, tensors)
    if options["gemma"].get("attn_logits_softcap"):
        model.set_attn_implementation("eager")  # transformers before 5.24 forgets the cap in its default
    tokens, suffix, real = (golden.inputs[name] for name in ("tokens", "mask_ar", "input_mask"))

    def run(ids: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        with Recorder(model, ["model.norm"]) as seen:
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        return output.logits, seen["model.norm:input"], seen["model.norm"]

    def prefixed(ids: Tensor, types: Tensor, mask: Tensor) -> Any:
        return prefix_mask(model.config, model.get_input_embeddings()(ids), mask, None, types == 0)

    with torch.no_grad():
        logits, encoded, normed = run(tokens, None)
        own = prefixed(tokens, suffix, real)
        both = run(tokens, own)
        table = model.get_output_embeddings()
        values = {
            "causal.logits": logits,
            "causal.logits_pre_norm": table(normed),
            "causal.encoded": encoded,
            "causal.pre_logits": normed,
            "prefix.mask": mask_of(eager(model), model, tokens, suffix, real),
            "prefix.logits": both[0],
            "prefix.pre_logits": both[2],
            "prefix.logits_from_pre_logits": table(both[2]),
            "embedding": model.get_input_embeddings()(tokens),
        }
        known = real.bool()
        prompts, begun = (left_padded([row[own] for row, own in zip(x, known, strict=True)]) for x in (tokens, suffix))
        ids, mask, types = prompts["input_ids"], prompts["attention_mask"], begun["input_ids"]
        start = ids.shape[1]
        for _ in range(options["new_tokens"]):
            last = run(ids, prefixed(ids, types, mask))[0][:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
            mask, types = (F.pad(x, (0, 1), value=1) for x in (mask, types))
    values |= {"greedy": ids[:, start:], "last_logits": last}
    for name in golden.in_order():
        padded = name.startswith("prefix.") and name != "prefix.mask"
        golden.compare(name, values[name], real.bool().unsqueeze(-1) if padded else None)


def mask_of(config: Any, model: Any, tokens: Tensor, suffix: Tensor, real: Tensor) -> Tensor:
    """The original's mask also hides everything from padding."""
    mask = prefix_mask(config, model.get_input_embeddings()(tokens), real, None, suffix == 0)
    return ((mask[:, 0] == 0) & real.bool().unsqueeze(-1)).long()


# Processor


def case_image(height: int, width: int) -> np.ndarray:
    """The image that the cases are made of."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    waves = 40 * np.sin(x / 9 + c) + 40 * np.cos(y / 7)
    return np.mod(np.round(7 * y + 5 * x * (c + 1) + (x * y) // (11 + c) + waves), 256).astype(np.uint8)


def pixels(golden: Golden) -> None:
    options = golden.section("arguments")
    for i, shape in enumerate(options["pictures [h, w]"]):
        image = case_image(*shape)
        for size, antialias in options["resizes [size, antialias]"]:
            names = {f"{i}.{TRANSFERS}({size}, antialias={antialias})|value_range(-1, 1)": True}
            names |= {f"{i}.{NOTEBOOK}({size})": False} if antialias else {}
            for name, cut in names.items():
                stored = next((full for full in golden.outputs if full.startswith(f"{name}[")), None)
                if stored is None:
                    continue
                stride = int(stored.rpartition("::")[2].removesuffix("]"))
                processor = HfvlmPaliGemmaImageProcessor(size=size, antialias=antialias, whole=cut, upright=False)
                (ours,) = processor(image, return_tensors="pt")["pixel_values"]
                ours = ours.permute(1, 2, 0)[::stride, ::stride]
                # As the case says: one step of 8 bits for up to 3.1 % of what is cut, since fractions are near whole.
                steps = (ours - golden.outputs[stored]).abs() * 127.5
                if not cut:
                    assert steps.max() <= 0.0063, (stored, steps.max())
                elif antialias:
                    assert steps.max() <= 1.01, stored
                    assert (steps > 0.01).double().mean() <= 0.031, stored
                else:
                    assert steps.max() <= 1e-4, (stored, steps.max())
                golden.compared.add(stored)
                golden.errors[stored] = steps.max().item() / 127.5


def texts(golden: Golden) -> None:
    options = golden.section("arguments")
    tokenizer = HfvlmPaliGemmaTokenizer.from_vocabulary(golden.folder / "base.model")
    processor = HfvlmPaliGemmaProcessor(HfvlmPaliGemmaImageProcessor(), tokenizer)
    length = options["seqlen"]
    known = [tokenizer.convert_tokens_to_ids(piece) for piece in ("<loc0000>", "<seg000>", "\n")]
    golden.compare("loc0 seg0 newline", torch.tensor(known))
    golden.compare("vocabulary size", torch.tensor([tokenizer.convert_tokens_to_ids("<image>")]))  # it comes last
    for i, (prefix, suffix) in enumerate(options["examples"]):
        question = {"role": "user", "content": prefix}
        prompt = processor.assemble([[question]])[0].ids
        ids, labels = processor.training_row([question, {"role": "assistant", "content": suffix}])
        answer = [label for label in labels if label != IGNORE]
        assert ids[: len(prompt)] == prompt
        whole_row = prompt if suffix == "" else ids

        def padded(row: list[int], size: int, value: int = 0) -> Tensor:
            return torch.tensor((row + [value] * size)[:size])

        begun = [0] * len(prompt) + [1] * (len(whole_row) - len(prompt))
        trained_on = [0] * len(prompt) + [1] * len(answer)
        values = {
            "tokens": padded(whole_row, length),
            "mask_ar": padded(begun, length),
            "mask_loss": padded(begun, length),
            "mask_input": padded([1] * len(whole_row), length),
            "train.text": padded(ids, length + 1),
            "train.mask_ar": padded(trained_on, length + 1, 1),
            "train.mask_loss": padded(trained_on, length + 1),
            "eval.text": padded(prompt, length),
            "eval.mask_ar": padded([0] * len(prompt), length, 1),
            "eval.mask_input": padded([1] * len(prompt), length),
            "decoded (UTF-8)": text_tensor(processor.decode(answer, skip_special_tokens=True)),
        }
        for name, value in values.items():
            golden.compare(f"{i}.{name}", value)


def text_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()) or [0], dtype=torch.uint8)  # an empty one is stored as a zero


# Masks


def drawn(kind: str, height: int, width: int) -> np.ndarray:
    """A mask by its formula -> booleans."""
    y, x = np.meshgrid(np.arange(height, dtype=float), np.arange(width, dtype=float), indexing="ij")
    if kind == "ellipse":
        return ((y - 0.55 * height) / (0.4 * height)) ** 2 + ((x - 0.4 * width) / (0.3 * width)) ** 2 < 1
    if kind == "triangle":
        return (y > x * height / width) & (y < 0.9 * height)
    if kind == "ring":
        middle = ((y - 0.5 * height) / height) ** 2 + ((x - 0.5 * width) / width) ** 2
        return (middle < 0.45**2) & (middle > 0.2**2)
    raise UnknownOptionError(f"a mask of the kind {kind!r}; the runner knows ellipse, triangle, ring")


def mask_codes(golden: Golden) -> None:
    options = golden.section("arguments")
    model = converted("paligemma", golden.state_dict, config_from_original(golden.case, golden.state_dict), "mask")
    assert list(model.config.encoder_channels) == options["encoder channels"]
    assert model.config.code_dim == options["embedding dim"]
    every: list[Tensor] = []
    for i, row in enumerate(options["masks"]):
        mask = drawn(row["kind"], *row["size"]).astype(np.uint8) * 255
        box = row["bbox y1 x1 y2 x2"]
        (codes,) = model.encode_masks(crop_mask(mask, box)[None])
        golden.compare(f"{i}.suffix", text_tensor(format_box(box) + format_mask(codes)))
        # The text is the original's, the mask beside it that of the case's script, which rounds in double precision.
        edges = np.round(np.asarray(mask.shape * 2, dtype=np.float64) * np.asarray(box, dtype=np.float32)).astype(int)
        small = shrunk(mask, edges.tolist())
        features = model.features(small[None])
        (codes,) = model.encode_masks(small[None])
        every.append(codes)
        golden.compare(f"{i}.prefix", text_tensor(row["sentence"]))
        golden.compare(f"{i}.mask64", small)
        golden.compare(f"{i}.encoder_output[..., ::8]", features[0].permute(1, 2, 0)[..., ::8])
        golden.compare(f"{i}.indices", codes)
    indices = torch.stack([*every, *map(torch.tensor, options["decode indices"])])
    with torch.no_grad(), Recorder(model, ["decoder.3", "decoder.4"]) as seen:
        masks = model.decode_codes(indices)
    golden.compare("decode.indices", indices)
    golden.compare("decode.quantized[..., ::8]", model.vectors(indices).permute(0, 2, 3, 1)[..., ::8])
    golden.compare("decode.decoder.ResBlock_1[..., ::4]", seen["decoder.3"].permute(0, 2, 3, 1)[..., ::4])
    golden.compare("decode.decoder.ConvTranspose_0[..., ::4]", seen["decoder.4"].permute(0, 2, 3, 1)[..., ::4])
    golden.compare("decode.mask", masks)


def mask_reading(golden: Golden) -> None:
    options = golden.section("arguments")
    model = converted("paligemma", golden.state_dict, config_from_original(golden.case, golden.state_dict), "mask")
    pieces = {options["loc0"] + i: name for i, name in enumerate(LOCATIONS)}
    pieces |= {options["seg0"] + i: name for i, name in enumerate(SEGMENTS)}
    overlaps, boxes, invalid = [], [], 0
    for i, (row, ids) in enumerate(zip(options["ground truth"], options["decoded"], strict=True)):
        truth, size = drawn(row["kind"], *row["size"]), tuple(row["size"][::-1])
        match = next(find("".join(pieces.get(j, "?") for j in ids[:20])), None)
        match = match if match is not None and len(match.codes) == CODES else None
        pasted = None
        if match is not None:
            (mask,) = model.decode_codes(torch.tensor([match.codes]))
            pasted = paste_mask(mask, match.box, size)
        shares = [step / 1023 for step in match.box] if match is not None else [0.0] * 4
        boxes.append(intersection_over_union(shares, row["bbox y1 x1 y2 x2"]))
        overlap = mask_overlap(pasted, truth)
        overlaps.append(overlap)
        invalid += pasted is None
        golden.compare(f"{i}.valid", torch.tensor([int(pasted is not None)]))
        if f"{i}.mask" in golden.outputs:
            golden.compare(f"{i}.pixels y1 x1 y2 x2", torch.tensor(pixel_box(match.box, size)))
            # As the case says: noise of a float may flip single pixels.
            wrong = torch.from_numpy(pasted.astype(np.uint8)) != golden.outputs[f"{i}.mask"]
            assert wrong.double().mean() <= 0.002, f"{i}.mask"
            assert abs(overlap - golden.outputs[f"{i}.iou"].item()) <= 0.005, f"{i}.iou"
            golden.compared |= {f"{i}.mask", f"{i}.iou"}
    assert abs(np.mean(overlaps) - golden.outputs["miou"].item()) <= 0.005
    golden.compared.add("miou")
    for name in [name for name in golden.outputs if name.startswith("boxacc/")]:
        share = np.mean([overlap >= float(name.removeprefix("boxacc/")) for overlap in boxes])
        golden.compare(name, torch.tensor([share]))
    golden.compare("invalid", torch.tensor([float(invalid)]))
    golden.compare("total", torch.tensor([float(len(overlaps))]))


# Released files


def preset_name(path: Path) -> str:
    return stem_of(path).removesuffix(".npz").removesuffix("-big_vision").replace("gemma_", "gemma-")


def compose(path: Path) -> tuple[Any, list[Table]]:
    """A released file by its preset."""
    tensors = read_key_list(path)

    def made(preset: Preset) -> tuple[Any, list[Table]]:
        config, layout = preset.make_config(), preset.source["layout"]
        return config, [Table(tensors, keys_for(config, layout, tensors))]

    config, tables = fitting("paligemma", preset_name(path), made)
    assert config_from_original({}, tensors).to_dict() == config.to_dict(), "the file's shapes say something else"
    assert empty_model(config) is not None
    return config, tables
