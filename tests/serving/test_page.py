"""The page in Chromium: by keyboard, for screen readers, and that nothing of the data runs."""

import pytest

from hfvlm.serving import launch
from tests.serving.test_launch import running
from tests.support.browser import CHROMIUM, REASON, Browser

pytestmark = [pytest.mark.integration, pytest.mark.skipif(CHROMIUM is None, reason=REASON)]
FOCUSED = "((e) => e.getAttribute('name') || e.textContent.trim() || e.className)(document.activeElement)"


@pytest.fixture(scope="module")
def address(mixed_index, llava_folder):
    with running(launch.make_server(mixed_index, chat=llava_folder, port=0)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.open(address)
        browser.wait("!document.getElementById('chat').hidden")
        yield browser


def tab_to(browser, name, most=40):
    """Press Tab until something has the focus; the names on the way."""
    seen = []
    while not seen or seen[-1] != name:
        assert len(seen) < most, seen
        browser.press("Tab")
        seen.append(browser.value(FOCUSED))
    return seen


def status(section):
    return f"document.querySelector('#{section} .status').textContent"


def test_everything_has_a_name_and_is_reached_in_order(browser):
    found = browser.accessible()
    controls = [
        name for role, name in found if role in ("textbox", "button", "combobox", "spinbutton", "link", "searchbox")
    ]
    assert len(controls) > 15
    assert all(controls), found
    assert {"Search", "Classify", "Chat"} <= {name for role, name in found if role == "region"}
    assert [name for role, name in found if role == "log"] == ["Conversation"]
    assert sum(role == "status" for role, _ in found) >= 4
    order = tab_to(browser, "New conversation")
    assert order[0] == "Skip to the forms"
    wanted = ["text", "image", "audio", "among", "k", "Search", "label", "templates", "Classify", "question", "Ask"]
    assert [name for name in dict.fromkeys(order) if name in wanted] == wanted


def test_search_by_keyboard(browser, mixed_index):
    browser.value("document.activeElement.blur(), document.querySelector('.skip').focus()")
    tab_to(browser, "text")
    browser.type("a large red circle")
    browser.press("Enter")
    browser.wait(f"{status('search')} === '8 hits of image, the nearest first.'")
    browser.wait("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    names = browser.value("[...document.querySelectorAll('#search li')].map((x) => x.innerText)")
    assert any("<b>" in name for name in names), "names are no markup"
    assert browser.value("document.querySelectorAll('li b').length") == 0
    scores = browser.value("[...document.querySelectorAll('.score')].map((x) => Number(x.textContent))")
    assert scores == sorted(scores, reverse=True)


def test_search_by_files_and_players(browser, mixed_media, red_circle, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(red_circle)
    browser.value("document.querySelector('#search form').reset()")
    browser.choose("#search [name=image]", path)
    browser.choose("#search [name=audio]", mixed_media / "440.wav")
    browser.value("document.querySelector('#search [name=among]').value = 'audio'")
    browser.value("document.querySelector('#search form').requestSubmit()")
    browser.wait(f"{status('search')} === '3 hits of audio, the nearest first.'")
    browser.wait(
        "[...document.querySelectorAll('audio')].every((x) => x.readyState >= 1 && Math.abs(x.duration - 2) < .01)"
    )
    assert browser.value("document.querySelectorAll('audio[controls]').length") == 3


def test_errors_are_announced(browser, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"nothing")
    browser.value("document.querySelector('#search form').reset()")
    browser.choose("#search [name=image]", path)
    browser.value("document.querySelector('#search form').requestSubmit()")
    assert "not an image" in browser.wait(f"document.querySelector('#search .status.error') && {status('search')}")
    browser.value("document.querySelector('#search form').reset()")
    assert browser.value(status("search")) == ""


def test_classify(browser, red_circle, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(red_circle)
    browser.value("document.querySelector('[name=label]').focus()")
    browser.type("red circle\n\nblue square\n")
    browser.choose("#classify [name=image]", path)
    tab_to(browser, "Classify")
    browser.press("Enter")
    browser.wait(f"{status('classify')} === 'Most probable: red circle.'")
    assert browser.value("document.querySelectorAll('#classify tbody tr').length") == 2


def test_chat_is_streamed(browser, red_circle, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(red_circle)
    browser.value("document.querySelector('[name=max_new_tokens]').value = 8")
    browser.value("document.querySelector('[name=question]').focus()")
    browser.type("What is it?")
    browser.choose("#chat [name=image]", path)
    browser.press("Enter")
    browser.wait("document.querySelector('#chat .answer') && !document.querySelector('[aria-busy]')")
    assert browser.value("document.querySelector('#chat .question').textContent") == "What is it?"
    first = browser.value("conversation")
    assert first
    browser.value("document.querySelector('[name=question]').focus()")
    browser.type("Why?")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#chat .answer').length === 2 && !document.querySelector('[aria-busy]')")
    assert browser.value("conversation") == first
    browser.value("document.querySelector('#chat [type=reset]').click()")
    assert browser.value("[conversation, document.querySelector('.log').children.length]") == [None, 0]


def test_other_pages_get_nothing(browser, address):
    """A page of another origin, in the same browser."""
    browser.open("data:text/html,<title>other</title>")
    for options in ("{}", "{mode: 'no-cors'}", "{method: 'POST', mode: 'no-cors', body: new FormData()}"):
        found = browser.value(f"fetch('{address}/about', {options}).then((x) => x.text(), () => 'refused')")
        assert found in ("refused", "")
    image = f"const image = new Image(); image.src = '{address}/media/image/0'; image.onload = image.onerror ="
    assert browser.value(f"new Promise((found) => {{ {image} (event) => found(event.type) }})") == "error"
    browser.open(address)
    browser.wait("!document.getElementById('chat').hidden")


def test_dark_and_narrow(browser):
    light = browser.value("getComputedStyle(document.querySelector('.hits')).color")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    assert browser.value("getComputedStyle(document.querySelector('.hits')).color") != light
    assert browser.value("document.documentElement.scrollWidth <= 360")


def test_the_browser_has_nothing_to_complain_about(browser):
    complaints = [each for each in browser.complaints() if "422" not in str(each) and "other" not in str(each)]
    assert [each for each in complaints if "Content Security Policy" in str(each) or "exception" in str(each)] == []
