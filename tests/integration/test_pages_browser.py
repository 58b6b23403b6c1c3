"""The pages in Chromium: asking, judging and reading by mouse, by keys alone, in the dark, on a small screen."""

import os
import shutil
import threading

import pytest

from everalign.serving.store.database import FeedbackStore
from runs_for_tests import write_run
from upstream_for_tests import Fake, IdleReloader, Script, UpstreamServer, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

KEY = "sk-client-one"
ACCURACIES = {
    "harmless": [0.52, [0.81, 0.795, 0.78, 0.79]],
    "helpful": [0.55, [0.56, 0.84, 0.825, 0.83]],
    "truthful-about-medicine": [0.48, [0.47, 0.5, 0.77, 0.76]],
    "brief": [0.33, [0.4, 0.41, 0.5, 0.95]],
}


@pytest.fixture(scope="module")
def chromium():
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return FeedbackStore.open(f"sqlite:///{tmp_path_factory.mktemp('store')}/feedback.db")


@pytest.fixture(scope="module")
def gateway(store, tmp_path_factory):
    run = IdleReloader(write_run(tmp_path_factory.mktemp("runs") / "assistant", ACCURACIES))
    corrector = Fake(lambda answer: answer.replace("Boil", "With pleasure! Boil"))
    with (
        UpstreamServer(lambda _: Script("Boil the eggs for <b>seven</b> minutes.")) as upstream,
        serving(upstream, corrector=corrector, store=store, keys=(KEY,), reloader=run) as running,
    ):
        yield running


@pytest.fixture
def open_page(chromium, gateway):
    """A function that opens a signed-in page; whatever the browser complains of fails the test."""
    contexts, complaints = [], []

    def opened(**more):
        contexts.append(chromium.new_context(base_url=gateway.url[:-3], **more))
        page = contexts[-1].new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto("/")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("heading", name="Playground").wait_for()
        page.wait_for_load_state()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def given(store):
    """All feedback so far."""
    return [said for _, said in store.feedback()]


@pytest.mark.parametrize("script", [True, False])
def test_ask_edit_and_keep(script, open_page, store):
    before = len(given(store))
    page = open_page(java_script_enabled=script)
    page.get_by_label("Question").fill("How do I boil eggs?")
    page.get_by_role("button", name="Ask").click()
    assert page.get_by_role("group", name="Upstream").inner_text() == "Boil the eggs for <b>seven</b> minutes."
    assert page.get_by_role("group", name="Corrected").locator("ins").inner_text().strip() == "With pleasure!"
    page.get_by_label("bad").check()
    page.get_by_label("the corrected one").check()
    page.get_by_label("The answer as it should be").fill("With pleasure! Boil the eggs for eight minutes.")
    page.get_by_text("Tags and a comment").click()
    page.get_by_label("Tags").fill("eggs, time")
    page.get_by_role("button", name="Send feedback").click()
    status = page.get_by_role("status")
    assert "your feedback is kept" in status.inner_text()
    assert status.locator("ins").inner_text() == "eight"
    said = given(store)[-1]
    assert len(given(store)) == before + 1
    assert (said.rating, said.preferred, said.tags) == (-1, "corrected", ("eggs", "time"))
    assert said.edited_text == "With pleasure! Boil the eggs for eight minutes."


def test_a_conversation_goes_on_and_begins_anew(open_page):
    page = open_page()
    for question in ("How do I boil eggs?", "And then?"):
        page.get_by_label("question").fill(question)
        page.get_by_role("button", name="Ask").click()
        page.get_by_role("listitem").filter(has_text=question).wait_for()
    assert page.locator(".turns li").count() == 4
    assert page.get_by_label("Next question").input_value() == ""
    page.get_by_role("link", name="New conversation").click()
    page.get_by_label("Question").wait_for()
    assert page.locator(".turns").count() == 0


def test_an_answer_is_shown_while_it_is_written(chromium):
    script = Script("Boil the eggs for seven minutes.", piece=5, held=threading.Event())
    with UpstreamServer(lambda _: script) as upstream, serving(upstream) as running:
        page = chromium.new_context(base_url=running.url[:-3]).new_page()
        page.goto("/")
        page.get_by_label("Question").fill("How?")
        page.get_by_role("button", name="Ask").click()
        live = page.locator("#live")
        live.get_by_text("Writing …").wait_for()
        assert page.get_by_role("button", name="Asking …").is_visible()
        begun = live.locator("[data-text]").inner_text()
        assert begun.startswith("Boil")
        assert begun != script.text
        script.held.set()
        page.wait_for_selector("#answer")
        assert not live.is_visible()
        assert page.locator("#answer .text").inner_text() == script.text


