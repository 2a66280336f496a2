"""PaliGemma's beam search, by which its authors decode some transfers (COCO captions with two beams, TextCaps with
three).

Source: https://github.com/google-research/big_vision at 0127fb6, trainers/proj/paligemma/predict_fns.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfvlm.modeling.compat import CACHE, cache_of


class Beams(NamedTuple):
    """What a search found.

    Args:
        tokens: `(B, T)`, the best sequence that has ended, 0 after its end token.
        scores: `(B,)`, the sum of its tokens' log probabilities, the end included.
        live: `(B, beams, T)`, the sequences that had not ended.
        steps: how many there were.
    """

    tokens: Tensor
    scores: Tensor
    live: Tensor
    steps: int


def every_beam_may_end(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
) -> Tensor:
    """Search as the authors, for `model.generate(..., num_beams=3, custom_generate=every_beam_may_end)`.

    The score is a plain sum, and each beam's end is considered in each step, also where others are likelier;
    transformers' own search drops those. It stops when no live beam is better than what has ended.

    Returns:
        Prompts and the best sequence of each, `(B, N + T)`, padded with the padding token.
    """
    del stopping_criteria  # length and end are those of the configuration
    options = generation_config
    length = options.max_length - input_ids.shape[1]
    ends = torch.as_tensor(options.eos_token_id).flatten().tolist()
    if len(ends) != 1:
        raise ValueError(f"eos_token_id {ends}: this search has one end token.")
    found = search(model, input_ids, logits_processor, inputs, options.num_beams, length, ends[0])
    tokens = found.tokens
    after = (tokens == ends[0]).cumsum(dim=1) - (tokens == ends[0]).long() > 0
    tokens = tokens.masked_fill(after, options.pad_token_id or 0)
    return torch.cat([input_ids[:: options.num_beams], tokens], dim=1)


@torch.no_grad()
def search(
    model: Any, input_ids: Tensor, processors: Any, inputs: dict[str, Any], beams: int, length: int, end: int
) -> Beams:
    """Search over rows that are repeated `beams` times each.

    Args:
        model: whose next tokens are scored.
        input_ids: `(B * beams, N)`, the prompts.
        processors: of logits.
        inputs: of transformers' generation next to the ids.
        beams: sequences that live at a time.
        length: most tokens of a sequence.
        end: the end token.
    """
    rows, device = input_ids.shape[0] // beams, input_ids.device
    first = torch.arange(rows, device=device)[:, None] * beams
    tokens = input_ids.new_zeros(rows, beams, length)
    # All beams of a row are the same at first: the others begin as if they were impossible.
    live = torch.full((rows, beams), -torch.inf, device=device)
    live[:, 0] = 0
    best, scores = input_ids.new_zeros(rows, length), torch.full((rows,), -torch.inf, device=device)
    ids, step = input_ids, 0
    for step in range(length):
        new = None if step == 0 else 1
        if inputs.get("use_cache") is False:
            new = None
        made = model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=step == 0, **inputs
        )
        output = model(**made, return_dict=True)
        logs = processors(ids, output.logits[:, -1].float()).log_softmax(dim=-1).unflatten(0, (rows, beams))
        ended, which = (live + logs[..., end]).max(dim=1)
        better = ended > scores
        sequences = tokens[torch.arange(rows, device=device), which]
        sequences[:, step] = end
        best, scores = torch.where(better[:, None], sequences, best), torch.where(better, ended, scores)
        likely, candidates = logs.topk(min(beams + 1, logs.shape[-1]), dim=-1)
        sums = (live[..., None] + likely).masked_fill(candidates == end, -torch.inf).flatten(1)
        live, chosen = sums.topk(beams, dim=1)
        parents = chosen // candidates.shape[-1]
        tokens = tokens.gather(1, parents[..., None].expand(-1, -1, length))
        tokens[..., step] = candidates.flatten(1).gather(1, chosen)
        if bool((live.amax(dim=1) < scores).all()):
            break
        order = (first + parents).flatten()
        ids = torch.cat([ids[order], tokens[..., step].flatten()[:, None]], dim=1)
        inputs = model._update_model_kwargs_for_generation(output, inputs)
        if (cache := cache_of(inputs)) is not None:
            cache.reorder_cache(order)
            inputs[CACHE] = cache
    return Beams(best, scores, tokens, step + 1)
