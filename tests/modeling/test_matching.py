"""Both directions of a rerank come from one pass over the images."""

import pytest
import torch

import hfvlm
from hfvlm.modeling import matching
from hfvlm.modeling.matching import two_stage_scores
from hfvlm.modules.transformer import CrossAttention


def one_direction_after_the_other(cosines, match, top_k):
    """Each image's candidates, then each text's."""
    per_image, per_text = torch.full_like(cosines, -100.0), torch.full_like(cosines.t(), -100.0)
    for rows, scores, by_image in ((cosines, per_image, True), (cosines.t(), per_text, False)):
        for i, row in enumerate(rows):
            cosine, others = row.topk(min(top_k, len(row)))
            same = torch.full_like(others, i)
            logits = match(same, others) if by_image else match(others, same)
            scores[i, others] = logits[:, 1] + cosine
    return per_image, per_text


@pytest.mark.parametrize("top_k", [1, 2, 5, 40])
def test_each_pair_is_matched_once(top_k, monkeypatch):
    monkeypatch.setattr(matching, "MOST_TEXTS", 3)
    cosines, logits, seen = torch.randn(6, 9).round(decimals=1), torch.randn(6, 9, 2), []

    def match(images, texts):
        assert images.shape == (1,)
        assert len(texts) <= 3
        seen.extend((int(images), int(text)) for text in texts)
        return logits[images, texts]

    found = two_stage_scores(cosines, match, top_k)
    per_image, per_text = one_direction_after_the_other(cosines, lambda i, t: logits[i, t], top_k)
    assert torch.equal(found.per_image, per_image)
    assert torch.equal(found.per_text, per_text)
    wanted = (per_image > -100) | (per_text > -100).t()
    assert sorted(seen) == [tuple(pair) for pair in wanted.nonzero().tolist()]


@torch.no_grad()
def test_an_images_keys_and_values_are_computed_once(small_blip, monkeypatch):
    model = hfvlm.HfvlmBLIPForImageTextRetrieval.from_pretrained(small_blip("HfvlmBLIPForImageTextRetrieval"))
    images, ids = torch.randn(5, 3, *[model.config.vision_config.image_size] * 2), torch.randint(5, 13, (7, 6))
    mask = torch.ones_like(ids)
    ids[:, 0] = 2
    tokens, output = model.encode_image(images).last_hidden_state, model(ids, images)
    cosines = output.image_embeds @ output.text_embeds.t()
    expected = one_direction_after_the_other(cosines, lambda i, t: model.match_tokens(ids[t], mask[t], tokens[i]), 3)
    read, read_rows, matched = CrossAttention.read, [], []
    monkeypatch.setattr(CrossAttention, "read", lambda self, x: (read_rows.append(len(x)), read(self, x))[1])
    match = model.match_tokens
    monkeypatch.setattr(model, "match_tokens", lambda i, *x: (matched.append(len(i)), match(i, *x))[1])
    scores = model.rerank(images, ids, top_k=3)
    assert torch.allclose(scores.per_image, expected[0], rtol=0, atol=1e-5)
    assert torch.allclose(scores.per_text, expected[1], rtol=0, atol=1e-5)
    wanted = (expected[0] > -100) | (expected[1] > -100).t()
    assert sum(matched) == int(wanted.sum()) < 5 * 3 + 7 * 3
    assert read_rows == [1] * (5 * model.config.text_config.num_hidden_layers)
