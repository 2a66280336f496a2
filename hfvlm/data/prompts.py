"""What a chat model is asked to write about an image or a video that it does not see: prompts of our own, for the
kinds of data that LLaVA (https://arxiv.org/abs/2304.08485, section 3) and Video-ChatGPT (https://arxiv.org/abs/2306.05424,
section 4) were trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A change of any prompt changes it: rows name it as their origin.
VERSION = "hfvlm-1"
PAIRS = """Write nothing else than lines in this form, each question with its answer, and each on one line:
Q: a question
A: its answer"""
RULES = """Speak of the {thing} as one who sees it. Do not speak of descriptions, lists, boxes, coordinates or of what
you were given. Claim nothing that does not follow from it."""
GIVEN_IMAGE = """You write what an assistant says about an image. You do not see the image: people have described it,
and may have listed the things in it with their place: left, top, right and bottom edge, as shares of the width and
height from 0 to 1."""
GIVEN_VIDEO = """You write what an assistant says about a video. You do not see the video: there is an account of it,
and notes on its key frames, in which there may be mistakes. Where they disagree, the account is right."""


@dataclass(frozen=True)
class Kind:
    """A kind of data to write.

    Args:
        name: as rows name it.
        modality: "image" or "video".
        task: of the writer.
        pairs: the most pairs of a question and an answer; 0 for a text, whose question is drawn from `questions`.
        questions: for texts.
    """

    name: str
    modality: str
    task: str
    pairs: int = 0
    questions: tuple[str, ...] = ()

    def messages(self, given: str) -> list[dict[str, str]]:
        """Return the messages to a chat model.

        Args:
            given: what is known, see `known_of_image` and `known_of_video`.
        """
        start = GIVEN_IMAGE if self.modality == "image" else GIVEN_VIDEO
        system = f"{start}\n{RULES.format(thing=self.modality)}"
        asked = f"{self.task}\n{PAIRS}" if self.pairs else self.task
        return [{"role": "system", "content": system}, {"role": "user", "content": f"{given}\n\n{asked}"}]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "conversation",
            "image",
            "Write a conversation of three questions that somebody asks about the image and that have a definite "
            "answer: what things there are, how many, of what colour, what they do, where they are.",
            pairs=3,
        ),
        Kind(
            "description",
            "image",
            "Describe the image in one paragraph, with all that is known about it.",
            questions=(
                "Describe this image in detail.",
                "What is to be seen here? Give a full account.",
                "Explain thoroughly what this image shows.",
                "Go through everything that you notice in the image.",
                "Write a detailed description of the image.",
                "What does this image show, and how is it composed?",
                "Describe the scene as to somebody who cannot see it.",
                "Give a comprehensive account of the image's content.",
            ),
        ),
        Kind(
            "reasoning",
            "image",
            "Write one question about the image that takes several steps of thought, as why something is so, what "
            "may come next or what has to be considered, and an answer that gives its reasons step by step.",
            pairs=1,
        ),
        Kind(
            "video-summary",
            "video",
            "Write three different questions that ask for a summary of the video, each with a detailed answer in "
            "words of its own.",
            pairs=3,
        ),
        Kind(
            "video-questions",
            "video",
            "Write three different questions about what happens in the video, in which order, how things look and "
            "move, and how they belong together, each with a detailed answer.",
            pairs=3,
        ),
    )
}
CONDENSE = """These are notes on the key frames of a video, in their order; there may be mistakes in them. Combine them
into one paragraph of at most seven sentences on the whole video. Say what things there are, how they look and where
they are. Leave out what the frames do not agree on, and numbers. Write the paragraph alone, and do not mention notes
or frames."""


def condensing(notes: str) -> list[dict[str, str]]:
    """Return the messages that ask for one text about all key frames of a video."""
    return [{"role": "user", "content": f"{notes}\n\n{CONDENSE}"}]


def known_of_image(captions: Sequence[str], boxes: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Describe what is known of an image.

    Args:
        captions: of it.
        boxes: names of things, and their left, top, right and bottom edge as shares.
    """
    lines = list(captions)
    lines += [f"{name}: [{', '.join(f'{edge:.3f}' for edge in box)}]" for name, box in boxes]
    return "\n".join(lines)


def notes_on(frames: Sequence[Mapping[str, Any]]) -> str:
    """Describe the key frames of a video: of each the caption, and captions of regions that its tags confirm."""
    return "\n".join(f"{i}. {'; '.join(frame_texts(frame, frames))}" for i, frame in enumerate(frames, start=1))


def frame_texts(frame: Mapping[str, Any], frames: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a key frame's caption, and the captions of regions that name nothing but what its tags say.

    A word counts if it is a tag of any frame; as in the authors' code, a caption is left out that names a thing which
    is no tag of its own frame, or names none at all.
    """
    known = {tag.lower() for each in frames for tag in each.get("tags") or ()}
    own = {tag.lower() for tag in frame.get("tags") or ()}
    caption = frame.get("caption")
    texts = [caption.strip()] if caption else []
    for region in frame.get("regions") or ():
        named = {word for word in region.lower().replace(",", " ").split() if word in known}
        texts += [region.strip()] if named and named <= own else []
    return texts


def known_of_video(captions: Sequence[str], condensed: str) -> str:
    """Describe what is known of a video: people's account, if there is one, and the condensed notes."""
    account = [f"The account: {' '.join(captions)}"] if captions else []
    notes = [f"The notes: {condensed}"] if condensed else []
    return "\n".join([*account, *notes])
