"""A page in headless Chromium, driven over its debugging pipe: keys, files, what is shown and what is read out."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REASON = "needs Chromium: apt-get install chromium"
SECONDS = 60
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "ArrowDown": 40}


class Browser:
    """One page.

    Args:
        profile: a new folder.
        size: of the window.
    """

    def __init__(self, profile, size=(1000, 800)):
        to_browser, self.output = os.pipe()
        self.input, from_browser = os.pipe()
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--no-first-run",
        ]
        command += [
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
        ]
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser} 2>/dev/null'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *command], pass_fds=(to_browser, from_browser)
        )
        os.close(to_browser)
        os.close(from_browser)
        self.count, self.rest, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=SECONDS)
        os.close(self.input)
        os.close(self.output)

    def call(self, method, **parameters):
        """Call a method of the debugging protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while (found := self.receive()).get("id") != self.count:
            self.events.append(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def receive(self):
        end = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            assert select.select([self.input], [], [], max(0, end - time.monotonic()))[0], "Chromium does not answer"
            self.rest += os.read(self.input, 2**16)
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def value(self, expression):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found)
        return found["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)
        return found

    def press(self, key):
        text = {"Enter": "\r", " ": " "}.get(key)
        about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def choose(self, selector, *paths):
        """Choose files for an input, as its dialogue does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(Path(path).resolve()) for path in paths])

    def screenshot(self, path=None):
        """The page as it is seen, as PNG."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path:
            Path(path).write_bytes(data)
        return data

    def accessible(self):
        """What a screen reader gets: (role, name) of all that is not ignored."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [(x["role"]["value"], x.get("name", {}).get("value", "")) for x in nodes if not x["ignored"]]

    def complaints(self):
        """Errors in the page's log: of scripts, of the policy of content, of what was not found."""
        self.value("1")
        found = [event["params"] for event in self.events if event.get("method") == "Log.entryAdded"]
        found += [event["params"] for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        return [each for each in found if each.get("entry", {}).get("level") != "info"]
