"""Objects that captions name and images do not show."""

from collections.abc import Collection, Hashable, Sequence


def object_hallucination(
    named: Sequence[Sequence[Hashable]], shown: Sequence[Collection[Hashable]]
) -> dict[str, float]:
    """Compare the objects that captions name with those that their images show.

    The first two measures are CHAIR's (https://arxiv.org/abs/1809.02156, section 2.1). A caption that names nothing
    has none of them, so they mean something next to the recall alone.

    Args:
        named: of each caption the objects that it names, as often as it does.
        shown: of each image its objects.

    Returns:
        `chair_i`, the share of named objects that are not shown; `chair_s`, the share of captions that name such a
        one; `recall`, the share of shown objects that are named; and `named`, how many a caption names on average.

    Raises:
        ValueError: there are not as many captions as images, or none, or no image shows an object.
    """
    if len(named) != len(shown) or not named:
        raise ValueError(f"object_hallucination needs a caption an image: {len(named)} captions, {len(shown)} images.")
    pairs = [(list(own), set(truth)) for own, truth in zip(named, shown, strict=True)]
    absent = [sum(one not in truth for one in own) for own, truth in pairs]
    mentions, present = sum(len(own) for own, _ in pairs), sum(len(truth) for _, truth in pairs)
    if not present:
        raise ValueError("object_hallucination: no image shows an object.")
    return {
        "chair_i": sum(absent) / max(mentions, 1),
        "chair_s": sum(map(bool, absent)) / len(pairs),
        "recall": sum(len(truth & set(own)) for own, truth in pairs) / present,
        "named": mentions / len(pairs),
    }
