"""The dashboard: versions, scores in colours that can be read, forgetting, feedback that waits, and what is missing."""

import re
from importlib.resources import files

import pytest

from everalign.learning.run_data import load_run
from everalign.learning.scores import Scores
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.pages.dashboard import SHADES, forgetting_views, heat_rows, hour_view, version_views
from everalign.serving.store.database import FeedbackStore
from everalign.serving.telemetry import Timeline
from pages_for_tests import Browser, form_action, hidden, read
from runs_for_tests import write_run
from upstream_for_tests import Fake, IdleReloader, Script, UpstreamServer, serving

ACCURACIES = {
    "harmless": [0.5, [0.8, 0.75, 0.6]],
    "helpful": [0.55, [0.56, 0.9, 0.9]],
    "<b>truth</b>": [0.48, [0.47, 0.5, 1.0]],
}


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer(lambda _: Script("Boil them.")) as server:
        yield server


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "assistant", ACCURACIES)


def page(upstream, **more):
    with serving(upstream, corrector=Fake(), **more) as gateway, Browser(gateway) as browser:
        browser.ask()
        return browser.get("/dashboard")


def test_a_run_is_drawn(upstream, run):
    text = read(found := page(upstream, reloader=IdleReloader(run)))
    assert "The corrector's run: assistant" in text
    assert "003-3 <b>truth</b>" in text
    assert "<b>truth" not in found.text
    rows = re.findall(
        r'<tr><th scope="row" class="name">([^<]*)</th>(<td class="(?:shade|empty).*?)</tr>', found.text, re.S
    )
    assert [name for name, _ in rows] == ["nothing", "harmless", "helpful", "&lt;b&gt;truth&lt;/b&gt;"]
    cells = [re.findall(r'<td class="([^"]*)">([^<]*)</td>', cells) for _, cells in rows]
    assert cells[3] == [("shade-2", "60.0"), ("shade-8", "90.0"), ("shade-9 own", "100.0")]
    assert "the stronger the colour, the higher, from 47.0 to 100.0" in text
    assert '<td data-label="change" class="lost">−20.0</td>' in found.text
    assert '<span class="status promoted">promoted, not in service yet</span>' in found.text


def test_what_became_of_versions(tmp_path, upstream):
    run = write_run(tmp_path / "run", ACCURACIES)
    (run / "current").write_text("002-2\n")
    assert [one.status for one in version_views(load_run(run))] == ["rolled back", "promoted", "in the line"]
    assert [(one.then, one.now) for one in version_views(load_run(run))] == [
        ("100.0", "50.0"), ("90.0", "90.0"), ("80.0", "75.0"),
    ]  # fmt: skip
    assert "rolled back" in read(page(upstream, reloader=IdleReloader(run)))


def test_a_version_is_said_to_be_in_service_where_it_is(tmp_path):
    run = write_run(tmp_path / "run", ACCURACIES)
    (run / "current").write_text("002-2\n")
    data = load_run(run)
    served = [one.status for one in version_views(data, "001-1")]
    assert served == ["rolled back", "promoted, not in service yet", "in the line, in service"]
    assert version_views(data, "002-2")[1].status == "promoted, in service"
    assert [one.status for one in version_views(data, "000")] == [
        "rolled back", "promoted, not in service yet", "in the line",
    ]  # fmt: skip


def test_a_dashboard_of_a_run_rolled_back_to_its_base_says_that_nothing_corrects(tmp_path, upstream):
    run = write_run(tmp_path / "run", ACCURACIES)
    (run / "current").write_text("000\n")
    corrections = CorrectionService(Fake(), "003-3")
    corrections.withdraw("000", "rolled_back")
    with serving(upstream, corrections=corrections, reloader=IdleReloader(run)) as gateway, Browser(gateway) as browser:
        text = read(browser.get("/dashboard"))
    assert "none (000, the base model, is current)" in text
    assert "in service" not in text.split("The corrector's run")[1]


def test_scores_that_were_not_measured_have_no_colour():
    scores = Scores.from_mappings(["a", "b"], {"a": 0.5}, [{"a": 0.7}, {"a": 0.7}])
    assert [[(cell.text, cell.shade) for cell in cells] for _, cells in heat_rows(scores)] == [
        [("50.0", 0), ("–", None)],
        [("70.0", 9), ("–", None)],
        [("70.0", 9), ("–", None)],
    ]
    assert [(one.task, one.change, one.direction) for one in forgetting_views(scores)] == [("a", "0.0", "")]
    assert all(cell.shade == SHADES - 1 for _, cells in heat_rows(Scores(["a"], [0.5], [[0.5]])) for cell in cells)


def test_what_is_missing_is_said(upstream):
    text = read(page(upstream))
    assert "The corrector in service is not from a run" in text
    assert "Feedback is off: the gateway has no store" in text
    with serving(upstream) as gateway, Browser(gateway) as browser:
        text = read(browser.get("/dashboard"))
    assert "corrector none" in text
    assert "Nobody has asked anything yet." in text


def test_a_run_that_is_damaged_costs_its_section_alone(upstream, run):
    (run / "versions" / "002-2" / "scores.json").write_text("{}")
    found = page(upstream, reloader=IdleReloader(run))
    assert found.status_code == 200
    assert "The run cannot be read:" in read(found)
    assert "scores.json" in read(found)


