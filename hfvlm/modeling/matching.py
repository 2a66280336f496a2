"""Image-text matching: training on hard negatives, and retrieval in two stages (ALBEF, https://arxiv.org/abs/2107.07651,
section 3.2; BLIP, https://arxiv.org/abs/2201.12086; BLIP-2, https://arxiv.org/abs/2301.12597)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from hfvlm.checks.ranges import check_integer
from hfvlm.losses.processes import GatherRows, gather_rows
from hfvlm.modeling.base import unit
from hfvlm.modeling.dual_encoder import DualEncoder
from hfvlm.modeling.outputs import DualEncoderOutput
from hfvlm.modeling.text import each_length, last_seen, without_padding

# What pairs are matched from: `(B, M, C)` image tokens, `(B, N)` token ids and `(B, N)` attention mask.
Pairs = tuple[Tensor, Tensor, Tensor]
# Texts that are matched with an image at a time; pairs and images of a batch of several images, whose few texts alone
# would be too few rows for a fast product.
MOST_TEXTS, MOST_PAIRS, MOST_IMAGES = 256, 64, 8


@dataclass
class MatchingOutput(DualEncoderOutput):
    """Images against texts, and pairs of them matched.

    Args:
        contrastive_loss: scalar, with `return_loss=True`; so are the next two.
        matching_loss: of telling pairs from hard negatives.
        captioning_loss: of each text as its image's caption, where there is a decoder.
        matching_logits: `(3 * B, 2)`, of the pairs, of the texts with negative images and of the images with negative
            texts; the second column is for a match.
    """

    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    captioning_loss: Tensor | None = None
    matching_logits: Tensor | None = None

    def add_matching(self, logits: Tensor) -> None:
        """Add the loss of `matching_logits`, of which the first third are pairs, to the contrastive one."""
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        labels[: logits.shape[0] // 3] = 1
        contrastive: Any = self.contrastive_loss
        self.matching_logits, self.matching_loss = logits, F.cross_entropy(logits.float(), labels)
        self.loss = contrastive + self.matching_loss


@dataclass
class RetrievalScores:
    """The second stage of retrieval.

    Args:
        per_image: `(I, T)`, of every text for each image; -100 for those that are no candidates.
        per_text: `(T, I)`, of every image for each text, likewise.
    """

    per_image: Tensor
    per_text: Tensor


class MatchingModel(DualEncoder, ABC):
    """A dual encoder that also matches texts with images, by attention to them.

    A subclass, for which padding of texts changes nothing, matches in `match_tokens`; `image_tokens_field` names the
    field of `encode_image`'s output with the tokens that it takes.
    """

    output_class = MatchingOutput
    needs_tokens = True
    ignores_padding = True
    image_tokens_field: ClassVar[str] = "last_hidden_state"

    @abstractmethod
    def match_tokens(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Match texts `(B * T, N)`, T for each of B images' tokens `(B, M, C)` -> `(B * T, 2)`, the second column for
        a match."""

    def match_negatives(self, output: Any, pairs: Pairs, same: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Match pairs and hard negatives, drawn among the pairs of all processes of `group` -> `(3 * B, 2)`.

        Args:
            output: with the pairs' embeddings and their scale.
            pairs: see `match_triples`.
            same: `(B, all)`, True for what belongs together.
            group: None for this process alone.
        """
        tokens, ids, mask = pairs
        images, texts = (gather_rows(x.detach(), group) for x in (output.image_embeds, output.text_embeds))
        with torch.no_grad():
            per_text = self.similarities(images, output.text_embeds).t() * output.logit_scale
            per_image = self.similarities(output.image_embeds, texts) * output.logit_scale
        images, texts = self.hard_negatives(per_text, per_image, same)
        tokens = GatherRows.apply(tokens, group)[images]
        return self.match_triples(pairs, (tokens, gather_rows(ids, group)[texts], gather_rows(mask, group)[texts]))

    @torch.no_grad()
    def hard_negatives(self, per_text: Tensor, per_image: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a negative image for each text and a negative text for each image, the more similar the likelier.

        Args:
            per_text: `(B, all)` similarities of texts and images.
            per_image: `(B, all)` of images and texts.
            same: `(B, all)`, True for what belongs together.

        Raises:
            ValueError: all images, or all texts, belong to one row.
        """
        if bool(same.all(dim=1).any()):
            raise ValueError("Matching needs a negative for each pair: give batches of at least two pairs.")
        images, texts = (self.draw(self.shares(scores.float(), same)) for scores in (per_text, per_image))
        return images, texts

    def shares(self, scores: Tensor, same: Tensor) -> Tensor:
        """Turn `(B, all)` similarities into the probability of each negative, up to a factor."""
        return scores.masked_fill(same, -torch.inf).softmax(dim=1)

    def draw(self, weights: Tensor) -> Tensor:
        """Draw a column of each row: `(B, all)` -> `(B,)`."""
        return torch.multinomial(weights, 1).squeeze(1)

    def match_triples(self, pairs: Pairs, negatives: Pairs) -> Tensor:
        """Match pairs, and their texts and images with their negatives -> `(3 * B, 2)`, as in `MatchingOutput`."""
        (tokens, ids, mask), (other_tokens, other_ids, other_mask) = pairs, negatives
        ids, mask = torch.cat([ids, ids, other_ids]), torch.cat([mask, mask, other_mask])
        return self.match_tokens(ids, mask, torch.cat([tokens, other_tokens, tokens]))

    @torch.no_grad()
    def rerank(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, *, top_k: int = 128
    ) -> RetrievalScores:
        """Retrieve in two stages: the `top_k` by cosine are scored by the cosine plus the logit of a match.

        Args:
            pixel_values: `(I, C, H, W)`, normalised.
            input_ids: `(T, N)`.
            attention_mask: `(T, N)`, 0 for padding.
            top_k: candidates of the second stage; BLIP takes 256 on COCO and 128 on Flickr30K, BLIP-2 128.
        """
        texts: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        image, text = self.encode_image(pixel_values), self.embeddings("text", **texts)
        cosines = self.similarities(unit(image.pooler_output), unit(text))
        return self.rescore(cosines, image[self.image_tokens_field], **texts, top_k=top_k)

    @torch.no_grad()
    def rescore(
        self,
        cosines: Tensor,
        image_tokens: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        top_k: int = 128,
    ) -> RetrievalScores:
        """Run the second stage of `rerank` alone.

        Args:
            cosines: `(I, T)`, of the first stage.
            image_tokens: `(I, M, C)`, what `encode_image` has in `image_tokens_field`.
            input_ids: `(T, N)`.
            attention_mask: `(T, N)`, 0 for padding, which changes nothing and is left out.
            top_k: see `rerank`.
        """
        whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask, ids = without_padding(whole, input_ids)
        ends = last_seen(mask)

        def match(images: Tensor, texts: Tensor) -> Tensor:
            tokens = image_tokens[images]

            def match_some(ids: Tensor, mask: Any, _: Tensor) -> Tensor:
                return self.match_tokens(ids, mask, tokens)

            if len(images) > 1:
                stop = int(ends[texts].amax()) + 1
                return match_some(ids[texts, :stop], mask[texts, :stop], ends)
            found, order = each_length(match_some, ids[texts], mask[texts], ends[texts])
            return torch.cat(found)[order]

        return two_stage_scores(cosines, match, top_k)


def two_stage_scores(cosines: Tensor, match: Callable[[Tensor, Tensor], Tensor], top_k: int) -> RetrievalScores:
    """Score `(I, T)` cosines of images and texts in two stages: the `top_k` nearest of each have the cosine plus the
    logit of a match. A pair is matched once, also if each is a candidate of the other.

    Args:
        cosines: the first stage.
        match: index of images, `(B,)`, and of n texts for each, `(B * n,)` -> `(B * n, 2)`, the second column for a
            match.
        top_k: candidates of the second stage.

    Raises:
        ValueError: top_k is no number of candidates.
    """
    check_integer("top_k", top_k)
    of_images, of_texts = (
        torch.zeros_like(cosines, dtype=torch.bool).scatter_(dim, nearest(cosines, top_k, dim), value=True)
        for dim in (1, 0)
    )
    per_image, per_text = torch.full_like(cosines, -100.0), torch.full_like(cosines.t(), -100.0)
    for images, texts in batches(of_images | of_texts):
        rows = images.repeat_interleave(len(texts) // len(images))
        scores = match(images, texts)[:, 1] + cosines[rows, texts]
        per_image[rows, texts] = scores.masked_fill(~of_images[rows, texts], -100)
        per_text[texts, rows] = scores.masked_fill(~of_texts[rows, texts], -100)
    return RetrievalScores(per_image, per_text)


def batches(wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Part the True pairs of images and texts, `(I, T)`, into batches: images `(B,)`, and n texts of each, `(B * n,)`.

    An image is in one batch with others that have as many texts, if these are few, or in some of its own, if many.
    """
    device, wanted = wanted.device, wanted.cpu()
    groups: dict[int, list[int]] = {}
    for image, count in enumerate(wanted.sum(dim=1).tolist()):
        groups.setdefault(count, []).append(image)
    groups.pop(0, None)
    for count, images in groups.items():
        for some in torch.tensor(images).split(min(MOST_IMAGES, max(1, MOST_PAIRS // count))):
            texts = wanted[some].nonzero()[:, 1]
            for part in texts.split(MOST_TEXTS if len(some) == 1 else len(texts)):
                yield some.to(device), part.to(device)


def nearest(cosines: Tensor, top_k: int, dim: int) -> Tensor:
    """Find the positions of the highest cosines along a dimension."""
    return cosines.topk(min(top_k, cosines.shape[dim]), dim=dim).indices