def test_without_keys_a_page_s_own_forms_are_taken(chromium):
    """The browser has to name the page's site, or the gateway cannot tell it from others."""
    with UpstreamServer(lambda _: Script("Boil them.")) as upstream, serving(upstream) as running:
        page = chromium.new_context(base_url=running.url[:-3], java_script_enabled=False).new_page()
        page.goto("/")
        page.get_by_label("Question").fill("How?")
        page.get_by_role("button", name="Ask").click()
        assert page.locator("#answer .text").inner_text() == "Boil them."


def test_an_answer_that_fails_is_said_and_the_question_stays(chromium):
    with UpstreamServer(lambda _: Script(status=400)) as upstream, serving(upstream) as running:
        page = chromium.new_context(base_url=running.url[:-3]).new_page()
        page.goto("/")
        page.get_by_label("Question").fill("How?")
        page.get_by_role("button", name="Ask").click()
        page.get_by_role("alert").wait_for()
        assert page.get_by_label("Question").input_value() == "How?"
        assert page.get_by_role("button", name="Ask").is_visible()


def test_the_dashboard_keeps_fresh(open_page, gateway):
    page = open_page()
    page.clock.install()
    page.goto("/dashboard")
    page.get_by_text("It is read again every 10 seconds.").wait_for()
    before = int(page.locator("dt:text-is('skipped') + dd").inner_text())
    timeline = gateway.gateway.metrics
    timeline.requests.labels("off", "skipped", "off").inc()
    page.clock.fast_forward(11_000)
    page.locator(f"dt:text-is('skipped') + dd:text-is('{before + 1}')").wait_for()


def test_what_is_not_edited_is_no_edit(open_page, store):
    page = open_page()
    page.get_by_label("Question").fill("How?")
    page.get_by_role("button", name="Ask").click()
    page.get_by_label("good").check()
    page.get_by_role("button", name="Send feedback").click()
    assert "rated good." in page.get_by_role("status").inner_text()
    assert (given(store)[-1].rating, given(store)[-1].edited_text) == (1, None)


def test_the_dashboard_is_drawn(open_page):
    page = open_page()
    page.get_by_role("link", name="Dashboard").click()
    page.wait_for_url("**/dashboard")
    cells = page.locator(".heat td")
    assert cells.count() == 20
    low, high = (page.locator(f".heat td:text-is('{score}')").first for score in ("33.0", "95.0"))
    shade = "element => getComputedStyle(element).backgroundColor"
    assert low.evaluate(shade) == "rgb(242, 247, 253)"
    assert high.evaluate(shade) == "rgb(11, 57, 108)"
    assert page.get_by_role("row", name="004-4").get_by_text("promoted").is_visible()
    fell = [page.get_by_role("cell", name=change, exact=True) for change in ("−2.0", "−1.0")]
    assert [cells.count() for cells in fell] == [1, 2]
    assert page.locator(".lost").count() == 0, "what may be chance has no colour"


def test_by_keys_alone(open_page, store):
    before = len(given(store))
    page = open_page()

    def focused():
        return page.evaluate("document.activeElement.id || document.activeElement.innerText.trim()")

    def tab_to(name):
        for _ in range(20):
            page.keyboard.press("Tab")
            if focused() == name:
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", name
                return
        raise AssertionError(f"{name} is not reached: {focused()}")

    page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    assert page.get_by_text("Skip to the content").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    tab_to("question")
    page.keyboard.type("By keys?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer")
    tab_to("edited_text")
    page.keyboard.press("Control+End")
    page.keyboard.type(" Enjoy!")
    tab_to("Send feedback")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=status]")
    assert len(given(store)) == before + 1
    assert given(store)[-1].edited_text.endswith("minutes. Enjoy!")
    assert page.url.endswith("#feedback")


def test_in_the_dark(open_page):
    page = open_page(color_scheme="dark")
    colours = "element => [getComputedStyle(element).backgroundColor, getComputedStyle(element).color]"
    assert page.locator("body").evaluate(colours) == ["rgb(18, 22, 28)", "rgb(232, 236, 241)"]
    page.goto("/dashboard")
    assert page.locator(".heat td:text-is('95.0')").evaluate(colours) == ["rgb(187, 219, 248)", "rgb(13, 21, 32)"]


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_on_a_small_screen_nothing_sticks_out(path, open_page):
    page = open_page(viewport={"width": 360, "height": 740})
    page.goto(path)
    if path == "/":
        page.get_by_label("Question").fill("w" * 300)
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("#answer")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_signing_out_shows_nothing_more(open_page):
    page = open_page()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/login")
    page.goto("/dashboard")
    assert page.url.endswith("/login")
