"""Texts that are handed on while they are generated."""

from collections.abc import Iterator, Mapping, Sequence
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class Stream(TextIteratorStreamer):
    """`generate` on a thread, as an iterator over the pieces of its text.

    Args:
        model: that generates.
        tokenizer: of its texts.
        stop_strings: texts that end an answer, next to the end token.
        options: of `model.generate`, inputs included.
    """

    def __init__(self, model: Any, tokenizer: Any, stop_strings: Sequence[str], options: Mapping[str, Any]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped, self.result = Event(), list[int]()
        self.error: BaseException | None = None
        arguments = dict(options)
        if stop_strings:
            arguments |= {"stop_strings": stop_strings, "tokenizer": tokenizer}
        criteria = StoppingCriteriaList([*arguments.pop("stopping_criteria", ()), _Stop(self.stopped)])
        arguments |= {"streamer": self, "stopping_criteria": criteria}
        self.thread = Thread(target=self._run, args=(model, arguments), daemon=True)
        self.thread.start()

    def _run(self, model: Any, arguments: Mapping[str, Any]) -> None:
        try:
            self.result = model.generate(**arguments)[0].tolist()
        except BaseException as error:
            self.error = error
            self.end()

    def finish(self) -> list[int]:
        """Stop, and return all ids once the thread has ended; or raise its error."""
        self.stopped.set()
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.result


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Event):
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device, dtype=torch.bool)


def until(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text up to the first of `stops`, which may be spread over several."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [start for stop in stops if (start := held.find(stop)) >= 0]
        if ends:
            held = held[: min(ends)]
            break
        sure = len(held) - max(
            (n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0
        )
        if sure:
            yield held[:sure]
            held = held[sure:]
    if held:
        yield held
