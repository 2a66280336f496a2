import os

import pytest


@pytest.fixture
def fuzz_rounds():
    """How many mutations a test tries; `make fuzz` sets more."""
    return int(os.environ.get("HFVLM_FUZZ", 200))
