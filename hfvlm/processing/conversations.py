"""The conversations of the LLaVA family as one text, for prompts and for training.

Source: llava/conversation.py and llava/train/train.py of https://github.com/haotian-liu/LLaVA at c121f04, which
follow FastChat.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers.utils import logging

from hfvlm.processing.assembly import IGNORE

logger = logging.get_logger(__name__)

Labels = list[int]
Turns = Sequence[tuple[str, str]]

# Images go to the front of their message, as LLaVA's authors train and evaluate.
IMAGES_FIRST = (
    "{%- macro text_of(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- set texts = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
    "{%- if images -%}{{- ('<image>\n' * (images | length) ~ (texts | trim)) | trim -}}"
    "{%- else -%}{{- texts -}}{%- endif -%}{%- endif -%}{%- endmacro -%}"
)
_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = text_of(messages[0]['content']) -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set system = SYSTEM -%}{%- endif -%}"
)


@dataclass(frozen=True)
class Encoder:
    """A tokenizer: the start token first, one id for each image.

    Args:
        encode: of a text, its ids.
        legacy: it puts a space at the start of a text and after each special token, as LLaMA's first one does.
    """

    encode: Callable[[str], list[int]]
    legacy: bool = True

    def count(self, text: str) -> int:
        return len(self.encode(text))


@dataclass(frozen=True)
class Conversation(ABC):
    """Turns of two roles, each with its name, and a separator after each.

    Args:
        system: the beginning of the text; a message of the role "system" replaces it.
        roles: names of the user and of the assistant.
        separators: after the system text and each user's turn, and after each assistant's.
        colon: between a name and a message.
        examples: turns that every conversation begins with.
        stop: texts that end an answer, where it is not the end token.
        tagged: an image in the first message is a turn of its own, between tags.
        content: the Jinja macro `text_of(content)`, a message's text with its images.
    """

    system: str
    roles: tuple[str, str]
    separators: tuple[str, str]
    colon: str = ": "
    examples: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    tagged: bool = False
    content: str = IMAGES_FIRST
    # An answer to nothing is left out in training.
    skips_first_answer: ClassVar[bool] = True
    # Whether there are tokens that a checkpoint has around images in training.
    marks_images: ClassVar[bool] = True

    def chat_template(self) -> str:
        """Make the Jinja template that renders messages exactly as the authors do."""
        users, assistants = self.separators
        names = [name + self.colon for name in self.roles]
        shown = "".join(names[i % 2] + text + self.separators[i % 2] for i, text in enumerate(self.examples))
        image = names[0] + "<Image><image></Image>" + users + names[1] + "Received." + assistants
        tag = (
            "{%- if loop.first and message['content'] is not string and message['content']"
            " | selectattr('type', 'equalto', 'image') | list -%}"
            f"{{{{- {_quoted(image)} -}}}}"
            "{{- NAME ~ message['content'] | selectattr('type', 'equalto', 'text')"
            " | map(attribute='text') | join('') | trim ~ END -}}{%- else -%}"
        )
        turn = "{{- NAME ~ text_of(message['content']) ~ END -}}"
        return (
            self.content
            + _SYSTEM.replace("SYSTEM", _quoted(self.system))
            + f"{{{{- system ~ {_quoted(users + shown)} -}}}}{{%- for message in messages -%}}"
            + f"{{%- if message['role'] == 'assistant' -%}}{{{{- {_quoted(names[1])} -}}}}"
            + generated(f"{{{{- text_of(message['content']) ~ {_quoted(assistants)} -}}}}")
            + "{%- else -%}"
            + (tag + turn + "{%- endif -%}" if self.tagged else turn)
            .replace("NAME", _quoted(names[0]))
            .replace("END", _quoted(users))
            + "{%- endif -%}{%- endfor -%}"
            + f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(names[1].rstrip(' '))} -}}}}{{%- endif -%}}"
        )

    @property
    def marks(self) -> set[str]:
        """Texts that separate turns in training; no message can contain them."""
        return set()

    def text(self, turns: Turns, render: Callable[[Turns], str]) -> str:
        """Render the text of training, of `turns` of "user" and "assistant"; `render` applies the chat template."""
        return render(turns)

    @abstractmethod
    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        """Label the ids of `text` that the authors train on, -100 elsewhere.

        The authors count the tokens of each round of the text apart; where the counts do not add up, because a text is
        split differently there, all of it is left out.
        """

    def _by_rounds(
        self, rounds: list[str], mark: str, ids: list[int], encode: Encoder, *, start: int, spare: int, later: int
    ) -> Labels:
        """Label what follows `mark` in each round. A round starts at `start`, its question is `spare` tokens shorter
        than alone, and after the first both are longer by `later`."""
        labels, end = [IGNORE] * start + ids[start:], start
        for i, part in enumerate(rounds):
            question, found, answer = part.partition(mark)
            if not found or mark in answer:
                break
            shift = later if i else 0
            length = encode.count(question + mark) - spare + shift
            labels[end : end + length] = [IGNORE] * min(length, max(len(ids) - end, 0))
            end += encode.count(part) + shift
        if end != len(ids):
            logger.warning(
                f"Not trained on: its rounds have {end} tokens, the whole {len(ids)}: {''.join(rounds)[-60:]!r}"
            )
            return [IGNORE] * len(ids)
        return labels


@dataclass(frozen=True)
class Vicuna(Conversation):
    """`USER: ... ASSISTANT: ...</s>`."""

    @property
    def marks(self) -> set[str]:
        return {self.separators[1], f"{self.roles[1]}: "}

    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        users, assistants = self.separators
        rounds = [part for part in text.split(assistants) if part]
        mark = f"{users}{self.roles[1]}: "
        # Alone, a later round begins with a space that a tokenizer without the "legacy" behaviour does not put.
        return self._by_rounds(rounds, mark, ids, encode, start=1, spare=2, later=0 if encode.legacy else -1)


@dataclass(frozen=True)
class Chatml(Conversation):
    """`<|im_start|>user\n...<|im_end|><|im_start|>assistant\n...<|im_end|>`."""

    @property
    def marks(self) -> set[str]:
        return {*self.separators, *self.roles}

    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        end = self.separators[0]
        parts = text.split(end)
        rounds = [end.join(parts[:3]), *(end.join(parts[i : i + 2]) for i in range(3, len(parts), 2))]
        rounds = [part for part in rounds if part]
        starts = encode.count("")
        if not starts:
            # The authors forget the separator after a round, and so train on nothing at all. Here it belongs to it.
            rounds = [part + end for part in rounds]
        return self._by_rounds(rounds, end + self.roles[1], ids, encode, start=0, spare=starts, later=0)


@dataclass(frozen=True)
class Human(Conversation):
    """`###Human: ...###Assistant: ...###`, which is trained on as `### Human: ...` with a line for each turn."""

    skips_first_answer = False

    def text(self, turns: Turns, render: Callable[[Turns], str]) -> str:
        return f"{self.system}\n\n" + "".join(self._line(*turn) for turn in turns) + "### "

    def _line(self, role: str, text: str) -> str:
        return f"### {self.roles[role == 'assistant']}: {text}\n"

    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        start = encode.count(f"{self.system}\n\n")
        labels = [IGNORE] * start + ids[start:]
        for turn in turns:
            length = encode.count(self._line(*turn))
            if turn[0] == "user":
                # The first two tokens of a user's turn end the answer before it.
                labels[start + 2 : start + length] = [IGNORE] * (length - 2)
            start += length
        return labels[: len(ids)]


@dataclass(frozen=True)
class Llama2(Conversation):
    """`[INST] <<SYS>>...<</SYS>> ... [/INST] ... </s>`; the separators are the start and the end token."""

    @property
    def marks(self) -> set[str]:
        return {*self.separators, "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}

    def chat_template(self) -> str:
        before, after = self.separators
        wrapped = "('<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if system else '')"
        return (
            self.content
            + _SYSTEM.replace("SYSTEM", _quoted(self.system))
            + "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
            + generated(f"{{{{- ' ' ~ text_of(message['content']) ~ {_quoted(' ' + after)} -}}}}")
            + "{%- else -%}"
            # The first start token is the tokenizer's.
            + f"{{{{- ('' if loop.first else {_quoted(before)}) ~ '[INST] ' ~ ({wrapped} if loop.first else '')"
            + " ~ text_of(message['content']) ~ ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
        )

    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        rounds = [part for part in text.split(self.separators[1]) if part]
        return self._by_rounds(rounds, "[/INST] ", ids, encode, start=1, spare=2, later=0)


@dataclass(frozen=True)
class Headed(Conversation):
    """Turns that begin with their role's name in special tokens, and end in another; so does the system text
    (https://github.com/LLaVA-VL/LLaVA-NeXT, llava/conversation.py and llava/train/train.py).

    Args:
        head: what is around a role's name.
        always: texts of one token that are trained on wherever they stand, whoever speaks.
        trims: messages have no blanks around them, as in Llama 3's own template.
    """

    head: tuple[str, str] = ("", "")
    always: tuple[str, ...] = ()
    trims: bool = False

    @property
    def marks(self) -> set[str]:
        return {self.separators[0].strip(), self.head[0]}

    def chat_template(self) -> str:
        begin, after = self.head
        text = "text_of(message['content']) | trim" if self.trims else "text_of(message['content'])"
        head = f"{{{{- {_quoted(begin)} ~ message['role'] ~ {_quoted(after)} -}}}}"
        body = f"{{{{- {text} ~ {_quoted(self.separators[0])} -}}}}"
        return (
            self.content
            + _SYSTEM.replace("SYSTEM", _quoted(self.system))
            + f"{{{{- {_quoted(f'{begin}system{after}')} ~ system ~ {_quoted(self.separators[0])} -}}}}"
            + "{%- for message in messages -%}"
            + head
            + f"{{%- if message['role'] == 'assistant' -%}}{generated(body)}{{%- else -%}}{body}{{%- endif -%}}"
            + "{%- endfor -%}"
            + f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(f'{begin}assistant{after}')} -}}}}{{%- endif -%}}"
        )

    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        starts = encode.count("")
        known = {encode.encode(token)[starts] for token in self.always} | set(ids[:starts] if starts else ())
        labels = ids[:starts]
        for turn in re.split(f"(?={re.escape(self.head[0])})", text)[1:]:
            own = encode.encode(turn)[starts:]
            answers = turn.startswith(f"{self.head[0]}assistant{self.head[1]}")
            labels += [i if answers or i in known else IGNORE for i in own]
        if len(labels) != len(ids):
            logger.warning(
                f"Not trained on: its turns have {len(labels)} tokens, the whole {len(ids)}: {text[-60:]!r}"
            )
            return [IGNORE] * len(ids)
        return labels


@dataclass(frozen=True)
class Plain(Conversation):
    """An image and its caption, for training the projector alone: the question is dropped."""

    skips_first_answer = False
    marks_images = False

    def chat_template(self) -> str:
        return (
            self.content
            + "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
            + generated(f"{{{{- text_of(message['content']) ~ {_quoted(self.separators[0])} -}}}}")
            + f"{{%- else -%}}{{{{- text_of(message['content']) ~ {_quoted(self.separators[0])} -}}}}"
            + "{%- endif -%}{%- endfor -%}"
        )

    def text(self, turns: Turns, render: Callable[[Turns], str]) -> str:
        if [role for role, _ in turns] != ["user", "assistant"] or "<image>" not in turns[0][1]:
            raise ValueError("A 'plain' conversation is one image and one caption.")
        return "<image>" + turns[1][1] + self.separators[0]

    def labels(self, text: str, turns: Turns, ids: list[int], encode: Encoder) -> Labels:
        question = encode.count("<image>")
        return [IGNORE] * question + ids[question:]


def generated(template: str) -> str:
    """Mark a part of a template as what the assistant generates."""
    return f"{{% generation %}}{template}{{% endgeneration %}}"


def _quoted(text: str) -> str:
    """Quote a text for Jinja."""
    return json.dumps(text, ensure_ascii=False)
