"""The page for people in a real browser: with a real model, and with a server that sends what a test writes."""

import contextlib
import json
import re

import pytest

from tests.serving.browser import Browser
from tests.serving.page_server import PageServer
from tests.serving.served import Server
from tinyllama_hf.finetune.conversations import read_conversations


openai = pytest.importorskip("openai")

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
EXPORTED = "conversations.jsonl"
WAITING = "!document.querySelector('.open') && document.querySelector('#send').textContent !== 'Stop'"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads):
    started = Browser(downloads)
    yield started
    started.close()


@pytest.fixture
def browser(chromium):
    """The browser at the size of a desktop; a test fails if the page wrote to the console."""
    chromium.resize(1280, 800)
    chromium.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    chromium.errors()
    yield chromium
    chromium.run("for (const one of ['localStorage', 'sessionStorage']) try { window[one].clear() } catch {}")
    written = [line for line in chromium.errors() if "Failed to load resource" not in line]
    chromium.open("about:blank")
    assert not written


@pytest.fixture(scope="module")
def served(local):
    """The server of a random model, which tests may tell what to reply, and its address."""
    made = PageServer(*local)
    with made.running() as url:
        yield made, url


@pytest.fixture
def server(served):
    served[0].reset()
    return served[0]


@pytest.fixture
def page(browser, served, server):
    """The page of this server."""
    visit(browser, served[1])
    return browser


@pytest.fixture(scope="module", params=["micro", pytest.param("smollm2", marks=pytest.mark.slow)])
def real_url(request, tmp_path_factory):
    """The page of a real model: a random one, and by the command one that speaks."""
    if request.param == "micro":
        with PageServer(*request.getfixturevalue("local")).running() as url:
            yield url
    else:
        options = ("--page", "--dtype", "fp32", "--device", "cpu")
        started = Server(request.getfixturevalue("smollm2"), tmp_path_factory.mktemp("cwd"), *options)
        yield started.url.removesuffix("v1")
        started.stop()


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


def test_conversation_with_a_real_model(browser, real_url):
    """By keyboard alone. The text on the page is the text that the server sends to any client."""
    visit(browser, real_url)
    client = openai.OpenAI(base_url=f"{real_url}v1", api_key="none", max_retries=0)
    (model,) = client.models.list()
    assert browser.text("#name") == model.id and "float32 · not quantized · context of" in browser.text("#details")
    configure(browser, temperature="0", max_tokens="24", system="Be brief.")
    say(browser, "Say hello.")
    say(browser, "And now goodbye.")
    messages = [{"role": "system", "content": "Be brief."}]
    for i, question in enumerate(("Say hello.", "And now goodbye.")):
        messages.append({"role": "user", "content": question})
        right = client.chat.completions.create(model=model.id, messages=messages, temperature=0, max_tokens=24)
        messages.append({"role": "assistant", "content": right.choices[0].message.content})
        assert roles(browser)[2 * i : 2 * i + 2] == [(m["role"], m["content"]) for m in messages[-2:]]
    tokens = right.usage.completion_tokens
    stats = browser.texts("article.assistant .stats")[-1]
    assert re.search(rf"\b{tokens} tokens · \d+\.\d s · \d+\.\d tokens/s · first token \d+\.\d\d s$", stats)
    assert f"{right.usage.total_tokens} of" in browser.text("#used")


def test_the_reply_appears_while_it_is_generated(browser, real_url):
    """And Escape ends it; the text so far stays, and the server is free for the next request."""
    visit(browser, real_url)
    browser.type("Describe the sea at length.<Enter>")
    length = "document.querySelector('.open .content')?.textContent.length"
    first = browser.wait(length)
    browser.wait(f"{length} > {first}")
    assert browser.text("#send") == "Stop"
    browser.type("<Escape>")
    browser.wait(WAITING)
    text = roles(browser)[1][1]
    assert text and "Stopped" in browser.texts(".stats")[-1]
    configure(browser, max_tokens="4")
    browser.click("article:last-child .retry")
    browser.wait("document.querySelector('.stats:last-child') && !document.querySelector('.open')")
    assert roles(browser)[1][1] != text and "4 tokens" in browser.texts(".stats")[-1]


def test_a_base_model_continues_texts(browser, served_folder, downloads):
    """Without a template; a second Continue continues the whole text so far, which is exported as one text."""
    from tinyllama_hf import load

    with PageServer(*load(served_folder)).running() as url:
        visit(browser, url)
        assert "--template" in browser.text("#empty") and browser.text("#send") == "Continue"
        configure(browser, temperature="0", max_tokens="8")
        say(browser, "def f(x):")
        say(browser, "")
        client = openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
        texts = ["def f(x):"]
        for _ in range(2):
            prompt = "".join(texts)
            right = client.completions.create(model="my-model", prompt=prompt, temperature=0, max_tokens=8)
            texts.append(right.choices[0].text)
        assert roles(browser) == list(zip(("user", "assistant", "assistant"), texts, strict=True))
        assert len(browser.texts("article footer")) == 1
        assert exported(browser, downloads) == [{"text": "".join(texts)}]
        browser.click("article:last-child .edit")
        say(browser, " # a function")
        assert roles(browser)[0] == ("user", "def f(x): # a function") and len(roles(browser)) == 2


