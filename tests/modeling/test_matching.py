"""Both directions of a rerank come from one pass over the images."""

import pytest
import torch

import hfvlm
from hfvlm.modeling import matching, text
from hfvlm.modeling.base import unit
from hfvlm.modeling.matching import two_stage_scores
from hfvlm.modules.transformer import CrossAttention
from hfvlm.presets import load_preset


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
@pytest.mark.parametrize(("pairs", "images"), [(1, 8), (6, 8), (64, 2)])
def test_each_pair_is_matched_once(top_k, pairs, images, monkeypatch):
    for name, value in {"MOST_TEXTS": 3, "MOST_PAIRS": pairs, "MOST_IMAGES": images}.items():
        monkeypatch.setattr(matching, name, value)
    cosines, logits, seen = torch.randn(6, 9).round(decimals=1), torch.randn(6, 9, 2), []

    def match(some, texts):
        if len(some) == 1:
            assert len(texts) <= 3
        else:
            assert len(some) <= images
            assert len(texts) <= pairs
        rows = some.repeat_interleave(len(texts) // len(some))
        seen.extend(zip(rows.tolist(), texts.tolist(), strict=True))
        return logits[rows, texts]

    found = two_stage_scores(cosines, match, top_k)
    per_image, per_text = one_direction_after_the_other(cosines, lambda i, t: logits[i, t], top_k)
    assert torch.equal(found.per_image, per_image)
    assert torch.equal(found.per_text, per_text)
    wanted = (per_image > -100) | (per_text > -100).t()
    assert sorted(seen) == [tuple(pair) for pair in wanted.nonzero().tolist()]


def matcher(kind):
    """A BLIP, or a Q-Former of BLIP-2, that matches; weights are large enough to matter."""
    torch.manual_seed(0)
    fields = load_preset(f"{kind}/tiny").config
    if kind == "blip2":
        words = {"vocab_size": 40, "max_position_embeddings": 20, "bos_token_id": 39, "eos_token_id": 3}
        fields = {"vision_config": fields["vision_config"], "qformer_config": fields["qformer_config"] | words}
    model = KINDS[kind](KINDS[kind].config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


KINDS = {"blip": hfvlm.HfvlmBLIPForImageTextRetrieval, "blip2": hfvlm.HfvlmBLIP2ForImageTextRetrieval}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_is_not_matched(kind, left, monkeypatch):
    model = matcher(kind)
    images, ids = torch.randn(5, 3, *[model.config.vision_config.image_size] * 2), torch.randint(5, 13, (7, 12))
    mask = (torch.arange(12) < torch.tensor([3, 6, 4, 5, 6, 3, 7]).unsqueeze(1)).long()
    if left:
        mask = mask.flip(1)
    ids = ids.masked_fill(mask == 0, 0)
    image, read = model.encode_image(images), model.encode_text(ids, mask).pooler_output
    cosines, tokens = model.similarities(unit(image.pooler_output), unit(read)), image[model.image_tokens_field]

    def match(of_images, texts):
        """Match pairs one by one, with all padding."""
        pairs = zip(of_images.split(1), texts.split(1), strict=True)
        return torch.cat([model.match_tokens(ids[text], mask[text], tokens[image]) for image, text in pairs])

    expected = one_direction_after_the_other(cosines, match, 3)
    wanted = int(((expected[0] > -100) | (expected[1] > -100).t()).sum())
    assert wanted < 5 * 3 + 7 * 3
    shapes, match_tokens = [], model.match_tokens
    monkeypatch.setattr(model, "match_tokens", lambda i, *x: (shapes.append(i.shape), match_tokens(i, *x))[1])
    for bucket, pairs, shortest in ((1000, 64, None), (1000, 1, None), (1, 1, 7 if left else 3)):
        monkeypatch.setattr(text, "bucket_size", lambda device, bucket=bucket: bucket)
        monkeypatch.setattr(matching, "MOST_PAIRS", pairs)
        shapes.clear()
        scores = model.rerank(images, ids, mask, top_k=3)
        assert torch.allclose(scores.per_image, expected[0], rtol=0, atol=1e-5)
        assert torch.allclose(scores.per_text, expected[1], rtol=0, atol=1e-5)
        assert sum(rows for rows, _ in shapes) == wanted
        lengths = [length for _, length in shapes]
        assert max(lengths) == 7
        assert shortest is None or min(lengths) == shortest
        found = model.embeddings("text", input_ids=ids, attention_mask=mask)
        assert torch.allclose(found, read, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_images_keys_and_values_are_computed_once(monkeypatch):
    model = matcher("blip")
    images, ids = torch.randn(5, 3, *[model.config.vision_config.image_size] * 2), torch.randint(5, 13, (7, 6))
    read, rows = CrossAttention.read, []
    monkeypatch.setattr(CrossAttention, "read", lambda self, x: (rows.append(len(x)), read(self, x))[1])
    model.rerank(images, ids, top_k=3)
    assert sum(rows) == 5 * model.config.text_config.num_hidden_layers
    assert len(rows) < sum(rows)
