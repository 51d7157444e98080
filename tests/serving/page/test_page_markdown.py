"""How the page shows Markdown, run in the browser."""

import pytest

from tests.serving.page.browser import Browser
from tests.serving.page.page_server import PageServer


RENDER = """
const { renderMarkdown } = await import("/markdown.js"), element = document.createElement("div");
renderMarkdown(element, arguments[0]);
"""


@pytest.fixture(scope="module")
def page(local, tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("downloads"))
    with PageServer(*local).running() as url:
        started.open(url)
        yield started
        started.close()


def link(address, text):
    return f'<a href="{address}" title="{address}" target="_blank" rel="noopener noreferrer">{text}</a>'


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("one\ntwo\n\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# A *b*\ntext", "<h4>A <em>b</em></h4><p>text</p>"),
        ("#tag", "<p>#tag</p>"),
        ("**a *b* c** _d_ `e*f*`", "<p><strong>a <em>b</em> c</strong> <em>d</em> <code>e*f*</code></p>"),
        ("`a` b `*c*`", "<p><code>a</code> b <code>*c*</code></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        ("- a\n- b\n  more\n\n- c\n\ntext", "<div><ul><li>a</li><li>b\nmore</li><li>c</li></ul></div><p>text</p>"),
        (
            "3. a\n   - b\n     1. c\n4. d",
            '<div><ol start="3"><li>a<ul><li>b<ol start="1"><li>c</li></ol></li></ul></li><li>d</li></ol></div>',
        ),
        ("- a\n1. b", '<div><ul><li>a</li></ul><ol start="1"><li>b</li></ol></div>'),
        ("  - a\n- b", "<div><ul><li>a</li><li>b</li></ul></div>"),
        ("[a](https://x.org/b_(c))!", f"<p>{link('https://x.org/b_(c)', 'a')}!</p>"),
        ("see https://x.org/a, or", f"<p>see {link('https://x.org/a', 'https://x.org/a')}, or</p>"),
        ("(HTTP://y.org).", f"<p>({link('HTTP://y.org', 'HTTP://y.org')}).</p>"),
        ("[a](javascript:b) [c](/d) [e](ftp://f)", "<p>[a](javascript:b) [c](/d) [e](ftp://f)</p>"),
        ("[<i>](https://x.org)", f"<p>{link('https://x.org', '&lt;i&gt;')}</p>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
    ],
)
def test_markdown(page, markdown, html):
    shown = "for (const a of element.querySelectorAll('a')) a.setAttribute('href', a.getAttribute('href'));"
    assert page.run(f"{RENDER} {shown} return element.innerHTML", markdown) == html


@pytest.mark.parametrize(
    ("markdown", "language", "code", "after"),
    [
        ("```py\na = 1\n\n# b\n```\nafter", "py", "a = 1\n\n# b", "after"),
        ("~~~\n```\n~~~", "text", "```", ""),
        ("````\n```\n````", "text", "```", ""),
        ("1. a\n   ```sh\n   ls\n     -l\n   ```\n2. b", "sh", "ls\n  -l", "b"),
        ("```js\nfor <b>", "js", "for <b>", ""),
    ],
)
def test_code(page, markdown, language, code, after):
    found = (
        "const block = element.querySelector('.code'), [bar, pre] = block.children;"
        "return [bar.children[0].textContent, pre.textContent, block.nextSibling?.textContent ?? '']"
    )
    assert page.run(f"{RENDER} {found}", markdown) == [language, code, after]


def test_a_growing_text_gives_the_same_as_the_whole(page):
    """Piece by piece, in which blocks change their kind."""
    text = "a\n\n- b\n- c\n\n```py\nx\n```\n\n1. d **e**\n\n# f\ng"
    grown = "for (let i = 0; i <= arguments[0].length; i++) renderMarkdown(element, arguments[0].slice(0, i));"
    whole = page.run(f"{RENDER} return element.innerHTML", text)
    assert page.run(f"{RENDER} {grown} return element.innerHTML", text) == whole


@pytest.mark.parametrize(
    "part",
    [
        *("**", "*a", "***a ", "*" * 9 + "\n", "`", "[", "[a](https://", "[a](https://a(", "_a ", "https://", "# "),
        *("```\n", "- ", "  ", "1. a\n", "("),
    ],
)
def test_markdown_that_repeats(page, part):
    """Quadratic matching would take longer here than a script may."""
    text = part * (200_000 // len(part))
    length = page.run(f"{RENDER} return element.textContent.length", text)
    assert 0 <= length <= len(text) + 10**6


def test_deep_lists(page):
    text = "\n".join(" " * 2 * i + "- a" for i in range(500))
    assert page.run(f"{RENDER} return element.querySelectorAll('li').length", text) == 500
    assert page.run(f"{RENDER} return element.querySelectorAll({'ul ' * 9!r}).length", text) == 0
