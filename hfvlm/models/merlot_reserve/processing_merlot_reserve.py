"""MERLOT Reserve's inputs (https://github.com/rowanz/merlot_reserve at d22c50f, mreserve/preprocess.py and
finetune/common_dataloader.py)."""

import logging
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from hfvlm.checks.ranges import check_number
from hfvlm.media import MediaError, Recording, read_audio, read_video
from hfvlm.media.images import to_8_bits
from hfvlm.media.recordings import resample
from hfvlm.models.merlot_reserve.framing import fitted, turned, without_bars
from hfvlm.models.merlot_reserve.segments import (
    CLIPS,
    RATE,
    SHIFT,
    TVQA_RATE,
    TVQA_SECONDS,
    TVQA_SEGMENTS,
    Recorded,
    ReserveSegment,
    around,
    by_peak,
    centred_in_silence,
    middles,
    spectrograms,
    texts_between,
)
from hfvlm.processing.base import MultiEncoderProcessor
from hfvlm.processing.features import AudioFeatureExtractor
from hfvlm.processing.images import HfvlmImageProcessor
from hfvlm.processing.settings import Bins, Flag, Frames, Hertz, Size, whole
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import engine_from_json

logger = logging.getLogger(__name__)

SEGMENT_SECONDS, LEFT_OUT_SECONDS = 5.0, 1.0
JOINT_LENGTH, VCR_LENGTH, TVQA_LENGTH, MOST_SEGMENTS = 160, 144, 256, 8


class HfvlmMERLOTReserveImageProcessor(HfvlmImageProcessor):
    """Images, as `hfvlm.media.read_image` reads them: to RGB in 0..1, the largest size that fits, bilinear, with black
    below and on the right.

    Args:
        size: the model's `{"height", "width"}` in pixels.
        turn_tall: turn images that are a third higher than wide, as in training and fine-tuning.
    """

    size: Size = {"height": 192, "width": 320}
    turn_tall: Flag = False
    resample = 2
    do_normalize = False

    def pixels(self, image: Image.Image, settings: Mapping[str, Any], name: str) -> np.ndarray:
        """Prepare one image -> `(3, H, W)`, float32."""
        array = np.array(to_8_bits(image, name).convert("RGB")).transpose(2, 0, 1).astype(np.float32)
        if not settings["do_resize"]:
            return self.scaled(array, settings)
        values = torch.from_numpy(array / 255.0)
        values = fitted(turned(values) if settings["turn_tall"] else values, tuple(settings["size"].values()))
        return self.scaled(values.numpy() * 255.0, settings)

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        checked = super().checked(settings)
        if checked["resample"] != 2:
            raise ValueError(f"{type(self).__name__} resizes bilinearly only (resample 2).")
        return checked


