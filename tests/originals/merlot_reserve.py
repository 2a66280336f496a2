"""MERLOT Reserve's cases: keys and inputs under Flax's names, frames as rows of patches."""

from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hfvlm.conversion.merlot_reserve import CONVERSION, MODEL_OPTIONS, SECTIONS, TVQA, VCR, config_from_original
from hfvlm.media import MediaError
from hfvlm.models.merlot_reserve import (
    HfvlmMERLOTReserveFeatureExtractor,
    HfvlmMERLOTReserveForMultipleChoice,
    HfvlmMERLOTReserveForPreTraining,
    HfvlmMERLOTReserveForVideoMultipleChoice,
    HfvlmMERLOTReserveImageProcessor,
    HfvlmMERLOTReserveProcessor,
    HfvlmMERLOTReserveTokenizer,
)
from hfvlm.models.merlot_reserve.encoders import HIGHEST_FREQUENCY, rotary_factors
from hfvlm.models.merlot_reserve.framing import fitted, fitted_at_random, turned, without_bars
from hfvlm.models.merlot_reserve.masking import fill_empty, masked_sequences, rows_of, widen
from hfvlm.models.merlot_reserve.modeling_merlot_reserve import unit
from hfvlm.models.merlot_reserve.modeling_merlot_reserve_pretraining import TASKS
from hfvlm.models.merlot_reserve.processing_merlot_reserve import (
    ReserveSegment,
    centred_in_silence,
    spectrograms,
)
from tests.originals.common import converted, vocabulary
from tests.support.golden import Golden, UnknownOptionError

DATA_OPTIONS = (
    *("num_segments", "num_segment_groups", "num_audio_subsegments", "lang_seq_len", "seq_len", "mask_rate"),
    *("num_text_spans_to_include", "num_audio2text_seqs", "num_text2audio_seqs", "num_text_seqs"),
)
OPTIONS = {"config": SECTIONS, "config__model": MODEL_OPTIONS, "config__data": DATA_OPTIONS}
VOCABULARY = "lowercase_encoder.json"
PATCH = 16


def compare(golden: Golden) -> None:
    golden.check(**OPTIONS)
    if golden.state_dict:
        model_case(golden)
    elif "calls" in golden.case:
        masking(golden)
    elif "clips" in golden.case:
        audio_lengths(golden)
    elif "segments" in golden.case:
        video_segments(golden)
    elif "images" in golden.case:
        images(golden)
    else:
        audio_and_texts(golden)


# Models


def model_case(golden: Golden) -> None:
    tensors = {key.replace(".", "/"): tensor for key, tensor in golden.state_dict.items()}
    config = config_from_original(golden.case, tensors)
    head = (config.architectures or [None])[0]
    if "audio2text" in golden.inputs:
        config.architectures = [HfvlmMERLOTReserveForPreTraining.__name__]
    model = converted("merlot_reserve", tensors, config, CONVERSION.layout_of(golden.case))
    run = {VCR: vcr, TVQA: tvqa}.get(head)
    if run is None:
        run = pretraining if "audio2text" in golden.inputs else helpers if "options" in golden.case else zero_shot
    with torch.no_grad():
        run(golden, model)


