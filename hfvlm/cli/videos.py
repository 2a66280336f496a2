"""`hfvlm watch`: what happens in a video, what is spoken in it, and where the things are that the answer names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hfvlm.cli.console import print_json, print_text, status
from hfvlm.cli.options import Folder, Json, Quiet

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
    tags: Annotated[Path | None, typer.Option(help="A file of the tags, one a line.", exists=True)] = None,
    namer: Annotated[
        str | None, typer.Option(help=MODEL + "a language model that finds what the answer names.")
    ] = None,
    detector: Annotated[str | None, typer.Option(help=MODEL + "what finds these things, as GroundingDINO.")] = None,
    segmenter: Annotated[str | None, typer.Option(help=MODEL + "what cuts them out, as SAM.")] = None,
    embedder: Annotated[str | None, typer.Option(help="A folder of hfvlm's CLIP, which confirms them.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 256,
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
    found: dict[str, Any] = {"question": question}
    if recognizer:
        with status("listening"):
            found["transcript"] = listen(video, recognizer, vad=vad, aligner=aligner, audio_tagger=audio_tagger)
    if frame_tagger and tags:
        with status("tagging frames"):
            found["tags"] = tag_frames(video, frame_tagger, tags.read_text(encoding="utf-8").split("\n"))
    with status(f"answering with {folder}"):
        found["answer"], ask = answer(folder, video, question, found.get("transcript", ()), max_new_tokens)
    if namer or detector:
        asked = language_model(namer) if namer else ask
        found |= name_and_follow(video, found["answer"], asked, found.get("tags", ()), detector, segmenter, embedder)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        for line in value if isinstance(value, list) else [value]:
            print_text(f"{name}: {line}")


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


def name_and_follow(
    video: Path,
    text: str,
    ask: Callable[[str], str],
    tags: Sequence[str],
    detector: str | None,
    segmenter: str | None,
    embedder: str | None,
) -> dict[str, Any]:
    """Find what an answer names and, with a detector, where it is in the video."""
    from hfvlm.inference.video_grounding import VideoGrounder
    from hfvlm.models.pg_video_llava.entities import name_entities

    with status("finding what the answer names"):
        entities = name_entities(text, ask, tags)
    found: dict[str, Any] = {"entities": [vars(entity) for entity in entities]}
    if detector:
        with status("following it"):
            grounder = VideoGrounder.from_pretrained(detector, segmenter=segmenter, embedder=embedder)
            tracks = grounder(str(video), [entity.tag for entity in entities])
        found["tracks"] = [
            {"label": track.label, "boxes": {frame: each.box_xyxy for frame, each in sorted(track.found.items())}}
            for track in tracks
        ]
    return found


def listen(
    video: Path, recognizer: str, *, vad: bool, aligner: str | None, audio_tagger: str | None
) -> list[dict[str, Any]]:
    """Transcribe a video's speech -> segments, with their words where there is an aligner."""
    from transformers import AutoModelForCTC, AutoProcessor, pipeline

    from hfvlm.models.pg_video_llava.speech import align_words, find_speech
    from hfvlm.models.pg_video_llava.transcripts import is_spoken, recognized, tags_of, waveform

    wave = waveform(str(video))
    parts = find_speech(wave) if vad else None
    segments = recognized(wave, pipeline("automatic-speech-recognition", recognizer), parts)
    if audio_tagger:
        tagger = pipeline("audio-classification", audio_tagger)
        segments = [segment for segment in segments if is_spoken(tags_of(wave, segment, tagger))]
    if aligner:
        model, processor = AutoModelForCTC.from_pretrained(aligner).eval(), AutoProcessor.from_pretrained(aligner)
        segments = [segment | {"words": align_words(wave, segment, model, processor)} for segment in segments]
    return segments


def tag_frames(
    video: Path, tagger: str, names: list[str], *, count: int = 16, threshold: float = 0.1, most: int = 10
) -> list[str]:
    """Name what frames show, spread over the video: the tags that most of them have."""
    from PIL import Image
    from transformers import pipeline

    from hfvlm.media import read_video
    from hfvlm.models.pg_video_llava.entities import common_tags

    read, names = read_video(str(video)), [name.strip() for name in names if name.strip()]
    places = sorted({len(read) * (2 * i + 1) // (2 * count) for i in range(count)})
    classify = pipeline("zero-shot-image-classification", tagger)
    frames = [Image.fromarray(frame) for frame in read.frames(places)]
    scores = classify(frames, candidate_labels=names)
    return common_tags([[each["label"] for each in own if each["score"] >= threshold] for own in scores], most)


def answer(
    folder: str | Path, video: Path, question: str, segments: Any, max_new_tokens: int
) -> tuple[str, Callable[[str], str]]:
    """Answer with a model of videos, PG-Video-LLaVA with what is spoken; return the answer and the model's own replies
    to texts.

    Raises:
        typer.BadParameter: there is a transcript, and the model takes none.
    """
    from hfvlm.inference.chat import Chat

    chat = Chat.from_pretrained(folder, dtype="auto")
    text = " ".join(segment["text"] for segment in segments)
    if text and "transcript" not in str(chat.processor.chat_template):
        raise typer.BadParameter("the model takes no transcripts.", param_hint="--recognizer")
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


def language_model(folder: str) -> Callable[[str], str]:
    """Return the replies of a language model of transformers."""
    from transformers import pipeline

    generate = pipeline("text-generation", folder)
    tokenizer: Any = generate.tokenizer

    def ask(text: str) -> str:
        prompt: Any = [{"role": "user", "content": text}] if tokenizer.chat_template else text
        reply = generate(prompt, max_new_tokens=256, do_sample=False, return_full_text=False)[0]["generated_text"]
        return reply if isinstance(reply, str) else reply[-1]["content"]

    return ask
