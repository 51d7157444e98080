"""Errors of the server on the page, and its key: nothing that was typed is lost."""

import contextlib

import pytest

from tests.serving.page.actions import WAITING, configure, roles, say, visit
from tests.serving.page.page_server import PageServer


def test_the_key(browser, local):
    """It is asked for until it is right, then kept for this tab only."""
    with PageServer(*local, api_key="secret").running() as url:
        browser.open(url)
        browser.wait("document.querySelector('#ask').open")
        browser.type("<Escape>")
        browser.wait("!document.querySelector('#problem').hidden")
        browser.click("#problem button")
        browser.wait("document.querySelector('#ask').open")
        browser.type("wrong<Enter>")
        browser.wait("document.querySelector('#ask p').textContent.includes('refused')")
        browser.type("secret<Enter>")
        browser.wait("document.querySelector('#details').textContent")
        configure(browser, max_tokens="4")
        say(browser, "One?")
        assert roles(browser)[1][1]
        browser.send("POST", "/refresh", {})
        browser.wait("document.querySelectorAll('article').length === 2")
        assert "secret" not in browser.run("return JSON.stringify(localStorage) + document.body.innerHTML")


def test_a_refusal_and_its_retry(page, server):
    server.refusal = (429, "64 requests are waiting", {"Retry-After": "7"})
    say(page, "One?")
    assert "64 requests are waiting. Try again in 7 s." in page.text("#problem")
    server.pieces = ["yes"]
    page.type("typed meanwhile")
    page.click("#problem button")
    page.wait("document.querySelectorAll('article').length === 2")
    page.wait(WAITING)
    assert page.texts("article .content") == ["One?", "yes"] and page.text("#problem") == ""
    assert page.run("return document.querySelector('#text').value") == "typed meanwhile"


def test_a_server_that_is_gone(browser, server):
    """Nothing typed is lost, also over a reload without the server; Retry works when it is back."""
    with server.running() as url:
        visit(browser, url)
    say(browser, "One?")
    assert "does not answer" in browser.text("#problem") and browser.texts("article .content") == ["One?"]
    say(browser, "Two?")
    assert browser.texts("article .content") == ["One?\n\nTwo?"]
    server.pieces = ["yes"]
    with server.running(int(url.split(":")[-1].strip("/"))):
        browser.click("#problem button")
        browser.wait("document.querySelectorAll('article').length === 2")
        browser.wait(WAITING)
    assert roles(browser) == [("user", "One?\n\nTwo?"), ("assistant", "yes")]


@pytest.mark.parametrize(
    ("end", "message"),
    [({"error": {"message": "out of memory"}}, "out of memory"), (None, "The connection to the server ended")],
)
def test_a_reply_that_breaks_off(browser, server, end, message):
    """The text so far stays, with the reason."""
    server.pieces = ["some text", end or 30.0]
    with contextlib.ExitStack() as stack:
        visit(browser, stack.enter_context(server.running()))
        browser.type("One?<Enter>")
        browser.wait("document.querySelector('article.assistant .content')?.textContent === 'some text'")
        if end is None:
            stack.close()  # the server ends
        browser.wait(WAITING)
        assert message in browser.texts(".stats")[1] and roles(browser)[1] == ("assistant", "some text")


def test_the_context_is_full(page, server):
    server.pieces = ["x"] * 300 + [{"choices": [{"delta": {}, "finish_reason": "length"}]}]
    say(page, "One?")
    assert "310 of 400" in page.text("#used") and "limit of tokens" in page.texts(".stats")[1]
    server.pieces = ["x"] * 350
    say(page, "Two?")
    assert "90% of the context" in page.text("#used")


HOSTILE = (
    "<script>window.hit = 1</script> <img src=x onerror='window.hit = 1'> <b>bold</b> [a](javascript:window.hit=1) "
    '[b](data:text/html,x) [c]( http://a" onclick="x) [d](https://a.org/"onclick="x)\n\n'
    "```html\n<script>window.hit = 1"
)


def test_a_message_that_is_too_long(page, server):
    """The model's own server says so; the message can be edited."""
    page.run("document.querySelector('#text').value = 'word '.repeat(500)")
    say(page, "")
    assert "400" in page.text("#problem") and "Start a new conversation" in page.text("#problem")
    page.click("article.user .edit")
    page.run("document.querySelector('#text').value = ''")
    server.pieces = ["yes"]
    say(page, "Short?")
    assert roles(page) == [("user", "Short?"), ("assistant", "yes")]
