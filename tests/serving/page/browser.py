"""Chromium without a window, driven through ChromeDriver's HTTP interface (W3C WebDriver)."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's name of the key that holds an element's id
KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Escape": "\ue00c", "Tab": "\ue004"}
FLAGS = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]


def find_chromium() -> tuple[str, str]:
    """Returns the paths of Chromium and ChromeDriver, or skips."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and ChromeDriver (Debian: apt install chromium chromium-driver)")
    return browser, driver


class Browser:
    """A browser with one tab and an empty profile.

    Args:
        folder (`Path`): where downloads go.
    """

    def __init__(self, folder: Path):
        browser, driver = find_chromium()
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stdout if "successfully on port" in line)
        self.url = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        preferences = {"download.default_directory": str(folder)}
        options = {"binary": browser, "args": FLAGS, "prefs": preferences}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.url += "/" + session["sessionId"]

    def send(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def close(self) -> None:
        self.send("DELETE", "")
        self.process.terminate()
        self.process.wait(timeout=30)

    def open(self, url: str) -> None:
        self.send("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs the body of an `async` function in the page, and returns its result."""
        script = f"return (async function() {{ {script} }}).apply(null, arguments)"
        return self.send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def protocol(self, command: str, **parameters: Any) -> Any:
        """Sends a command of the DevTools protocol."""
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def type(self, text: str) -> None:
        """Types into what has the focus; `<Shift+Enter>` and the like are keys."""
        events = []
        while text:
            end = text.find(">")
            names = text[1:end].split("+") if text[0] == "<" else []
            is_key = bool(names) and KEYS.keys() >= set(names)
            keys = [KEYS[name] for name in names] if is_key else [text[0]]
            text = text[end + 1 :] if is_key else text[1:]
            events += [{"type": "keyDown", "value": key} for key in keys]
            events += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": events}]})

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, as a mouse would: another element above it is an error."""
        element = self.send("POST", "/element", {"using": "css selector", "value": selector})
        self.send("POST", f"/element/{element[ELEMENT]}/click", {})

    def texts(self, selector: str) -> list[str]:
        """The text of each visible element that matches."""
        found = "[...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())"
        return self.run(f"return {found}.map((one) => one.innerText)", selector)

    def text(self, selector: str) -> str:
        """The text of the one element that matches, or of none that is visible."""
        texts = self.texts(selector)
        assert len(texts) < 2, texts
        return "".join(texts)

    def wait(self, condition: str | Callable[[], Any], seconds: float = 60) -> Any:
        """Waits until a function, or an expression of JavaScript, gives something true, and returns it."""
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {condition}") if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}\n{self.text('body')}"
            time.sleep(0.05)
        return found

    def resize(self, width: int, height: int, is_phone: bool = False) -> None:
        scale = {"deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self.protocol("Emulation.setDeviceMetricsOverride", width=width, height=height, **scale)
        self.protocol("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    def prefer(self, **features: str) -> None:
        """Sets media features, such as `prefers_color_scheme="dark"`."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.protocol("Emulation.setEmulatedMedia", features=listed)

    def errors(self) -> list[str]:
        """What the console got since the last call, such as violations of the content security policy."""
        return [entry["message"] for entry in self.send("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("GET", "/screenshot")))
