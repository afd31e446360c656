"""The page at / in a headless browser."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from conftest import KEY

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
ROUTES = {"embedder": "/embed", "ranker": "/rerank", "classifier": "/predict", "scorer": "/choices"}
ANYTHING = re.compile(".")
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """Return an empty page, whose scripts must run without an error and ask nobody but the server."""
    errors, asked = [], []
    page = browser.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert not errors
    assert asked
    assert all(url.startswith("http://127.0.0.1:") for url in asked)


@pytest.mark.parametrize("task", ROUTES)
def test_each_route_of_the_form_answers(page, task, request):
    page.goto(request.getfixturevalue(task).url)
    expect(page.locator("#served")).to_contain_text("ready")
    expect(page.locator("#route")).to_have_value(ROUTES[task])
    for option in page.locator("#route option").all_inner_texts():
        page.locator("#route").select_option(option)
        expect(page.locator("#body")).to_have_value(ANYTHING)
        with page.expect_response(re.compile(f"{option}$")) as answer:
            page.get_by_role("button", name="Send").click()
        expect(page.locator("#took")).to_have_text(re.compile(r"^200, \d+ ms, \d+ tokens in \d+ rows$"))
        expect(page.locator("#answer")).to_have_text(answer.value.text())
        assert json.loads(page.locator("#answer").inner_text())


def test_what_the_server_does_is_shown_as_it_happens(page, embedder):
    page.goto(embedder.url)
    cells = page.locator("#facts dd")
    expect(cells).to_have_count(9)
    answers = page.locator("#facts div", has_text="answers").locator("dd")
    before = int(answers.inner_text().replace(",", ""))
    page.get_by_role("button", name="Send").click()
    expect(answers).to_have_text(f"{before + 1:,}")
    expect(page.locator("#facts div", has_text="median").locator("dd")).to_have_text(re.compile(r"^[\d.]+ ms$"))
    for line in ("#rows", "#tokens"):
        expect(page.locator(line)).to_have_attribute("points", re.compile(r"^0,[\d.]+ 1,[\d.]+"))


def test_an_error_is_shown_as_text(page, embedder):
    page.goto(embedder.url)
    expect(page.locator("#body")).to_have_value(ANYTHING)
    page.locator("#body").fill('{"inputs": "w1", "prompt_name": "<img src=x onerror=alert(1)>"}')
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#took")).to_have_text(re.compile(r"^422, "))
    expect(page.locator("#answer")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#answer img")).to_have_count(0)


def test_a_key_is_asked_for(page, guarded):
    page.goto(guarded.url)
    expect(page.locator("#key")).to_be_visible()
    page.locator("#key").fill(KEY)
    expect(page.locator("#body")).to_have_value(ANYTHING)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#took")).to_have_text(re.compile(r"^200, "))
