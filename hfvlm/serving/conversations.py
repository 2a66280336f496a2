"""Conversations of several people with one model."""

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from hfvlm.inference.chat import Chat
from hfvlm.media.images import read_image
from hfvlm.media.rows import UNREADABLE
from hfvlm.media.video import read_video
from hfvlm.serving.errors import RequestError, refusing

logger = logging.getLogger(__name__)
# Each has a cache of keys and values; the one that was idle longest is dropped for a new one.
MOST = 8
READERS: Mapping[str, Callable[[bytes], Any]] = {"image": read_image, "video": read_video}


class Conversations:
    """Conversations with one model, which generates one answer at a time.

    Args:
        model: that chats.
        processor: the model's.
        most: conversations that are remembered.
    """

    def __init__(self, model: Any, processor: Any, most: int = MOST):
        self.model, self.processor, self.most = model, processor, most
        self.changing, self.computing = Lock(), Lock()
        self.chats: OrderedDict[str, Chat] = OrderedDict()
        self.busy: set[str] = set()

    @property
    def modality(self) -> str:
        """What the model answers about: "image" or "video"."""
        return self.processor.modality

    def answer(
        self, name: str | None, question: str, media: Mapping[str, Sequence[bytes]], options: Mapping[str, Any]
    ) -> "Pieces":
        """Answer in pieces. If they are closed early, the answer ends, and the turn is dropped.

        Args:
            name: of an earlier conversation; None begins one.
            question: of this turn.
            media: {"image": [bytes, ...]} or "video", of this turn.
            options: of `generate`.

        Returns:
            `{"conversation": name}`, then `{"piece": text}` again and again, then `{"answer": text}`, whole; or
            `{"error": message}` in place of what could not be generated.

        Raises:
            RequestError: there is no such conversation, it is in the middle of an answer, or a file cannot be read.
        """
        if foreign := [kind for kind, sources in media.items() if sources and kind != self.modality]:
            raise RequestError(f"{foreign[0]}: {type(self.model).__name__} answers about {self.modality}s alone.")
        with refusing():
            read = {f"{kind}s": [READERS[kind](x) for x in sources] for kind, sources in media.items()}
        name = self.begin(name)
        pieces: SimpleQueue[dict[str, str] | None] = SimpleQueue()
        pieces.put({"conversation": name})
        stopped = Event()
        Thread(target=self.generate, args=(name, question, read, options, pieces, stopped), daemon=True).start()
        return Pieces(pieces, stopped)

    def begin(self, name: str | None) -> str:
        """Take up a conversation, or begin one, for one answer.

        Raises:
            RequestError: there is none of this name, it is busy, or all are.
        """
        with self.changing:
            if name is None:
                return self.begin_new()
            if name not in self.chats:
                raise RequestError("conversation: there is none of this name, any more: leave the field out.", 404)
            if name in self.busy:
                raise RequestError("conversation: it is in the middle of an answer: wait for its end.", 409)
            self.chats.move_to_end(name)
            self.busy.add(name)
            return name

    def begin_new(self) -> str:
        """Begin a conversation, in place of the one that was idle longest where there are too many.

        Raises:
            RequestError: all are busy.
        """
        if len(self.chats) >= self.most:
            idle = next((each for each in self.chats if each not in self.busy), None)
            if idle is None:
                raise RequestError(f"All {self.most} conversations wait for an answer: try again later.", 503)
            del self.chats[idle]
        name = secrets.token_urlsafe(16)
        self.chats[name] = Chat(self.model, self.processor)
        self.busy.add(name)
        return name

    def generate(
        self, name: str, question: str, media: Mapping[str, Any], options: Mapping[str, Any],
        pieces: "SimpleQueue[dict[str, str] | None]", stopped: Event,
    ) -> None:  # fmt: skip
        """Generate an answer, on a thread: whoever reads slowly keeps the model from nobody."""
        chat = self.chats[name]
        try:
            with self.computing:
                stream = chat.stream(question, **media, **options)
                for piece in stream if not stopped.is_set() else ():
                    pieces.put({"piece": piece})
                    if stopped.is_set():
                        stream.close()  # type: ignore[attr-defined]
                        return
            pieces.put({"answer": "" if stopped.is_set() else chat.messages[-1]["content"]})
        except UNREADABLE as error:
            pieces.put({"error": str(error)})
        except Exception:
            logger.exception("An answer failed.")
            pieces.put({"error": "The answer failed: the server's log says why."})
        finally:
            with self.changing:
                self.busy.discard(name)
            pieces.put(None)


class Pieces(Iterator[dict[str, str]]):
    """What another thread puts into a queue, up to None.

    Args:
        pieces: the queue.
        stopped: tells that thread to end.
    """

    def __init__(self, pieces: "SimpleQueue[dict[str, str] | None]", stopped: Event):
        self.pieces, self.stopped = pieces, stopped

    def __next__(self) -> dict[str, str]:
        if self.stopped.is_set() or (piece := self.pieces.get()) is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """End the answer; another thread may be waiting for its next piece."""
        self.stopped.set()
