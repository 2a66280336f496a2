"""The objects of a video that an answer names, as queries of a detector.

Source: the grounding modules of https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f. A tagger names the objects of
each frame; a language model matches words of the answer with these tags; its reply is parsed here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


def common_tags(tags_of_frames: Iterable[Iterable[str]], most: int = 10) -> list[str]:
    """Return the tags that most frames have, the most common first. The authors' counts include earlier videos."""
    return [tag for tag, _ in Counter(tag for tags in tags_of_frames for tag in tags).most_common(most)]


def name_entities(text: str, ask: Callable[[str], str], tags: Sequence[str] = ()) -> list["Entity"]:
    """Find the objects that a text names, with a language model.

    Example:
        >>> answer = chat.ask("What happens?", videos=["clip.mp4"])
        >>> entities = name_entities(answer, hfvlm.Chat(chat.model, chat.processor).ask)

    Args:
        text: an answer about a video.
        ask: a prompt to its reply. The authors use GPT-3.5; any model that follows instructions will do.
        tags: objects of the video; without them, the prompt is about whatever is visible.
    """
    return read_reply(text, tags, ask(question(text, tags)))


def question(text: str, tags: Sequence[str] = ()) -> str:
    """Return the prompt whose reply `read_reply` parses."""
    known = f"one of these things: {', '.join(tags)}" if tags else "a thing, an animal or a person that can be seen"
    return (
        f"Which words of the text mean {known}?\n\nText: {text}\n\n"
        "Answer with one line for each, the words as they stand in the text, a hyphen, and the thing, as in "
        "'brown dog - dog'. Leave out things that the text does not name."
    )


@dataclass(frozen=True)
class Entity:
    """Words of a text and the tag that they mean; the text's `[start:end]`."""

    start: int
    end: int
    tag: str


def read_reply(text: str, tags: Sequence[str], reply: str) -> list[Entity]:
    """Parse the lines "words - tag" of a reply, where the text has the words and the tag is known, in the text's
    order. Without `tags` every tag is known.

    Words are found where they first stand and are no part of another. The authors' detector also gets tags whose words
    the text lacks.
    """
    found: list[Entity] = []
    lower = text.lower()
    for line in reply.splitlines():
        words, hyphen, tag = (part.strip().lower() for part in line.partition(" - "))
        start = lower.find(words)
        while start >= 0 and any(start < each.end and each.start < start + len(words) for each in found):
            start = lower.find(words, start + 1)
        if hyphen and words and start >= 0 and (tag in tags or (tag and not tags)):
            found.append(Entity(start, start + len(words), tag))
    return sorted(found, key=lambda entity: entity.start)


def marked(text: str, entities: Sequence[Entity]) -> list[tuple[str, int | None]]:
    """Split the text into pieces, entities with their numbers from 1."""
    pieces: list[tuple[str, int | None]] = []
    end = 0
    for number, entity in enumerate(entities, 1):
        pieces += [(text[end : entity.start], None), (text[entity.start : entity.end], number)]
        end = entity.end
    return [(piece, number) for piece, number in [*pieces, (text[end:], None)] if piece]
