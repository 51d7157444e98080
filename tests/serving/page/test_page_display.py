"""How the page shows replies: safely, cheaply, on a phone, and to people who use no mouse or no screen."""

import pytest

from tests.serving.page.actions import WAITING, say


HOSTILE = (
    "<script>window.hit = 1</script> <img src=x onerror='window.hit = 1'> <b>bold</b> [a](javascript:window.hit=1) "
    '[b](data:text/html,x) [c]( http://a" onclick="x) [d](https://a.org/"onclick="x)\n\n'
    "```html\n<script>window.hit = 1"
)
CONTRAST = """
const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
// Paints colors above each other, as the browser does.
const flatten = (colors) => {
  for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
  return context.getImageData(0, 0, 1, 1).data;
};
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
  if ((!texts.length && !element.placeholder) || !element.checkVisibility() || element.disabled) continue;
  const grounds = [];
  for (let one = element; one; one = one.parentElement) grounds.unshift(getComputedStyle(one).backgroundColor);
  const style = getComputedStyle(element, element.placeholder ? "::placeholder" : null);
  const [a, b] = [luminance(flatten(grounds)), luminance(flatten([...grounds, style.color]))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push(`${element.outerHTML.slice(0, 60)} ${ratio}`);
}
return poor;
"""


def test_a_hostile_reply_is_text(page, server):
    """As a reply and as a title; the fence without an end is a block of code."""
    server.pieces = [HOSTILE]
    say(page, "<img src=x onerror='window.hit = 1'>")
    page.send("POST", "/refresh", {})
    page.wait("document.querySelectorAll('article').length === 2")
    shown = page.text("article.assistant .content")
    for part in ("<script>window.hit = 1</script> <img src=x onerror='window.hit = 1'> <b>bold</b>", "javascript:"):
        assert part in shown
    assert page.text("article.assistant pre") == "<script>window.hit = 1"
    assert page.text("#list .title") == "<img src=x onerror='window.hit = 1'>"
    made = page.run("return document.querySelectorAll('img, #log script, [onclick], [onerror]').length")
    assert (made, page.run("return window.hit ?? null")) == (0, None)
    links = page.run("return [...document.querySelectorAll('#log a')].map((a) => [a.protocol, a.rel])")
    assert links == [["http:", "noopener noreferrer"], ["https:", "noopener noreferrer"]]


def test_a_reply_under_way_is_drawn_once_per_frame(page, server):
    """And only its last block: the nodes of finished blocks stay."""
    page.run(
        "window.frames_ = 0; window.draws = 0;"
        "requestAnimationFrame(function step() { frames_++; requestAnimationFrame(step) });"
        "new MutationObserver(() => draws++)"
        ".observe(document.querySelector('#log'), { subtree: true, childList: true, characterData: true })"
    )
    server.pieces = ["The *first* block.\n\n", 0.2, *["word "] * 3000, 0.2, "end"]
    page.type("One?<Enter>")
    page.wait("document.querySelector('.open em')")
    page.run("window.first = document.querySelector('.open em')")
    page.wait(WAITING)
    assert page.run("return first === document.querySelector('article.assistant em')")
    draws, frames = page.run("return [draws, frames_]")
    assert 3 < draws <= frames + 5 and draws < 1000
    assert page.text("article.assistant").count("word") == 3000


def test_replies_are_announced_once(page, server):
    page.run(
        "window.said = []; const element = document.querySelector('#announcement');"
        "new MutationObserver(() => said.push(element.textContent)).observe(element, { childList: true })"
    )
    server.pieces = ["one ", 0.1, "two ", 0.1, "three"]
    say(page, "One?")
    assert page.run("return said") == ["The model is replying.", "one two three"]
    assert page.run("return [...document.querySelectorAll('[aria-live], [role=log]')].length") == 0