def frames_of(golden: Golden, patches: Tensor) -> Tensor:
    """`(..., h * w, p * p * 3)` -> `(..., 3, H, W)`."""
    (rows, columns), size = golden.case["config"]["model"]["output_grid"], round((patches.shape[-1] // 3) ** 0.5)
    grid = patches.unflatten(-1, (size, size, 3)).unflatten(-4, (rows, columns))
    axes = range(patches.ndim - 2)
    first = len(axes)
    order = [*axes, first + 4, first, first + 2, first + 1, first + 3]
    return grid.permute(*order).flatten(-4, -3).flatten(-2, -1)


def zero_shot(golden: Golden, model: Any) -> None:
    inputs = golden.inputs
    pixels, clips = frames_of(golden, inputs["images"]), inputs["audio_clips"]
    vision, audio = model.vision_model(pixels), model.audio_model(clips)
    ids, at = inputs["tokens"][None].long(), inputs["subseg_idxs"][None].long()
    places = {"segment_ids": at.div(3, rounding_mode="floor"), "audio_ids": at}
    image_tokens, audio_tokens = vision.tokens[None], audio.tokens[None]
    arranged = model.arrange(ids, image_tokens=image_tokens, audio_tokens=audio_tokens, **places)
    valid = arranged.valid
    whole = model(ids, pixels[None], clips[None], **places)
    values = {
        "vision_cls": vision.embeds,
        "vision_seq_attnpool": vision.tokens,
        "audio_cls": audio.embeds,
        "audio_seq": audio.last_hidden_state[:, 1:],
        "audio_seq_attnpool": audio.tokens,
        "text_span": unit(model.get_text_features(inputs["text_spans"].long()).pooler_output),
        "audio_only": unit(model.get_audio_features(clips).pooler_output),
        "joint_coords": arranged.coordinates,
        "joint_mask": (valid[:, None] & valid[:, :, None]).float(),
        "joint_sinusoids": sinusoids(arranged.coordinates, model.joint.head_dim),
        "video": whole.embeds[0],
        "video_noaudio": model(ids, image_tokens=image_tokens, segment_ids=places["segment_ids"]).embeds[0],
    }
    for name in golden.in_order():
        mask = (ids[0] != 0).unsqueeze(-1) if name.startswith("video") else None
        golden.compare(name, values[name], mask)


def sinusoids(coordinates: Tensor, width: int) -> Tensor:
    """The original's tables, out of the sums and differences that ours multiplies by."""
    assert HIGHEST_FREQUENCY == 10.0
    factors = rotary_factors(coordinates, width)[:, 0, :, :32]
    less, more = factors[..., ::2], factors[..., 1::2]
    tables = torch.stack([(more - less) / 2, (more + less) / 2], dim=1)
    return tables.repeat_interleave(2, dim=-1)


def helpers(golden: Golden, model: Any) -> None:
    inputs, first = golden.inputs, golden.case["prompt_images"]
    pixels, clips = frames_of(golden, inputs["images"])[None], inputs["audio_clips"][None]
    ids, at = inputs["tokens"][None].long(), inputs["subseg_idxs"][None].long()
    places = {"segment_ids": at.div(3, rounding_mode="floor")}
    images, sounds = model.encode_images(pixels), model.encode_audio(clips)
    video = model(ids, pixels, clips, audio_ids=at, **places)
    labels = golden.outputs["label_ids"].long()
    spans = model.get_text_features(labels).pooler_output
    logits = model.label_logits(video.embeds, ids, spans)
    two = model(
        ids.repeat(2, 1),
        torch.cat([pixels, pixels.flip(1)]),
        clips.repeat(2, 1, 1, 1),
        audio_ids=at.repeat(2, 1),
        segment_ids=places["segment_ids"].repeat(2, 1),
    )
    pointers = inputs["audio_pointers"][None].long()
    values = {
        "img_seq": images[0],
        "audio_seq": sounds[0],
        "embed_video": video.embeds[0],
        "batch_embed_video": two.embeds[1],
        "embed_singleimg_with_multiimg_prompt": model(
            ids, pixels[:, first:], image_tokens=images[:, :first], **places
        ).embeds[0],
        "embed_preencoded_noaudio": model(ids, image_tokens=images, **places).embeds[0],
        "embed_preencoded_audio": model(
            ids, image_tokens=images, audio_tokens=sounds, audio_ids=pointers, **places
        ).embeds[0],
        "label_space": unit(spans),
        "zero_shot_logits": logits,
        "zero_shot_probs": logits.softmax(dim=-1),
    }
    for name in golden.in_order():
        if name in values:
            mask = (ids[0] != 0).unsqueeze(-1) if len(values[name]) == ids.shape[1] else None
            golden.compare(name, values[name], mask)
    tokenizer = HfvlmMERLOTReserveTokenizer.from_vocabulary(
        vocabulary(golden.folder, VOCABULARY), model_max_length=model.config.max_span_length
    )
    golden.compare(
        "label_ids", tokenizer(golden.case["options"], padding="max_length", return_tensors="pt")["input_ids"]
    )


def pretraining(golden: Golden, model: HfvlmMERLOTReserveForPreTraining) -> None:
    inputs, data = golden.inputs, golden.case["config"]["data"]
    segments, audio_clips = data["num_segments"], inputs["audio_clips"]
    batch, spans = len(audio_clips), inputs["text_spans"].shape[-1]
    frames = audio_clips.shape[1] // (segments * data["num_audio_subsegments"])
    images = inputs["images"].unflatten(1, (segments, -1))

    def sequences(name: str) -> Tensor:
        nothing = torch.full_like(inputs[name], -1)
        columns = [inputs.get(f"{name}/{column}", nothing) for column in ("audio_ptr", "text_ptr")]
        return torch.stack([inputs[name], *columns], dim=-1).long()

    found = model(
        pixel_values=frames_of(golden, images),
        input_features=audio_clips.unflatten(1, (-1, frames)),
        text_to_audio=sequences("text2audio"),
        audio_to_text=sequences("audio2text"),
        matching=sequences("audio_text_matching"),
        texts=sequences("random_text"),
        span_ids=inputs["text_spans"].long().reshape(batch, -1, spans),
        video_ids=inputs["video_src_index"].long(),
    )
    scales = {
        name: (getattr(model, f"{part}_logit_scale").exp().clamp_max(100.0)).sqrt()
        for name, part in (("imgs_to_audio", "image"), ("text_to_audio", "audio"), ("stuff_to_span", "span"))
    }
    names = {"text2audio": "text_to_audio", "audio2text": "audio_to_text", "random_text": "texts"}
    values = {
        "loss": found.loss[None],
        "loss.imgs_to_audio": found.image_loss[None],
        "loss.text_to_audio": found.audio_loss[None],
        "loss.stuff_to_span": found.span_loss[None],
        **{
            f"loss._stuff_to_span_from_{theirs}": found.task_losses[None, TASKS.index(ours)]
            for theirs, ours in names.items()
        },
        "imgs_to_audio.x": found.image_predictions * scales["imgs_to_audio"],
        "imgs_to_audio.y": found.image_embeds * scales["imgs_to_audio"],
        "text_to_audio.x": found.audio_predictions * scales["text_to_audio"],
        "text_to_audio.y": found.audio_embeds * scales["text_to_audio"],
        "text_to_audio.y_extra": found.other_audio_embeds * scales["text_to_audio"],
    }
    # The masked texts come in an order of JAX's random numbers: ours are put into it by what they are.
    pairs = torch.cat([found.span_predictions, found.span_embeds], dim=1) * scales["stuff_to_span"]
    theirs = torch.cat([golden.outputs[f"stuff_to_span.{side}"] for side in "xy"], dim=1)
    order = torch.from_numpy(linear_sum_assignment(torch.cdist(theirs, pairs).numpy())[1])
    predictions, texts = pairs[order].chunk(2, dim=1)
    values |= {
        "stuff_to_span.x": predictions,
        "stuff_to_span.y": texts,
        "stuff_to_span._sources": found.span_tasks[order],
    }
    for name in golden.in_order():
        golden.compare(name, values[name])


def vcr(golden: Golden, model: HfvlmMERLOTReserveForMultipleChoice) -> None:
    inputs = golden.inputs
    labels = inputs["labels"].long()
    found = model(inputs["answers"].long(), frames_of(golden, inputs["image"]), labels=labels)
    golden.compare("logits", found.logits)
    golden.compare("logprobs", found.logits.log_softmax(dim=-1))
    golden.compare("loss", found.loss[None])
    golden.compare("is_right", (found.logits.argmax(dim=-1) == labels).float().mean()[None])


def tvqa(golden: Golden, model: HfvlmMERLOTReserveForVideoMultipleChoice) -> None:
    inputs, labels = golden.inputs, golden.inputs["labels"].long()
    text, audio = inputs["textonly_seqs"].long(), inputs["audio_seqs"].long()
    found = model(
        text[..., 0],
        frames_of(golden, inputs["images"]),
        audio[..., 0],
        inputs["audio_clips"].flatten(1, 2),
        segment_ids=text[..., 1],
        audio_segment_ids=audio[..., 1],
        labels=labels,
    )
    golden.compare("logits_from_audio", found.logits_from_audio)
    golden.compare("logits_from_text", found.logits_from_text)
    golden.compare("loss", found.loss[None])
    golden.compare("loss_audio", found.audio_loss[None])
    golden.compare("loss_text", found.text_loss[None])
    golden.compare("preds_joint", found.logits.argmax(dim=-1))
    golden.compare("softmax_joint", 2 * found.logits.exp())


# Masking


CALL = {
    *("name", "mask_idx", "reassign", "increase", "delta_thresh", "right_to_left_first", "audio_token_length"),
    *("counter", "num_groups", "padded_seq_len", "do_audio_mask", "do_audio_span"),
}


def masking(golden: Golden) -> None:
    inputs = golden.inputs
    for call in golden.case["calls"]:
        if unknown := sorted(set(call) - CALL):
            raise UnknownOptionError(f"a call has {', '.join(unknown)}; the runner knows {', '.join(sorted(CALL))}")
        name, masked = call["name"], np.array(call["mask_idx"])
        lengths, first = inputs["row_lengths"].numpy(), call.get("right_to_left_first", True)
        if call.get("reassign"):
            lengths = fill_empty(lengths, masked, leftwards_first=first)
            golden.compare(f"{name}.row_lengths_reassigned", torch.from_numpy(lengths))
        if call.get("increase"):
            lengths = widen(
                lengths,
                masked,
                inputs["tok_centroids"].numpy(),
                inputs["audio_start_end"].numpy(),
                leftwards_first=first,
                reach=call.get("delta_thresh", 0.1),
            )
            golden.compare(f"{name}.row_lengths_increased", torch.from_numpy(lengths))
        draws = Draws(inputs[f"uniforms_{name}"].numpy() if f"uniforms_{name}" in inputs else np.zeros(0))
        heard = call.get("do_audio_span")
        spans, sequences = masked_sequences(
            rows_of(inputs["token_values"].numpy(), lengths),
            masked,
            call["padded_seq_len"],
            draws,
            heard=None if heard is None else np.array(heard),
            audio_tokens=call.get("audio_token_length", 6),
            hides_audio=call.get("do_audio_mask", False),
            first_span=call.get("counter", 0),
            groups=call.get("num_groups", 1),
        )
        golden.compare(f"{name}.sequences", torch.from_numpy(sequences))
        golden.compare(f"{name}.span_values", torch.from_numpy(np.concatenate(spans)))
        golden.compare(f"{name}.span_lengths", torch.tensor([len(span) for span in spans]))
        golden.compare(f"{name}.uniforms_used", torch.tensor([draws.used]))


class Draws:
    """The stored numbers, one after the other."""

    def __init__(self, values: np.ndarray):
        self.values, self.used = values, 0

    def __call__(self, count: int) -> np.ndarray:
        self.used += count
        return self.values[self.used - count : self.used]


# Processors


def waveform(seed: int, samples: int) -> Tensor:
    """The sweep that the cases were made of."""
    t = np.arange(samples) / 22050
    sweep = 0.5 * np.sin(2 * np.pi * ((200 + 100 * seed) * t + 300 * t**2)) + 0.2 * np.sin(2 * np.pi * 3000 * t) * (
        t > 2
    )
    return torch.from_numpy(sweep.astype(np.float32))


CLIP = {"name", "s", "n", "speed", "pad_size", "centre_pad_to", "error"}


def audio_lengths(golden: Golden) -> None:
    stride = golden.case.get("frame_stride", 1)
    for clip in golden.case["clips"]:
        if unknown := sorted(set(clip) - CLIP):
            raise UnknownOptionError(f"a clip has {', '.join(unknown)}; the runner knows {', '.join(sorted(CLIP))}")
        samples = waveform(clip["s"], clip["n"])
        if "centre_pad_to" in clip:
            samples = centred_in_silence(samples, clip["centre_pad_to"])
        options = {"gap": clip.get("pad_size", 2), "playback_speed": clip.get("speed", 1)}
        if "error" in clip:
            with pytest.raises(MediaError, match="frames"):
                spectrograms(samples, **options)
        else:
            golden.compare(clip["name"], spectrograms(samples, **options)[:, ::stride])


def audio_and_texts(golden: Golden) -> None:
    """Spectrograms of the sweeps that the outputs' names number, and ids of texts."""
    for name in golden.in_order():
        samples = waveform(int(name.removeprefix("spectrogram_")), 110250)
        features = spectrograms(samples)
        stride = ceil(features.shape[1] / golden.outputs[name].shape[1])
        golden.compare(name, features[:, ::stride])
    case = golden.case
    tokenizer = HfvlmMERLOTReserveTokenizer.from_vocabulary(vocabulary(golden.folder, VOCABULARY))
    for text, ids in zip(case["texts"], case["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
    if "ids_padded_15" in case:
        assert tokenizer(case["texts"], padding="max_length")["input_ids"] == case["ids_padded_15"]


IMAGE = {"grid", "scale", "shrink_both_sides", "uniforms"}


def images(golden: Golden) -> None:
    case = golden.case
    for i, row in enumerate(case["images"]):
        if unknown := sorted(set(row) - IMAGE):
            raise UnknownOptionError(f"an image has {', '.join(unknown)}; the runner knows {', '.join(sorted(IMAGE))}")
        image, size = golden.inputs[f"image{i}"], tuple(PATCH * edge for edge in row["grid"])
        processor = HfvlmMERLOTReserveImageProcessor(size=dict(zip(("height", "width"), size, strict=True)))
        pixels = processor(image.numpy(), return_tensors="pt")["pixel_values"][0]
        patches = as_patches(pixels)
        golden.compare(f"patches{i}", patches[:: case["patch_stride"], :: case["value_stride"]])
        exact = patches.double()
        statistics = [exact.mean(), exact.std(correction=0), (exact == 0).double().mean()]
        golden.compare(f"patches{i}.mean_std", torch.stack(statistics).float())
        raw = image.permute(2, 0, 1) / 255
        upright = processor(image.numpy(), turn_tall=True, return_tensors="pt")["pixel_values"][0]
        turned_image = turned(raw)
        drawn = fitted_at_random(
            raw, size, tuple(row["scale"]), tuple(row["uniforms"]), covers=not row.get("shrink_both_sides", True)
        )
        for name, value, source in (("flip", upright, turned_image), ("random", drawn, raw)):
            step = case["pixel_stride"]
            golden.compare(f"{name}{i}", value.permute(1, 2, 0)[::step, ::step])
            golden.compare(f"{name}{i}.info", info(source, size, row if name == "random" else None))
        assert torch.allclose(upright, fitted(turned_image, size), atol=1e-6)


def as_patches(pixels: Tensor) -> Tensor:
    rows = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return rows.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def info(image: Tensor, size: tuple[int, int], row: dict[str, Any] | None) -> Tensor:
    """What the original tells of a fit, which ours does without: by the same rules, as a check of the sizes."""
    from hfvlm.models.merlot_reserve.framing import fit_of, random_fit_of

    if row is None:
        scale, fit, offsets = *fit_of(image, size), (0, 0)
    else:
        covers = not row.get("shrink_both_sides", True)
        scale, fit, offsets = random_fit_of(image, size, row["scale"], row["uniforms"], covers=covers)
    used = [min(new, edge) / edge for new, edge in zip(fit, size, strict=True)]
    old = image.shape[1:]
    shares = [offset / edge for offset, edge in zip(offsets, old, strict=True)]
    return torch.tensor([*used, 1 / float(scale), *old, *shares], dtype=torch.float32)


def video_segments(golden: Golden) -> None:
    case, frames = golden.case, golden.inputs["frames"].numpy()
    limits = {"threshold": case["blackbar_threshold"], "share": case["max_perc_to_trim"]}
    golden.compare("bars", torch.tensor(without_bars(frames, **limits)))
    golden.compare("bars_black", torch.tensor(without_bars(np.zeros_like(frames), **limits)))
    clips = golden.inputs["spectrogram"]
    size = dict(zip(("height", "width"), (PATCH * edge for edge in case["grid"]), strict=True))
    path = (
        vocabulary(golden.folder, VOCABULARY)
        if any(isinstance(s.get("text"), str) for s in case["segments"])
        else None
    )
    tokenizer = None if path is None else HfvlmMERLOTReserveTokenizer.from_vocabulary(path)
    processor = HfvlmMERLOTReserveProcessor(
        HfvlmMERLOTReserveImageProcessor(size=size), tokenizer, HfvlmMERLOTReserveFeatureExtractor()
    )
    segments = []
    for i, segment in enumerate(case["segments"]):
        if unknown := sorted(set(segment) - {"text", "use_text_as_input"}):
            raise UnknownOptionError(f"a segment has {', '.join(unknown)}; the runner knows text, use_text_as_input")
        text = segment.get("text", "") if segment.get("use_text_as_input", True) else None
        segments.append(ReserveSegment(frames[i % len(frames)], text, clips[i % len(clips)]))
    inputs = processor.join(segments)
    golden.compare("tokens", inputs["input_ids"][0])
    golden.compare("subseg_idxs", inputs["audio_ids"][0])
    patches = torch.stack([as_patches(pixels) for pixels in inputs["pixel_values"][0]])
    stride = case["stride"]
    golden.compare("images_strided", patches[:, ::stride, ::stride])
    golden.compare("audio_clip_sums", inputs["input_features"][0].double().sum(dim=(1, 2)).float())
