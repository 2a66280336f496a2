"""`hfvlm watch`: what happens in a video, what is spoken in it, and where the things are that the answer names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import print_json, print_text, status
from hfvlm.cli.options import Device, Folder, Json, Quiet, checked_device

MODEL = "A folder or a Hub id of "


def watch(  # noqa: PLR0913 (options)
    folder: Folder,
    video: Annotated[Path, typer.Argument(help="The video.", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Argument(help="About the video.")] = "What happens in this video?",
    recognizer: Annotated[str | None, typer.Option(help=MODEL + "what transcribes its speech, as Whisper.")] = None,
    vad: Annotated[
        bool, typer.Option("--vad", help="Find where somebody speaks first, by Silero's detector.")
    ] = False,
    aligner: Annotated[str | None, typer.Option(help=MODEL + "what times each word, as wav2vec 2.0 with CTC.")] = None,
    audio_tagger: Annotated[str | None, typer.Option(help=MODEL + "what tells speech from music.")] = None,
    frame_tagger: Annotated[str | None, typer.Option(help=MODEL + "a CLIP that tags frames.")] = None,
    tags: Annotated[
        Path | None, typer.Option(help="A file of the tags, one a line.", exists=True, dir_okay=False)
    ] = None,
    namer: Annotated[
        str | None, typer.Option(help=MODEL + "a language model that finds what the answer names.")
    ] = None,
    detector: Annotated[str | None, typer.Option(help=MODEL + "what finds these things, as GroundingDINO.")] = None,
    segmenter: Annotated[str | None, typer.Option(help=MODEL + "what cuts them out, as SAM.")] = None,
    embedder: Annotated[str | None, typer.Option(help="A folder of hfvlm's CLIP, which confirms them.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 256,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a question about a video, with its speech, and find what the answer names.

    Each step has an option, and is left out without it.
    """
    check_needs(
        {
            "--vad": (vad, recognizer, "--recognizer"),
            "--aligner": (aligner, recognizer, "--recognizer"),
            "--audio-tagger": (audio_tagger, recognizer, "--recognizer"),
            "--frame-tagger": (frame_tagger, tags, "--tags"),
            "--tags": (tags, frame_tagger, "--frame-tagger"),
            "--segmenter": (segmenter, detector, "--detector"),
            "--embedder": (embedder, detector, "--detector"),
        }
    )
    names = tags_in(tags) if tags else []
    check_models(
        {
            "folder": (str(folder), "AutoModelForImageTextToText"),
            "--recognizer": (recognizer, "AutoModelForSpeechSeq2Seq"),
            "--aligner": (aligner, "AutoModelForCTC"),
            "--audio-tagger": (audio_tagger, "AutoModelForAudioClassification"),
            "--frame-tagger": (frame_tagger, "AutoModelForZeroShotImageClassification"),
            "--namer": (namer, "AutoModelForCausalLM"),
            "--detector": (detector, "AutoModelForZeroShotObjectDetection"),
            "--segmenter": (segmenter, "AutoModelForMaskGeneration"),
            "--embedder": (embedder, "AutoModel"),
        }
    )
    check_parts(folder, recognizer=recognizer, detector=detector, embedder=embedder)
    device = place(device)
    found: dict[str, Any] = {"question": question}
    if recognizer:
        with status("listening"):
            found["transcript"] = listen(
                video, recognizer, device, vad=vad, aligner=aligner, audio_tagger=audio_tagger
            )
    if frame_tagger:
        with status("tagging frames"):
            found["tags"] = tag_frames(video, frame_tagger, device, names)
    with status(f"answering with {folder}"):
        found["answer"], ask = answer(folder, video, question, found.get("transcript", ()), max_new_tokens, device)
    if namer or detector:
        asked = language_model(namer, device) if namer else ask
        found |= name_entities_of(found["answer"], asked, found.get("tags", ()))
    if detector:
        with status("following it"):
            labels = [entity["tag"] for entity in found["entities"]]
            found["tracks"] = follow(video, labels, device, detector, segmenter, embedder)
    if as_json:
        print_json(found)
    else:
        for line in lines_of(found):
            print_text(line)


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was found as lines to read: its step, a colon, and times in seconds, words or boxes."""
    for name, value in found.items():
        if isinstance(value, str):
            yield f"{name}: {value}"
        elif not value:
            yield f"{name}: none"
        for each in value if isinstance(value, list) else ():
            yield f"{name}: {SHOWN.get(name, str)(each)}"


def shown_segment(segment: Mapping[str, Any]) -> str:
    """Write a segment of speech, and below it its words, with their times."""
    heard = [segment, *segment.get("words", ())]
    return "\n    ".join(f"{each['start']:.2f}-{each['end']:.2f} s: {each['text']}" for each in heard)


def shown_track(track: Mapping[str, Any]) -> str:
    """Write a track, and below it its boxes, by their frames."""
    boxes = (f"frame {frame}: " + ", ".join(f"{v:.1f}" for v in box) for frame, box in track["boxes"].items())
    return "\n    ".join([track["label"], *boxes])


SHOWN: dict[str, Callable[[Any], str]] = {
    "transcript": shown_segment,
    "entities": lambda entity: f"{entity['tag']}, characters {entity['start']} to {entity['end']} of the answer",
    "tracks": shown_track,
}


def tags_in(path: Path) -> list[str]:
    """Read the tags of a file, one a line.

    Raises:
        typer.BadParameter: it has none, or is no text.
    """
    try:
        names = [name.strip() for name in path.read_text(encoding="utf-8-sig").splitlines() if name.strip()]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path}: no text in UTF-8 ({error}).", param_hint="--tags") from error
    if not names:
        raise typer.BadParameter(f"{path}: has no tags; write one a line.", param_hint="--tags")
    return list(dict.fromkeys(names))


def check_models(given: Mapping[str, tuple[str | None, str]]) -> None:
    """Refuse models of other kinds before the first step has computed anything.

    Args:
        given: by option the model's folder or Hub id, and the Auto class of transformers that loads it.

    Raises:
        typer.BadParameter: a model is not there, or does something else.
    """
    import transformers

    from hfvlm.inference.adapters import check_does, config_of

    for option, (name, auto) in given.items():
        if name is None:
            continue
        try:
            check_does(name, getattr(transformers, auto), config_of(name))
        except (OSError, ValueError) as error:
            known = str(error) if name in str(error) else f"{name}: {error}"
            raise typer.BadParameter(known, param_hint=option) from error


def check_parts(folder: Path, *, recognizer: str | None, detector: str | None, embedder: str | None) -> None:
    """Refuse what a step would find missing after the others have computed.

    Raises:
        typer.BadParameter: the model takes no transcripts, or the embedder embeds nothing.
        ImportError: what finds scenes is not installed.
    """
    from hfvlm.inference.adapters import model_class, processor_of
    from hfvlm.media.sources import import_extra

    if recognizer and "transcript" not in str(processor_of(folder).chat_template):
        raise typer.BadParameter("the model takes no transcripts.", param_hint="--recognizer")
    if detector:
        import_extra("scenedetect", "scenes", "Finding scenes")
    if embedder and not hasattr(kind := model_class(embedder), "modalities"):
        raise typer.BadParameter(f"{embedder}: {kind.__name__} embeds nothing.", param_hint="--embedder")


def place(device: str) -> str:
    """Return the device that models compute on, by name."""
    from hfvlm.inference.placement import find_device

    return str(find_device(checked_device(device)))


def check_needs(options: dict[str, tuple[Any, Any, str]]) -> None:
    """Refuse options of steps without the step that they belong to.

    Args:
        options: by name the value, that of the option that it needs, and the other's name.

    Raises:
        typer.BadParameter: one is given without the other.
    """
    for name, (given, needed, other) in options.items():
        if given and not needed:
            raise typer.BadParameter(f"needs {other}.", param_hint=name)


def name_entities_of(text: str, ask: Callable[[str], str], tags: Sequence[str]) -> dict[str, Any]:
    """Find what an answer names, by a language model's reply."""
    from hfvlm.models.pg_video_llava.entities import name_entities

    with status("finding what the answer names"):
        return {"entities": [vars(entity) for entity in name_entities(text, ask, tags)]}