class HfvlmMERLOTReserveFeatureExtractor(AudioFeatureExtractor):
    """Audio of a segment, as `hfvlm.media.read_audio` reads it -> `input_features`, `(3 * B, frames, bins + 1)`.

    The mean of the channels, scaled by its peak; log mel spectrograms of three clips of 1.6 s. A shorter recording is
    put into the middle of silence; a longer one is refused: `processor.segments` cuts videos.

    Example:
        >>> extractor("bell.wav", return_tensors="pt")["input_features"].shape
        (3, 60, 65)
        >>> extractor((wave, 44_100))  # (N,) or (channels, N), floating point in -1..1 or integers

    Args:
        sampling_rate: that everything is resampled to, in hertz. In a call: of arrays that bring none.
        num_frames: of a clip.
        num_mel_bins: of a frame, next to the playback speed.
        gap: frames that are left out before, between and after the clips.
        playback_speed: of fast-forwarded audio, whose frames have as many times more samples.
    """

    sampling_rate: Hertz = RATE
    num_frames: Frames = 60
    num_mel_bins: Bins = 64
    gap: Annotated[int, whole(0, 64)] = 2
    playback_speed: Annotated[int, whole(1, 64)] = 1

    def features(self, media: Recording, settings: Mapping[str, Any]) -> np.ndarray:
        """Prepare one recording -> `(3, frames, bins + 1)`."""
        return self.clips(by_peak(self.waveform(media, settings["sampling_rate"])), settings).numpy()

    def waveform(self, media: Recording, rate: float) -> Tensor:
        """Mix the channels of a recording and resample it -> `(N,)`."""
        samples = torch.from_numpy(media.samples).mean(dim=0, keepdim=True)
        return resample(samples, media.sampling_rate, rate)[0]

    def clips(self, waveform: Tensor, settings: Mapping[str, Any] | None = None) -> Tensor:
        """Compute the clips of a segment, in silence if it is short -> `(3, frames, bins + 1)`."""
        settings = settings or {name: getattr(self, name) for name in self.SETTINGS}
        frames = CLIPS * settings["num_frames"] + (CLIPS + 1) * settings["gap"]
        least = (frames - 1) * SHIFT * settings["playback_speed"] + SHIFT * settings["playback_speed"] // 2
        options = {name: settings[name] for name in ("num_frames", "num_mel_bins", "gap", "playback_speed")}
        return spectrograms(centred_in_silence(waveform, least), **options)

    def batch(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {self.model_input_names[0]: np.concatenate(arrays)}


class HfvlmMERLOTReserveTokenizer(HfvlmTokenizer):
    """The authors' byte pairs of lower-case letters without accents. Nothing is put around texts; they are cut to the
    15 tokens of those that are compared."""

    DEFAULTS = {
        "pad_token": "<|PAD|>",
        "bos_token": "<|START|>",
        "eos_token": "<|END|>",
        "mask_token": "<|MASK|>",
        "unk_token": "<|UNK|>",
        "model_max_length": 15,
    }
    engine_of = staticmethod(engine_from_json)


class HfvlmMERLOTReserveProcessor(MultiEncoderProcessor):
    """MERLOT Reserve's inputs.

    `processor(images=..., text=..., audio=...)` prepares what is compared, `segments` and `join` the segments of
    videos that are encoded together, `questions` and `video_question` those of the fine-tuned models.

    Example:
        >>> segments = processor.segments("lemonade.mp4", most=8)
        >>> segments[0].text = "in this video i'll be<|MASK|>"
        >>> inputs = processor.join(segments)
        >>> output = model(**inputs)
        >>> labels = model.get_text_features(**processor(text=["making lemonade", "fixing a bike"])).pooler_output
        >>> model.label_logits(output.embeds, inputs["input_ids"], labels).softmax(dim=-1)

    Args:
        image_processor: of frames.
        tokenizer: of texts.
        feature_extractor: of audio.
        num_audio_tokens: that the model makes of a clip.
    """

    num_audio_tokens: Annotated[int, whole(1, 2**10)]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        num_audio_tokens: int = 6,
        **kwargs: Any,
    ):
        self.set_arguments(num_audio_tokens=num_audio_tokens)
        super().__init__(image_processor, tokenizer, feature_extractor, **kwargs)

    def ids(self, text: str | Sequence[int]) -> list[int]:
        """Encode a text whole; ids stay."""
        # Without the warning that a text is longer than those that are compared.
        return self.tokenizer.encode(text, verbose=False) if isinstance(text, str) else [int(token) for token in text]

    def token(self, name: str) -> int:
        """Return the id of one of the tokens with a meaning of their own, such as "AUDIOSPAN"."""
        return int(self.tokenizer.convert_tokens_to_ids(f"<|{name}|>"))

    def segments(
        self,
        source: Any,
        audio: Any = None,
        *,
        seconds: float = SEGMENT_SECONDS,
        start: float = 0.0,
        most: int | None = None,
        allow_urls: bool | Collection[str] = False,
        **settings: Any,
    ) -> list[ReserveSegment]:
        """Cut a video into segments with the frame in their middle and their audio. Black bars are cut off.

        Args:
            source: a video with audio, as `hfvlm.media.read_video` and `read_audio` take it.
            audio: another source of its audio, such as one for a video of frames.
            seconds: of a segment.
            start: of the first, in seconds.
            most: segments; None for all. The video's last second is left out.
            allow_urls: see `read_video`.
            **settings: of the feature extractor, for this call.

        Raises:
            MediaError: the video cannot be read, has no audio, or is shorter than a segment.
        """
        check_number("seconds", seconds, 0, 600, open_low=True)
        check_number("start", start, 0)
        options = self.feature_extractor.settings_for(settings)
        recorded = self.recorded(source, audio, options, allow_urls=allow_urls)
        last = recorded.seconds - LEFT_OUT_SECONDS
        number = max(ceil((last - start) / seconds) - 1, 0)
        starts = [start + i * seconds for i in range(number if most is None else min(number, most))]
        if not starts:
            raise MediaError(
                f"{recorded.video.name}: {last + 1:.1f} s hold no segment of {seconds:g} s from {start:g} s on."
            )
        rate = recorded.video.num_frames / recorded.video.seconds
        frames = recorded.frames([ceil((at + seconds / 2) * rate - 1e-6) for at in starts])
        top, bottom, left, right = without_bars(frames)
        return [
            ReserveSegment(
                frame=frame[top:bottom, left:right],
                clips=self.feature_extractor.clips(recorded.piece(at, at + seconds), options),
                start=at,
                end=at + seconds,
            )
            for frame, at in zip(frames, starts, strict=True)
        ]

    def moment(
        self,
        source: Any,
        audio: Any = None,
        *,
        span: tuple[float, float] | None = None,
        subtitles: Sequence[Mapping[str, Any]] = (),
        num_segments: int = TVQA_SEGMENTS,
        allow_urls: bool | Collection[str] = False,
    ) -> tuple[list[ReserveSegment], tuple[float, float]]:
        """Cut a video around a moment, as TVQA's authors do: segments of 14/3 s, as many before as after it.

        Args:
            source: a video with audio, as in `segments`.
            audio: likewise.
            span: when the moment begins and ends, in seconds; None for the whole video, of which the middle is taken.
            subtitles: `{"start", "end", "text"}` each, in seconds; a segment has the text of those whose middle it
                holds.
            num_segments: at most; there are fewer of a video that is shorter.
            allow_urls: see `read_video`.

        Returns:
            The segments, and the moment in shares of the time that they last, as `video_question` takes them.

        Raises:
            MediaError: the video cannot be read, or has no audio.
            ValueError: the span ends before it begins, or after the video.
        """
        options = self.feature_extractor.settings_for({"gap": 0, "sampling_rate": TVQA_RATE})
        recorded = self.recorded(source, audio, options, allow_urls=allow_urls)
        starts, shares = around(span, recorded.video.seconds, num_segments)
        frames = recorded.frames(
            [round(middle * recorded.rate_of_frames) for middle in middles(starts, recorded.video)]
        )
        texts = texts_between(starts, subtitles)
        found = [
            ReserveSegment(
                frame=frame,
                text=text,
                clips=self.feature_extractor.clips(recorded.piece(at, at + TVQA_SECONDS), options),
                start=at,
                end=at + TVQA_SECONDS,
            )
            for frame, text, at in zip(frames, texts, starts, strict=True)
        ]
        return found, shares

    def recorded(
        self, source: Any, audio: Any, options: Mapping[str, Any], *, allow_urls: bool | Collection[str]
    ) -> Recorded:
        """Read a video and its audio, scaled by its peak."""
        video = read_video(source, allow_urls=allow_urls)
        sound, rate = read_audio(source if audio is None else audio, allow_urls=allow_urls), options["sampling_rate"]
        return Recorded(video, by_peak(self.feature_extractor.waveform(sound, rate)), rate, sound.seconds)

    def silence(self) -> Tensor:
        """Return the clips of a segment that has no audio, all zeros -> `(3, frames, bins + 1)`."""
        extractor = self.feature_extractor
        return torch.zeros(CLIPS, extractor.num_frames, extractor.num_mel_bins + 1)

    def join(
        self, segments: Sequence[ReserveSegment], *, max_length: int = JOINT_LENGTH, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Put the segments of one video into the inputs of `HfvlmMERLOTReserveModel`, in a batch of one.

        Args:
            segments: at most 8, each with a text, or its audio where the text is None.
            max_length: tokens that text and audio are padded or cut to.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: there are none or too many, or one has neither text nor audio.
        """
        if not 0 < len(segments) <= MOST_SEGMENTS:
            raise ValueError(f"{len(segments)} segments; a video has 1 to {MOST_SEGMENTS}.")
        ids: list[int] = []
        places: list[int] = []
        for i, segment in enumerate(segments):
            if segment.text is not None:
                new = self.ids(segment.text)
                places += [CLIPS * i] * len(new)
            elif segment.clips is not None:
                new = [self.token("AUDIOSPAN")] * (CLIPS * self.num_audio_tokens)
                places += [CLIPS * i + k // self.num_audio_tokens for k in range(len(new))]
            else:
                raise ValueError(f"Segment {i} has neither a text nor clips of audio.")
            ids += new
        if len(ids) > max_length:
            logger.warning("%d tokens of text and audio are cut to %d.", len(ids), max_length)
        clips = [
            self.silence() if segment.text is not None else torch.as_tensor(segment.clips) for segment in segments
        ]
        at = torch.tensor(padded(places, max_length, -1))
        inputs = {
            "input_ids": torch.tensor(padded(ids, max_length, self.token("PAD"))),
            "segment_ids": at.div(CLIPS, rounding_mode="floor"),
            "audio_ids": at,
            "pixel_values": self.frames([segment.frame for segment in segments]),
            "input_features": torch.cat(clips).float(),
        }
        return batched(inputs, return_tensors)

    def frames(self, images: Sequence[Any], **settings: Any) -> Tensor:
        """Prepare images -> `(S, 3, H, W)`."""
        return self.image_processor(list(images), return_tensors="pt", **settings)["pixel_values"]

    def choice(self, query: Sequence[int], sign: str, answer: str | Sequence[int], length: int) -> list[int]:
        """Lay out a query, a sign such as "answer: ", an answer, cut, and the mask that is scored."""
        whole = [*query, *self.ids(sign), *self.ids(answer)]
        return [*whole[: length - 1], self.token("MASK")]

    def questions(
        self,
        images: Any,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        reasons: Sequence[Sequence[str]] | None = None,
        labels: Sequence[int] | None = None,
        *,
        max_length: int = VCR_LENGTH,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare VCR's questions for `HfvlmMERLOTReserveForMultipleChoice`.

        People and things that a question names by boxes come as the authors wrote them: "Person 1", or "the dog" for
        the only one, the boxes being drawn into the image.

        Args:
            images: one of each question.
            questions: B.
            answers: C of each.
            reasons: C of each, for the second question of each image, which names the right answer.
            labels: the right answers, which `reasons` need.
            max_length: tokens that all are padded or cut to.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: numbers of images, questions, answers, reasons or labels do not agree.
        """
        rows = [
            [self.choice(self.ids(question), "answer: ", answer, max_length) for answer in some]
            for question, some in zip(questions, answers, strict=True)
        ]
        table = [rows]
        if reasons is not None:
            if labels is None or len(labels) != len(questions):
                raise ValueError("reasons need labels: one right answer of each question.")
            told = [f"{q} Answer: {some[i]}" for q, some, i in zip(questions, answers, labels, strict=True)]
            table.append(
                [
                    [self.choice(self.ids(query), "rationale: ", reason, max_length) for reason in some]
                    for query, some in zip(told, reasons, strict=True)
                ]
            )
        if len({len(some) for part in table for some in part}) != 1:
            raise ValueError("All questions need as many answers, and as many reasons.")
        pixels = self.frames(images if isinstance(images, list | tuple) else [images], turn_tall=True)
        if len(pixels) != len(questions):
            raise ValueError(f"{len(pixels)} images for {len(questions)} questions; each needs one.")
        pad = self.token("PAD")
        ids = torch.tensor([[[padded(row, max_length, pad) for row in some] for some in part] for part in table])
        ids = ids.transpose(0, 1) if reasons is not None else ids[0]
        return batched({"input_ids": ids, "pixel_values": pixels}, return_tensors, rows=False)

    def video_question(
        self,
        segments: Sequence[ReserveSegment],
        question: str,
        answers: Sequence[str],
        localisation: tuple[float, float] | None = None,
        *,
        max_length: int = TVQA_LENGTH,
        num_segments: int = TVQA_SEGMENTS,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare one of TVQA's questions for `HfvlmMERLOTReserveForVideoMultipleChoice`, in a batch of one.

        Its audio has no gaps: `segments, localisation = processor.moment(video, span=(61.2, 66.0))`.

        Args:
            segments: at most `num_segments`, each with clips of audio and the subtitles as text, or None.
            question: one.
            answers: C.
            localisation: where in the segments' time the question's moment begins and ends, as shares of 0..1.
            max_length: tokens that all are padded or cut to.
            num_segments: that the model was trained on; missing ones are black and silent.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: there are no segments, or too many, or one has no audio.
        """
        if not 0 < len(segments) <= num_segments:
            raise ValueError(f"{len(segments)} segments; a question is about 1 to {num_segments} (num_segments).")
        query = self.ids(question)
        if localisation is not None:
            # Of moments that are longer than the segments, the authors write shares beyond 0..1.
            first, last = (int(check_number("localisation", share, -1000, 1000) * 100) for share in localisation)
            query = [*self.ids(f"{first} to {last}"), self.token("START"), *query]
        subtitles = [[] if segment.text is None else self.ids(segment.text) for segment in segments]
        subtitles += [[] for _ in range(num_segments - len(segments))]
        audio = [[self.token("AUDIOSPAN")] * (CLIPS * self.num_audio_tokens)] * num_segments
        choices = [self.choice(query, "answer: ", answer, max_length) for answer in answers]
        inputs = dict[str, Tensor]()
        for prefix, rows in (("", subtitles), ("audio_", audio)):
            laid = [laid_out([choice, *rows], max_length, self.token("PAD")) for choice in choices]
            inputs[f"{prefix}input_ids"] = torch.tensor([ids for ids, _ in laid])
            inputs[f"{prefix}segment_ids"] = torch.tensor([places for _, places in laid])
        if any(segment.clips is None for segment in segments):
            raise ValueError("Every segment needs its clips of audio; `processor.segments` makes them.")
        missing = num_segments - len(segments)
        frames = self.frames([segment.frame for segment in segments], turn_tall=True)
        clips = torch.cat([torch.as_tensor(segment.clips).float() for segment in segments])
        clips = torch.cat([clips, self.silence().repeat(missing, 1, 1)])
        clips[..., -1] = 1.0
        inputs["pixel_values"] = torch.cat([frames, frames.new_zeros(missing, *frames.shape[1:])])
        inputs["input_features"] = clips
        return batched(inputs, return_tensors)


def padded(values: Sequence[int], length: int, pad: int) -> list[int]:
    """Pad or cut a row to a length."""
    return [*values[:length], *[pad] * (length - len(values))]


def laid_out(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[list[int], list[int]]:
    """Put rows after one another -> ids and the number of each one's row, padded or cut to a length."""
    ids = [token for row in rows for token in row]
    places = [i for i, row in enumerate(rows) for _ in row]
    return padded(ids, length, pad), padded(places, length, 0)


def batched(inputs: Mapping[str, Tensor], return_tensors: str, *, rows: bool = True) -> BatchFeature:
    """Make a batch, of one row if they are not several already.

    Raises:
        ValueError: `return_tensors` is neither "pt" nor "np".
    """
    if return_tensors not in ("pt", "np"):
        raise ValueError(f'return_tensors must be "pt" or "np", not {return_tensors!r}.')
    data = {name: value.unsqueeze(0) if rows else value for name, value in inputs.items()}
    return BatchFeature(data if return_tensors == "pt" else {name: value.numpy() for name, value in data.items()})
