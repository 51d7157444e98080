"""Conversations that the page keeps in the browser."""

from tests.serving.page.actions import EXPORTED, WAITING, configure, exported, roles, say, stored
from tinyllama_hf.finetune.conversations import read_conversations


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
