"""The API under schemathesis, which makes requests by its description, right ones and wrong ones."""

from collections import Counter

import pytest

from hfvlm.serving.app import make_app

pytestmark = pytest.mark.integration
schemathesis = pytest.importorskip("schemathesis", reason="comes with hfvlm[integrations]")
hypothesis = pytest.importorskip("hypothesis", reason="comes with schemathesis")

HOST = {"Host": "127.0.0.1:7860"}
EXAMPLES = 15


@pytest.fixture(scope="module")
def description(served):
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(served, upload_bytes=2**20), headers=HOST)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_every_answer_is_one_of_the_description(description, mode):
    """No fault of the server; statuses, types and bodies as described; and what the description forbids is refused.

    What a text or file must be to be embedded, the description cannot say, so that right forms may be refused.
    """
    answered, excluded = Counter(), [schemathesis.checks.positive_data_acceptance]
    for operation in (found.ok() for found in description.get_all_operations()):
        if mode == "NEGATIVE" and not (operation.body or operation.path_parameters):
            continue

        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def answer(case):
            if case.path == "/chat" and mode == "POSITIVE":
                case.body["max_new_tokens"] = 3  # of 512 else
            response = case.call_and_validate(headers=HOST, excluded_checks=excluded, timeout=120)
            answered[case.path] += 1
            assert response.status_code < 500 or response.status_code == 503

        answer()
    assert set(answered) >= {"/embed", "/search", "/classify", "/chat", "/media/{modality}/{row}"}
    assert min(answered.values()) >= 1