def follow(
    video: Path, labels: list[str], device: str, detector: str, segmenter: str | None, embedder: str | None
) -> list[dict[str, Any]]:
    """Find where things are in a video -> of each track its label, and its boxes in pixels by frame."""
    from hfvlm.inference.video_grounding import VideoGrounder

    grounder = VideoGrounder.from_pretrained(detector, segmenter=segmenter, embedder=embedder, device=device)
    return [
        {"label": track.label, "boxes": {frame: each.box_xyxy for frame, each in sorted(track.found.items())}}
        for track in grounder(str(video), labels)
    ]


def listen(
    video: Path, recognizer: str, device: str, *, vad: bool, aligner: str | None, audio_tagger: str | None
) -> list[dict[str, Any]]:
    """Transcribe a video's speech -> segments, with their words where there is an aligner."""
    from transformers import AutoModelForCTC, AutoProcessor, pipeline

    from hfvlm.models.pg_video_llava.speech import align_words, find_speech
    from hfvlm.models.pg_video_llava.transcripts import is_spoken, recognized, tags_of, waveform

    wave = waveform(str(video))
    parts = find_speech(wave) if vad else None
    segments = recognized(wave, pipeline("automatic-speech-recognition", recognizer, device=device), parts)
    if audio_tagger:
        tagger = pipeline("audio-classification", audio_tagger, device=device)
        segments = [segment for segment in segments if is_spoken(tags_of(wave, segment, tagger))]
    if aligner:
        model, processor = AutoModelForCTC.from_pretrained(aligner).to(device), AutoProcessor.from_pretrained(aligner)
        segments = [segment | {"words": align_words(wave, segment, model, processor)} for segment in segments]
    return segments