def test_enter_while_composing_does_not_send(page, server):
    """A Japanese or Chinese input method takes Enter for itself."""
    server.pieces = ["yes"]
    page.protocol("Input.imeSetComposition", text="にほん", selectionStart=3, selectionEnd=3)
    page.protocol("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert not page.texts("article") and page.run("return document.querySelector('#text').value") == "にほん"
    page.protocol("Input.insertText", text="日本")
    say(page, "")
    assert page.texts("article .content")[0] == "日本"


def test_keyboard_alone(page, server):
    """Tab reaches every control in view, each with a name and a visible focus."""
    server.pieces = ["```\ncode\n```"]
    say(page, "One?")
    reached = []
    for _ in range(40):
        page.type("<Tab>")
        found = page.run(
            "const one = document.activeElement, box = one.closest('#box') ?? one;"
            "return [one.id || one.className || one.localName, getComputedStyle(box).outlineStyle]"
        )
        if reached and found[0] == reached[0][0]:
            break
        if found[0] != "body":
            reached.append(found)
    names = {name for name, *_ in reached}
    assert {"new", "title", "rename", "delete", "export", "open-settings", "scroll", "copy", "retry", "text"} <= names
    assert all(outline == "solid" for _, outline in reached), reached
    tree = page.protocol("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in tree if n.get("role", {}).get("value") in ("button", "textbox", "spinbutton", "region")]
    assert len(controls) > 9 and all(node["name"].get("value") for node in controls)


def test_copy(page, server):
    server.pieces = ["Run:\n\n```sh\nls -l\n```"]
    say(page, "One?")
    page.protocol("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    for selector, text in ((".code button", "ls -l"), ("article.assistant .copy", server.pieces[0])):
        page.click(selector)
        page.wait(f"document.querySelector('{selector}').textContent === 'Copied'")
        assert page.run("return navigator.clipboard.readText()") == text
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    page.click(".code button")  # as on http from another machine
    page.run("delete navigator.clipboard")
    assert page.run("return navigator.clipboard.readText()") == "ls -l"


@pytest.mark.parametrize("width", [360, 390])
def test_phone(page, server, width):
    """No scrolling to the side, whatever a reply holds; the list of conversations is behind a button."""
    page.resize(width, 740, is_phone=True)
    server.pieces = [f"{'x' * 300} `{'y' * 300}` https://a.org/{'z' * 300}\n\n```\n{'w' * 300}\n```\n\n1. {'v' * 300}"]
    say(page, "q" * 300)
    assert page.run("return document.documentElement.scrollWidth") == width
    assert page.run("const e = document.querySelector('#scroll'); return e.scrollWidth <= e.clientWidth")
    assert page.run("return !document.querySelector('#new').checkVisibility({ visibilityProperty: true })")
    page.click("#menu")
    assert page.run("return document.activeElement.id") == "new"
    page.type("<Escape>")
    assert page.run("return document.activeElement.id") == "menu"
    page.click("#menu")
    page.click("#list .title")
    page.wait("!document.querySelector('#new').checkVisibility({ visibilityProperty: true })")
    page.click("#open-settings")
    assert page.run("return document.querySelector('#settings').getBoundingClientRect().right") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, server, scheme):
    """At least 4.5:1 for every text, as WCAG AA asks."""
    page.prefer(prefers_color_scheme=scheme)
    assert page.run(CONTRAST) == []
    server.pieces = ["Text, `code`, https://a.org\n\n```\nblock\n```"]
    say(page, "One?")
    server.refusal = (503, "the server ends", {})
    say(page, "Two?")
    assert page.run(CONTRAST) == []
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.click("#open-settings")
    assert page.run(CONTRAST) == []


def test_reduced_motion(page, server):
    server.pieces = [3.0, "late"]
    page.type("One?<Enter>")
    page.wait("document.querySelector('.waiting')")
    moving = "return document.getAnimations().length"
    assert page.run(moving) == 0
    page.prefer(prefers_reduced_motion="no-preference")
    assert page.run(moving) == 1
