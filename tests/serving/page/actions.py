"""What people do on the page, with the mouse and the keyboard, and what they get."""

import json


EXPORTED = "conversations.jsonl"
WAITING = "!document.querySelector('.open') && document.querySelector('#send').textContent !== 'Stop'"


def visit(browser, url):
    browser.open(url)
    browser.wait("document.querySelector('#details').textContent && document.activeElement.id === 'text'")


def say(browser, text):
    """Sends a message with the keyboard, and waits until there is no reply under way."""
    browser.run("document.querySelector('#text').focus()")
    browser.type(f"{text}<Enter>")
    browser.wait(WAITING)


def configure(browser, **fields):
    """Fills the dialog of settings."""
    browser.click("#open-settings")
    for name, value in fields.items():
        browser.run("document.querySelector(`#settings [name=${arguments[0]}]`).value = arguments[1]", name, value)
    browser.click("#settings [type=submit]")


def stored(browser):
    """The saved conversations, newest first."""
    names = "Object.keys(localStorage).filter((name) => name.includes('.conversation.'))"
    found = browser.run(f"return {names}.map((name) => JSON.parse(localStorage[name]))")
    return sorted(found, key=lambda one: -one["updated"])


def exported(browser, downloads):
    """The rows of the file that the page writes."""
    path = downloads / EXPORTED
    path.unlink(missing_ok=True)
    browser.click("#export")
    browser.wait(path.exists)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def roles(browser):
    return [(message["role"], message["content"]) for message in stored(browser)[0]["messages"]]
