"""The field's words: image, video and audio, in every docstring, comment, message, card and page."""

import ast
import io
import re
import tokenize

import pytest

from tests.support.paths import ROOT

# Where the words hold.
CLEAN = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "model_cards", "examples", "hfvlm", "conversion")
# The odd word, and what the field says.
ODD = {
    r"pictures?": "image",
    r"films?": "video",
    r"sounds?": "audio, audio clip",
    r"said": "text, message, defines",
    r"told": "predicted, passed",
    r"anew": "again",
    r"wordings?": "prompt templates",
    r"strangers?": "negatives",
    r"partners?": "positives",
    r"unread": "unused",
    r"medium": "input",
    r"sight": "media context",
    r"the host('s)?": "transformers",
    r"(is|are|was|were) fed": "inputs of",
}
# Public names and quotations, which stay as they are.
ALLOWED = (
    "find_in_pictures.py",
    "--pictures",
    "pictures: images",
    'truncation="pictures"',
    "truncation='pictures'",
    "'pictures', not",
    '"pictures" drops',
    '"pictures" leaves out',
    "the folder `pictures`",
    "pictures: the folder",
    "film: a video",
    "strangers=",
    "strangers: a data set",
    "a picture of",  # BLIP's prompt
    "a small picture of",  # one of OpenAI's templates
    "there this picture image",  # words of a vocabulary
    "Frame {} in the picture.",  # Qwen-VL's
    "'Picture ' ~",
    "Vision and Language and Sound",  # MERLOT Reserve's title
    "A film.",  # the system message of examples/tell_motion.py, with which its numbers were measured
)
COUNTED = ("hfvlm", "conversion", "README.md", "docs", "model_cards")
MOST = 60


def files(*names):
    """The texts under these names, by their paths."""
    for name in names:
        path = ROOT / name
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".md", ".py", ".yaml"))
        yield from (each for each in found if "__pycache__" not in each.parts)


def prose(path):
    """(line, text) of a page's lines, and of a module's comments, docstrings and messages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for i, line in enumerate(node.value.splitlines()):
                yield node.lineno + i, line


def described(path):
    """(line, text) of a test module's comments and docstrings, and the names of its tests as words."""
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            line = getattr(node, "lineno", 1)
            yield line, ast.get_docstring(node) or ""
            yield line, getattr(node, "name", "").replace("_", " ")


def odd(line):
    """The odd words of a line, apart from what is allowed."""
    for phrase in ALLOWED:
        line = line.replace(phrase, "")
    return [found[0] for word in ODD for found in re.finditer(rf"\b{word}\b", line, re.IGNORECASE)]


@pytest.mark.parametrize("path", list(files(*CLEAN)), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_the_words_of_the_field(path):
    found = [f"{path.relative_to(ROOT)}:{line}: {words}" for line, text in prose(path) if (words := odd(text))]
    assert not found, "\n".join([*found, f"The field's words: {ODD}"])


@pytest.mark.parametrize("folder", sorted(p for p in (ROOT / "tests").iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_tests_have_them_in_names_and_docstrings(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {words}"
        for path in sorted(folder.rglob("*.py"))
        for line, text in described(path)
        if (words := odd(text))
    ]
    assert not found, "\n".join([*found, f"The field's words: {ODD}"])


def test_few_uses_are_left_in_code():
    """Of picture, film and sounds, names included."""
    count = {
        path: len(re.findall(r"\b(?:pictures?|films?|sounds)\b", path.read_text(encoding="utf-8"), re.IGNORECASE))
        for path in files(*(name for name in COUNTED if name in CLEAN))
    }
    worst = sorted(((uses, str(path.relative_to(ROOT))) for path, uses in count.items() if uses), reverse=True)
    assert sum(count.values()) <= MOST, worst