def test_a_run_without_scores(upstream, tmp_path):
    run = write_run(tmp_path / "run", {"a": [0.5, [0.6]]}, untested=("a",))
    text = read(page(upstream, reloader=IdleReloader(run)))
    assert "No task has held-out rows, so nothing was scored." in text
    assert "so there is nothing to show" in text


def test_feedback_requests_and_circuits(upstream, tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    with serving(upstream, corrector=Fake(), store=store) as gateway, Browser(gateway) as browser:
        asked = browser.ask()
        browser.submit(form_action(asked), digest=hidden(asked, "digest"), rating="bad", edited_text="Fry them.")
        text = read(browser.get("/dashboard"))
        assert "waiting to be learned 1 feedback in all 1 rated good 0 rated bad 1 edits 1 answers kept 1" in text
        assert "applied 1 unchanged 0 skipped 0 failed 0" in text
        assert "applied correct – 1" in text
        assert "Requests a minute" in text
        assert re.search(r"\d\d:\d\d: 1 request, 0 failed", text)
        assert "Is it salty?" in text.partition("Your newest feedback")[2]
        assert "bad; edited" in text
        assert "waiting" in text.partition("bad; edited")[2]
        assert "upstream default closed works corrector closed works" in text
        for _ in range(5):
            gateway.gateway.corrections.in_service.breaker.enter().failed()
        assert "corrector open failed repeatedly" in read(browser.get("/dashboard"))


def test_feedback_of_other_keys_is_not_listed(upstream, tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    with serving(upstream, store=store, keys=("sk-client-one", "sk-client-two")) as gateway:
        for key, seen in (("sk-client-one", True), ("sk-client-two", False)):
            with Browser(gateway) as browser:
                browser.sign_in(key)
                if seen:
                    asked = browser.ask("A secret?")
                    browser.submit(form_action(asked), digest=hidden(asked, "digest"), rating="good", comment="Mine.")
                text = browser.get("/dashboard").text
                assert ("A secret?" in text, "Mine." in text) == (seen, seen)


def test_the_last_hour_minute_by_minute():
    clock = [0.0]
    timeline = Timeline(lambda: clock[0])
    assert hour_view(timeline.minutes()) is None
    for second in range(0, 7200, 20):  # three a minute, for two hours
        clock[0] = second
        timeline.add("failed" if second % 60 == 0 else "applied", 3.0 if second % 60 == 40 else 1.0)
    minutes = timeline.minutes()
    assert [one.number for one in minutes] == list(range(60, 120))
    assert all(one.total == 3 and one.quantile(0.5) == 1.0 and one.quantile(0.95) == 3.0 for one in minutes)
    view = hour_view(minutes)
    assert (view.most, view.median, view.tail) == (3, "1.00 s", "3.00 s")
    assert view.requests[0].words == "01:00: 3 requests, 1 failed"
    assert (view.requests[0].high, view.requests[0].low) == (1.0, pytest.approx(1 / 3))
    clock[0] += 600.0
    assert [one.total for one in timeline.minutes()[-10:]] == [0] * 10
    for _ in range(5000):
        timeline.add("applied", 1.0)
    assert len(timeline.minutes()[-1].seconds) == 1000


def test_a_store_that_cannot_be_read_costs_its_section_alone(upstream, tmp_path, monkeypatch):
    def broken(self):
        raise OSError("postgresql://me:secret@host")

    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    monkeypatch.setattr(FeedbackStore, "stats", broken)
    found = page(upstream, store=store)
    assert found.status_code == 200
    assert "The store cannot be read (OSError)" in read(found)
    assert "secret" not in found.text


def colours(scheme):
    """The variables of the style sheet."""
    css = (files("everalign.serving.pages") / "assets" / "style.css").read_text()
    first, second = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", first))
    return light if scheme == "light" else light | dict(re.findall(r"--([\w-]+): (#\w{6})", second))


def luminance(colour):
    """As WCAG 2 defines it."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_its_colours(scheme):
    known = colours(scheme)
    pairs = [
        ("ink", "page"),
        ("ink", "card"),
        ("muted", "page"),
        ("muted", "card"),
        ("accent", "card"),
        ("accent", "page"),
    ]
    pairs += [("on-accent", "accent"), ("on-accent", "accent-strong"), ("good", "good-soft"), ("bad", "bad-soft")]
    pairs += [("good", "card"), ("bad", "card"), ("good", "page"), ("bad", "page"), ("ink", "good-soft")]
    pairs += [("ink", "bad-soft"), *(("on-low", f"shade-{i}") for i in range(6))]
    pairs += [("on-high", f"shade-{i}") for i in range(6, SHADES)]
    assert [pair for pair in pairs if contrast(*(known[name] for name in pair)) < 4.5] == []
    # What can be filled in is told from what is around it.
    assert contrast(known["field"], known["card"]) >= 3
    # One hue, lighter or darker step by step: told apart however one sees colours.
    steps = [luminance(known[f"shade-{i}"]) for i in range(SHADES)]
    assert steps == sorted(steps, reverse=scheme == "light")
