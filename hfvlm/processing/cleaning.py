"""Text cleaning, as the originals clean texts before they tokenize them."""

import html
import re
import string
from collections.abc import Callable
from unicodedata import category, normalize

import ftfy


def fixed(text: str) -> str:
    """Repair broken encodings, curly quotes and HTML entities, as every original of the CLIP family does."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def clean_lower(text: str) -> str:
    """Clean as OpenAI: repair, one space between words, lower case."""
    return " ".join(fixed(text).split()).lower()


def clean_whitespace(text: str) -> str:
    """Clean as open_clip for tokenizers of the Hub: repair, one space between words."""
    return " ".join(fixed(text).split())


def clean_repaired(text: str) -> str:
    """Clean as transformers' CLIP tokenizer with ftfy: HTML entities stay wherever ftfy leaves them."""
    return " ".join(ftfy.fix_text(text).split()).lower()


def clean_canonical(text: str) -> str:
    """Clean as open_clip for SigLIP: repair, no punctuation, lower case, one space between words."""
    text = fixed(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


def clean_case(text: str) -> str:
    """Clean as big_vision: only lower case."""
    return text.lower()


def clean_caption(text: str) -> str:
    """Clean captions as BLIP: lower case, a space for most punctuation, one space between words."""
    return re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower())).rstrip("\n").strip(" ")


def clean_question(text: str) -> str:
    """Clean questions as BLIP: lower case, without most punctuation."""
    return PUNCTUATION.sub("", text.lower()).rstrip(" ")


# The question mark, the comma and the apostrophe stay.
PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


# Of Unicode's characters of the kind Default_Ignorable_Code_Point, those that occur.
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def clean_fold(text: str) -> str:
    """Clean as TensorFlow Text for BERT: similar letters become one, in lower case without accents; invisible
    characters are dropped; control characters become spaces."""
    text = IGNORABLE.sub("", normalize("NFD", text))
    text = normalize("NFKC", normalize("NFKC", text.casefold()).casefold())
    letters = (letter for letter in normalize("NFD", IGNORABLE.sub("", text)) if category(letter) != "Mn")
    return "".join(" " if category(letter) in ("Cc", "Cf") else letter for letter in letters)


CLEANINGS: dict[str, Callable[[str], str]] = {
    "lower": clean_lower,
    "whitespace": clean_whitespace,
    "repaired": clean_repaired,
    "canonical": clean_canonical,
    "case": clean_case,
    "caption": clean_caption,
    "question": clean_question,
    "fold": clean_fold,
    "none": str,
}
