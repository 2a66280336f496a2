"""One logger, which transformers' verbosity quiets."""

import logging

import pytest
from transformers import AutoProcessor
from transformers.utils import logging as transformers_logging

import hfvlm
from hfvlm.logs import logged_once, logger
from tests.support.processes import run_fresh


@pytest.fixture(autouse=True)
def _verbosity():
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", ["hfvlm", "hfvlm.training.data", "hfvlm.processing.tokenization"])
def test_follows_transformers(name):
    ours = logging.getLogger(name)
    for level in (logging.ERROR, logging.INFO, logging.WARNING):
        transformers_logging.set_verbosity(level)
        assert ours.getEffectiveLevel() == level
        assert [ours.isEnabledFor(each) for each in (level - 10, level)] == [False, True]


def test_a_level_of_its_own_goes_first():
    transformers_logging.set_verbosity_error()
    logger.setLevel(logging.DEBUG)
    assert logging.getLogger("hfvlm.inference").isEnabledFor(logging.DEBUG)
    assert not logging.getLogger("transformers").isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("verbosity", "seen"), [("error", False), ("warning", True)])
def test_the_environment_quiets_it(verbosity, seen):
    code = "import hfvlm, logging, transformers\nfrom transformers.utils import logging as t; t.get_logger('x')\n"
    code += "logging.getLogger('hfvlm.media').warning('odd')"
    done = run_fresh(code, TRANSFORMERS_VERBOSITY=verbosity)
    assert ("odd" in done.stderr) is seen


def test_cut_texts_are_reported_in_one_line(clip_folder, caplog):
    tokenizer = AutoProcessor.from_pretrained(clip_folder).tokenizer
    tokenizer(["short", *["a large red circle and " * 9] * 24])
    (record,) = caplog.records
    assert "Text 1 is too long" in record.message
    assert "23 more were cut, too" in record.message


def test_a_classifier_tells_it_once(clip_folder, caplog):
    labels = [f"a large red circle and a small blue square number {i}" for i in range(8)]
    hfvlm.ZeroShotClassifier.from_pretrained(clip_folder, labels, "imagenet", device="cpu")
    assert len([record for record in caplog.records if "too long" in record.message]) == 1


def test_logged_once_ends_with_its_block(caplog):
    with logged_once("hfvlm.media"):
        logging.getLogger("hfvlm.media").warning("a")
        logging.getLogger("hfvlm.media").warning("b")
    logging.getLogger("hfvlm.media").warning("c")
    assert [record.message for record in caplog.records] == ["a", "c"]
