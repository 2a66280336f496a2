"""Noun phrases of captions: by spaCy, or by rules that need no model."""

import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from hfvlm.media.sources import import_extra


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that no noun phrase holds: it ends before them.
CLOSED = _words(
    """
    about above across after against ahead along alongside amid among around as aside at atop away back before behind
    below beneath beside besides between beyond by despite down during for from in inside into like near next of off on
    onto opposite out outside over past per since than through throughout to toward towards under underneath until up
    upon via while with within without
    and but or nor so yet if because although though whether when where why how that which who whom whose what
    i you he she it we they me him us them there here not no one's
    is are was were be been being am do does did has have had having can could will would shall should may might must
    isn't aren't wasn't weren't don't doesn't didn't it's he's she's there's
    stands stand stood sits sit sat lies lie lay holds hold held wears wear wore looks look looked rides ride rode goes
    go went gets get got takes take took makes make made plays play played runs run ran walks walk walked shows show
    shown seen see sees uses use used eats eat ate
    very too also just only still almost together apart again then now ever never already
    """
)
# Words that a noun phrase begins with and that are not counted as a part of it.
DETERMINERS = _words(
    """
    a an the this that these those my your his her its our their some any each every all both another other several
    many few much more most two three four five six seven eight nine ten one
    """
)
# Words in -ing that are nouns or adjectives as a rule.
KEPT_ING = _words(
    """
    building ceiling clothing king ring string thing wing spring evening morning painting wedding swimming dining
    living parking boxing
    """
)
TOKEN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")
RULES, SPACY, DEFAULT_MODEL = "rules", "spacy", "en_core_web_sm"

Extract = Callable[[Iterable[str]], Iterator[list[str]]]


def chunks(text: str) -> list[str]:
    """Return the noun phrases of an English caption by rules.

    A phrase is a run of words between punctuation and words of closed classes (prepositions, conjunctions, pronouns,
    auxiliaries, and the commonest verbs of captions), without determiners and numbers before it. A participle in -ing
    and an adverb in -ly end a phrase, too. Verbs in other forms are taken for nouns, which matters little where
    phrases are counted: those that are rare are skipped.

    Args:
        text: a caption.

    Returns:
        Phrases in lower case, as they follow; a phrase may occur several times.
    """
    found: list[str] = []
    run: list[str] = []
    for token in [*TOKEN.findall(text.lower().replace("\u2019", "'")), "."]:
        if not ends(token):
            run.append(token.removesuffix("'s"))
            continue
        while run and (run[0] in DETERMINERS or run[0].isdigit()):
            run.pop(0)
        if run:
            found.append(" ".join(run))
        run = []
    return found


def ends(token: str) -> bool:
    """Whether a token ends a noun phrase."""
    participle = token.endswith("ing") and len(token) > 4 and token not in KEPT_ING
    adverb = token.endswith("ly") and len(token) > 5
    return not token[0].isalnum() or token in CLOSED or participle or adverb


def by_rules(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the noun phrases of each text by rules."""
    return map(chunks, texts)


def by_spacy(nlp: Any) -> Extract:
    """Return a function that yields the noun phrases of each text by a pipeline of spaCy, without determiners."""

    def extract(texts: Iterable[str]) -> Iterator[list[str]]:
        for document in nlp.pipe(texts):
            phrases = [[word.text.lower() for word in chunk if word.pos_ != "DET"] for chunk in document.noun_chunks]
            yield [" ".join(words) for words in phrases if words]

    return extract


def extractor(name: str | None = None) -> tuple[Extract, str]:
    """Return a function that extracts noun phrases, and its name for the record.

    Args:
        name: "rules"; "spacy" or "spacy:<model>"; None for spaCy where it and its model en_core_web_sm are
            installed, else rules.

    Raises:
        ValueError: there is none of that name, or spaCy's model is not installed.
        ImportError: spaCy is not installed.
    """
    if name is None:
        name = SPACY if find_spec(SPACY) and find_spec(DEFAULT_MODEL) else RULES
    if name == RULES:
        return by_rules, RULES
    library, _, model = name.partition(":")
    if library != SPACY:
        raise ValueError(f"extractor must be rules, spacy or spacy:MODEL, not {name!r}.")
    spacy, model = import_extra(SPACY, "nouns", "Noun phrases by spaCy"), model or DEFAULT_MODEL
    try:
        nlp = spacy.load(model)
    except OSError as error:
        raise ValueError(f"spaCy has no model {model!r}: python -m spacy download {model}") from error
    about = f"{SPACY} {spacy.__version__}, {nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}"
    return by_spacy(nlp), about
