"""Chatting on the page in a real browser: with a real model, and with a server that sends what a test writes."""

import re

import pytest

from tests.serving.page.actions import WAITING, configure, exported, roles, say, visit
from tests.serving.page.page_server import PageServer
from tests.serving.served import Server


openai = pytest.importorskip("openai")


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
    visit(browser, real_url)
    configure(browser, max_tokens="40")
    browser.run(
        "window.lengths = new Set(); const log = document.querySelector('#log');"
        "new MutationObserver(() => lengths.add(log.querySelector('.open .content')?.textContent.length))"
        ".observe(log, { subtree: true, childList: true, characterData: true })"
    )
    say(browser, "Describe the sea.")
    # A fast model writes several tokens between two frames.
    assert len(browser.run("return [...lengths].filter((length) => length > 0)")) > 1


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop(page, server, way):
    """The text so far stays, and another reply can be generated."""
    server.pieces = ["some text", 600.0]
    page.type("One?<Enter>")
    page.wait("document.querySelector('article.assistant .content')?.textContent === 'some text'")
    assert page.text("#send") == "Stop"
    page.type("next<Escape>") if way == "key" else page.click("#send")
    page.wait(WAITING)
    assert roles(page) == [("user", "One?"), ("assistant", "some text")] and "Stopped" in page.texts(".stats")[-1]
    assert page.run("return document.querySelector('#text').value") == ("next" if way == "key" else "")
    server.pieces = ["all of it"]
    page.click("article:last-child .retry")
    page.wait("document.querySelector('article.assistant .content').textContent === 'all of it'")


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
