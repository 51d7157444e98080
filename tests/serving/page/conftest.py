"""Chromium, and the server of the page with a random model."""

import pytest

from tests.serving.page.actions import visit
from tests.serving.page.browser import Browser
from tests.serving.page.page_server import PageServer


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
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