def test_states(page, server):
    """Empty, waiting, reply under way, finished."""
    assert len(page.texts("#examples button")) == 3 and not page.texts("article")
    server.pieces = [0.5, "Because ", 0.5, "of **scattering**."]
    page.click("#examples button")
    assert page.wait("document.querySelector('.waiting') && document.querySelector('#send').textContent") == "Stop"
    assert page.wait("document.querySelector('.open:not(.waiting) .content')?.textContent === 'Because '")
    page.wait(WAITING)
    assert page.texts("article .content")[1] == "Because of scattering."
    assert page.text("#empty") == "" and page.text("#list .title").startswith("Why is the sky blue?")
    stats = page.texts(".stats")[-1]
    seconds, rate, first = map(
        float, re.fullmatch(r"2 tokens · (.*) s · (.*) tokens/s · first token (.*) s", stats).groups()
    )
    assert first >= 0.5 and seconds >= first + 0.4 and rate == pytest.approx(1 / (seconds - first), rel=0.2)


def test_what_is_sent(page, server):
    """Settings without a value are left out, so that the server's defaults hold."""
    server.pieces = ["yes"]
    say(page, "One?")
    assert server.bodies[-1] == {
        "model": "my-model",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "One?"}],
    }
    configure(page, temperature="0.5", top_p="0.9", max_tokens="9", seed="7", stop="END\n\nSTOP", system="Be kind.")
    say(page, "Two<Shift+Enter>lines?")
    body = server.bodies[-1]
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Two\nlines?"},
    ]
    assert {k: v for k, v in body.items() if k not in server.bodies[0]} == {
        **{"temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "seed": 7, "stop": ["END", "STOP"]}
    }
    page.click("#open-settings")
    page.click("#reset")
    page.click("#settings [type=submit]")
    say(page, "Three?")
    assert server.bodies[-1].keys() == server.bodies[0].keys()


def test_invalid_settings_are_refused_at_once(page, server):
    configure(page, temperature="3")
    invalid = page.run("return [...document.querySelectorAll('#settings[open] input:invalid')].map((one) => one.name)")
    assert invalid == ["temperature"]
    page.type("<Escape>")
    page.wait("!document.querySelector('#settings').open")
    server.pieces = ["x"]
    say(page, "One?")
    assert "temperature" not in server.bodies[-1]


def test_properties_of_the_server(browser, local):
    """With a draft, each reply shows how many of its tokens were accepted."""
    from tinyllama_hf.inference.load import load_draft

    made = PageServer(*local, load_draft("lookup", *local), draft="lookup", quantization="nf4", dtype="bfloat16")
    with made.running() as url:
        visit(browser, url)
        assert browser.text("#details") == "bfloat16 · nf4 · draft lookup · context of 400 tokens"
        shown = browser.run("return [...document.querySelectorAll('#settings input')].map((one) => one.placeholder)")
        assert shown == ["0.8", "0.95", "400", "random"]
        configure(browser, temperature="0", max_tokens="60")
        say(browser, "One, two, three, four, one, two, three, four, one")
        assert re.search(r"\d+% of \d+ drafted tokens accepted$", browser.texts(".stats")[-1])


def test_retry_and_edit(page, server):
    server.pieces = ["first"]
    say(page, "One?")
    server.pieces = ["second"]
    page.click("article.assistant .retry")
    page.wait("document.querySelector('article.assistant .content').textContent === 'second'")
    page.wait(WAITING)
    assert roles(page) == [("user", "One?"), ("assistant", "second")]
    page.type("a draft")
    page.click("article.user .edit")
    assert page.run("return document.querySelector('#text').value") == "One?"
    page.type("<Escape>")
    assert page.run("return document.querySelector('#text').value") == "a draft"
    page.click("article.user .edit")
    say(page, " Or two?")
    assert roles(page) == [("user", "One? Or two?"), ("assistant", "second")]
    assert page.run("return document.querySelector('#text').value") == "a draft"
    server.refusal = (503, "the server ends", {})
    page.click("article.assistant .retry")
    page.wait("!document.querySelector('#notice').hidden")
    assert roles(page)[1] == ("assistant", "second"), "a reply is replaced only by another one"


def test_conversations_are_kept(page, server):
    """After a reload, too; a new name and a deletion are final, and deleting is confirmed."""
    server.pieces = ["yes"]
    say(page, "One?")
    page.click("#new")
    say(page, "Two?")
    assert page.texts("#list .title") == ["Two?", "One?"]
    page.click("#list li:last-child .title")
    assert page.texts("article .content") == ["One?", "yes"]
    page.send("POST", "/refresh", {})
    page.wait("document.querySelectorAll('article').length === 2")
    assert page.texts("article .content") == ["One?", "yes"] and "tokens" in page.texts(".stats")[1]
    page.click("#list [aria-current] .rename")
    page.run("document.querySelector('#ask input').select()")
    page.type("The first<Enter>")
    assert page.wait("document.querySelector('#list .title').textContent === 'The first'")
    page.click("#list [aria-current] .delete")
    page.type("<Escape>")
    page.wait("!document.querySelector('#ask').open")
    assert len(page.texts("#list .title")) == len(stored(page)) == 2
    page.click("#list [aria-current] .delete")
    assert "The first" in page.text("#ask")
    page.click("#ask [type=submit]")
    page.wait("document.querySelectorAll('#list .title').length === 1")
    assert [one["title"] for one in stored(page)] == ["Two?"] and not page.texts("article")


def test_a_reply_continues_while_another_conversation_is_open(page, server):
    server.pieces = ["one ", 1.0, "two"]
    page.type("First<Enter>")
    page.wait("document.querySelector('.open .content').textContent === 'one '")
    page.click("#new")
    server.pieces = ["other"]
    say(page, "Second")
    assert page.texts("article .content") == ["Second", "other"]
    page.click("#list li:last-child .title")
    page.wait(WAITING)
    assert page.texts("article .content") == ["First", "one two"]


def test_two_tabs(page, server):
    """What another tab saves or deletes is seen, also during a reply, which continues."""
    server.pieces = ["one ", 1.0, "two"]
    page.type("First<Enter>")
    page.wait("document.querySelector('.open .content')?.textContent === 'one '")
    page.run(
        "const messages = [{ role: 'user', content: 'x' }], one = { id: 'a', title: 'Other', messages, updated: 1 };"
        "localStorage['tinyllama_hf.v1.conversation.a'] = JSON.stringify(one); dispatchEvent(new Event('storage'))"
    )
    assert page.texts("#list .title") == ["First", "Other"]
    page.wait(WAITING)
    assert page.texts("article .content") == ["First", "one two"]
    page.run("delete localStorage['tinyllama_hf.v1.conversation.a']; dispatchEvent(new Event('storage'))")
    assert page.texts("#list .title") == ["First"] and roles(page)[1] == ("assistant", "one two")


def test_export_is_what_fine_tuning_reads(page, server, downloads):
    server.pieces = ["yes ü"]
    configure(page, system="Be kind.")
    say(page, "One?")
    server.refusal = (503, "busy", {})
    say(page, "unanswered")
    page.click("#new")
    server.refusal = (503, "busy", {})
    say(page, "never answered")
    (row,) = exported(page, downloads)
    assert [m["content"] for m in row["messages"]] == ["Be kind.", "One?", "yes ü"]
    (conversation,) = read_conversations(str(downloads / EXPORTED))
    assert "yes ü" in str(conversation)


def test_broken_storage(page, server):
    """What cannot be read is named and left unchanged, and the rest works."""
    server.pieces = ["yes"]
    say(page, "One?")
    broken = ["{", '{"id": "b", "title": "b", "messages": [{"role": "user"}]}', "null"]
    for i, text in enumerate(broken):
        page.run("localStorage[`tinyllama_hf.v1.conversation.${arguments[0]}`] = arguments[1]", i, text)
    page.run("localStorage['tinyllama_hf.v1.settings'] = '['")
    page.send("POST", "/refresh", {})
    page.wait("document.querySelectorAll('article').length === 2")
    assert "3 saved conversations" in page.text("#notice") and page.texts("#list .title") == ["One?"]
    say(page, "Two?")
    assert page.texts("article .content")[2:] == ["Two?", "yes"]
    kept = page.run("return [0, 1, 2].map((i) => localStorage[`tinyllama_hf.v1.conversation.${i}`])")
    assert kept == broken


def test_full_storage(page, server):
    page.run(
        "for (let size = 2 ** 22; size; size >>= 1)"
        " try { for (let i = 0; i < 9; i++) localStorage[`other${size}${i}`] = 'x'.repeat(size) } catch {}"
    )
    server.pieces = ["yes"]
    say(page, "One?")
    assert page.texts("article .content") == ["One?", "yes"] and "not saved" in page.text("#notice")


def test_storage_that_is_switched_off(page, server):
    """As in a browser that refuses all cookies, where even the name `localStorage` is an error."""
    off = (
        "for (const n of ['localStorage', 'sessionStorage']) Object.defineProperty(window, n, {get() {throw Error()}})"
    )
    script = page.protocol("Page.addScriptToEvaluateOnNewDocument", source=off)
    try:
        page.send("POST", "/refresh", {})
        page.wait("document.querySelector('#details').textContent && document.activeElement.id === 'text'")
        server.pieces = ["yes"]
        say(page, "One?")
        assert page.texts("article .content") == ["One?", "yes"] and "not saved" in page.text("#notice")
    finally:
        page.protocol("Page.removeScriptToEvaluateOnNewDocument", **script)


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
