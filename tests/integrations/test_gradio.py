"""The example of a Space, served by Gradio, and asked as its page asks."""

import runpy

import pytest

from hfvlm.samples.scenes import Scene
from tests.serving.conftest import write_tone
from tests.support.paths import EXAMPLES

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
gradio = pytest.importorskip("gradio", reason="comes with hfvlm[integrations]")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    from gradio_client import Client

    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MODEL", raising=False)
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        page = runpy.run_path(str(EXAMPLES / "gradio_space.py"))["page"]
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", inbrowser=False)
        try:
            yield Client(url, verbose=False, download_files=False)
        finally:
            page.close()


def probabilities(client, image, audio, labels):
    from gradio_client import handle_file

    files = [None if path is None else handle_file(str(path)) for path in (image, audio)]
    answer = client.predict(*files, labels, "single", api_name="/classify")
    return {each["label"]: each["confidence"] for each in answer["confidences"]}


def test_it_classifies_images_and_audio(client, tmp_path):
    image, audio = tmp_path / "a.png", tmp_path / "a.wav"
    Scene("red", "circle", "large").render(pixels=48).save(image)
    write_tone(audio, 440)
    found = probabilities(client, image, None, "red circle\nblue square")
    assert max(found, key=found.get) == "red circle"
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert set(probabilities(client, None, audio, "a\nb\n")) == {"a", "b"}


def test_it_says_what_is_missing(client):
    with pytest.raises(Exception, match="Give labels, and one image or one audio clip"):
        probabilities(client, None, None, "a")