def tag_frames(
    video: Path, tagger: str, device: str, names: list[str], *, count: int = 16, threshold: float = 0.1, most: int = 10
) -> list[str]:
    """Name what frames show, spread over the video: the tags that most of them have."""
    from PIL import Image
    from transformers import pipeline

    from hfvlm.media import read_video
    from hfvlm.models.pg_video_llava.entities import common_tags

    read = read_video(str(video))
    places = sorted({len(read) * (2 * i + 1) // (2 * count) for i in range(count)})
    classify = pipeline("zero-shot-image-classification", tagger, device=device)
    frames = [Image.fromarray(frame) for frame in read.frames(places)]
    scores = classify(frames, candidate_labels=names)
    return common_tags([[each["label"] for each in own if each["score"] >= threshold] for own in scores], most)


def answer(
    folder: str | Path, video: Path, question: str, segments: Any, max_new_tokens: int, device: str
) -> tuple[str, Callable[[str], str]]:
    """Answer with a model of videos, PG-Video-LLaVA with what is spoken; return the answer and the model's own replies
    to texts."""
    from hfvlm.inference.chat import Chat

    chat = Chat.from_pretrained(folder, dtype="auto", device=device)
    text = " ".join(segment["text"] for segment in segments)
    content: list[dict[str, Any]] = [{"type": "text", "text": question}, {"type": "video", "video": str(video)}]
    content += [{"type": "transcript", "text": text}] if text else []
    processor, model = chat.processor, chat.model
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(videos=[str(video)], text=prompt).to(model.device, model.dtype)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    (found,) = processor.batch_decode(model.generate(**inputs, **options), new_tokens_only=inputs)
    for stop in processor.stop_strings:
        found = found.partition(stop)[0]
    return found.strip(), Chat(model, processor).ask


def language_model(folder: str, device: str) -> Callable[[str], str]:
    """Return the replies of a language model of transformers."""
    from transformers import pipeline

    generate = pipeline("text-generation", folder, device=device)
    tokenizer: Any = generate.tokenizer

    def ask(text: str) -> str:
        prompt: Any = [{"role": "user", "content": text}] if tokenizer.chat_template else text
        reply = generate(prompt, max_new_tokens=256, do_sample=False, return_full_text=False)[0]["generated_text"]
        return reply if isinstance(reply, str) else reply[-1]["content"]

    return ask
