"""Runs are read faithfully, shown with their own numbers, and damaged ones are refused by name."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from rich.console import Console

from everalign.cli.console import run_summary, version_table
from everalign.errors import InputError
from everalign.learning.scores import Scores
from everalign.reporting import comparison_table, load_run, score_table, write_report
from everalign.reporting.answers import AnswerPair
from everalign.reporting.formats import (
    CORRECTION_ACCURACY,
    METRICS,
    elided,
    error_matrix,
    percent,
    seconds,
    signed,
    significant,
    standard_error,
)
from everalign.reporting.headline import cautions, headline
from everalign.reporting.plots import (
    SERIES,
    Tip,
    change_bar,
    change_lines,
    figure,
    fitted_names,
    inline_svg,
    progress_lines,
)
from everalign.reporting.report import _CONSOLIDATION, _consolidation_cells, forgetting_view, matrix_view
from everalign.serving.pages.dashboard import forgetting_views
from runs_for_tests import LIFEALIGN, SEQUENTIAL, module, score, write_run, write_version

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert('x')</script> & \"$\\frac{1}{2}$\" --> ]]>"


class Page(HTMLParser):
    """Collects tags, visible text, table cells and nesting errors of a page."""

    VOID = ("meta", "link", "br", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.rows, self.ids = [], [], [], [], []
        self.cell = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join(self.cell))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None and data.strip():
            self.cell.append(data.strip())
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def report(tmp_path, *runs):
    return Page(write_report(list(runs), tmp_path / "report.html").read_text(encoding="utf-8"))


def printed(table, colour=False):
    console = Console(width=140, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(table)
    return console.export_text(styles=colour)


# ---- reading ----


def test_load_run_reads_scores_versions_and_facts(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    assert run.tasks == ["harmless", "helpful", "truthful"]
    scores = run.scores()
    assert scores.zero_shot == [0.52, 0.55, 0.48]
    assert scores.matrix == [[0.81, 0.56, 0.47], [0.795, 0.84, 0.5], [0.78, 0.825, 0.77]]
    assert run.scores("margin").matrix[2] == [0.28, 0.325, 0.27]
    assert run.current == "003-3"
    assert [len(version.consolidation) for version in run.versions] == [4, 4, 4]
    assert run.versions[0].before["harmless"].accuracy == 0.79
    assert run.versions[1].training[-1].margin == pytest.approx(1.2)
    assert run.facts.settings["learning_rate"]["sft"] == 1e-4


def test_a_run_without_versions_or_consolidation_loads(tmp_path):
    run = load_run(write_run(tmp_path / "run", {}))
    assert run.versions == []
    assert run.scores().last is None
    assert load_run(write_run(tmp_path / "plain", method="er")).versions[0].consolidation is None


def test_versions_follow_the_parents_of_the_newest(tmp_path):
    path = write_run(tmp_path / "run", parents=["000", "001-1", "001-1"])
    run = load_run(path)
    assert run.tasks == ["harmless", "truthful", "helpful"]
    assert [one.id for one in run.off_lineage] == ["002-2"]
    assert run.scores().learned == ["harmless", "truthful"]
    assert "002-2" in report(tmp_path, path).text


def test_a_folder_still_being_written_is_no_version(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "versions" / "004-next.partial").mkdir()
    assert len(load_run(path).versions) == 3


def test_joint_and_separate_regimes(tmp_path):
    path = write_run(tmp_path / "mtl", {}, method="mtl")
    zero = {"a": score(0.5), "b": score(0.4)}
    (path / "zero_shot.json").write_text(json.dumps({"scores": zero}))
    write_version(path, 1, "001-all-tasks", "all-tasks", "000", {"a": score(0.7), "b": score(0.9)})
    (path / "current").write_text("001-all-tasks")
    joint = load_run(path).scores()
    assert joint.regime == "joint"
    assert joint.tasks == ["a", "b"]
    assert joint.last == pytest.approx(0.8)
    assert joint.backward_transfer is None
    in_turn = load_run(write_run(tmp_path / "in_turn", method="mtl")).scores()
    assert in_turn.last == pytest.approx((0.78 + 0.825 + 0.77) / 3)
    separate = load_run(write_run(tmp_path / "stl", method="stl", parents=["000"] * 3)).scores()
    assert separate.matrix[1] == [None, 0.84, None]
    assert separate.last == pytest.approx((0.81 + 0.84 + 0.77) / 3)


DAMAGE = [
    ("run.json", None, "no run.json"),
    ("run.json", "{", "damaged JSON"),
    ("run.json", '{"format": 2}', "field format"),
    ("zero_shot.json", None, "no such file"),
    ("zero_shot.json", '{"scores": {"harmless": {"accuracy": "high"}}}', "field scores.harmless.accuracy"),
    ("zero_shot.json", '{"scores": {"harmless": {"accuracy": 1.5}}}', "less than or equal to 1"),
    ("current", "009-other", "'009-other' is not a version"),
    ("versions/002-2/manifest.json", None, "no such file"),
    ("versions/002-2/manifest.json", "[]", "field the whole file"),
    ("versions/002-2/scores.json", None, "is missing or has changed"),
    ("versions/002-2/scores.json", "{}", "is missing or has changed"),
    ("versions/002-2/training.jsonl", "", "is missing or has changed"),
    ("versions/002-2/consolidation.json", "[]", "is missing or has changed"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE)
def test_a_damaged_or_missing_file_is_named(tmp_path, name, content, message):
    path = write_run(tmp_path / "run")
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content)
    expected = str(path) if message == "no run.json" else str(path / name)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_run(path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.json", '{"scores": {}, "before_consolidation": 3}', "field before_consolidation"),
        ("scores.json", "\udcff", "damaged JSON"),
        ("training.jsonl", '{"stage": "sft", "step": 1}\n{"stage": ', "line 2: damaged JSON"),
        ("training.jsonl", '{"stage": "sft"}', "line 1: field step"),
        ("training.jsonl", "\udcff", "not UTF-8"),
        ("consolidation.json", json.dumps([module(0) | {"rank": -1}]), "field 0.rank"),
    ],
)
def test_damage_behind_an_unlisted_hash_is_named_too(tmp_path, name, content, message):
    path = write_run(tmp_path / "run")
    folder = path / "versions" / "002-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        load_run(path)
    assert str(folder / name) in str(caught.value)


def test_an_unknown_parent_and_a_hole_in_the_scores_are_refused(tmp_path):
    with pytest.raises(InputError, match="'007-x' is not an earlier version"):
        load_run(write_run(tmp_path / "orphan", parents=["000", "007-x", "002-2"]))
    hole = {"a": [0.5, [0.7]], "b": [0.5, [0.5, 0.8]]}
    with pytest.raises(InputError, match="'a' after learning 'b' is missing"):
        load_run(write_run(tmp_path / "hole", hole))


# ---- tables ----


def test_score_table_marks_the_diagonal_and_the_changes():
    scores = Scores(["a", "[red]b"], [0.5, None], [[0.8, 0.4], [0.725, 0.9]])
    lines = printed(score_table(scores, title="run")).splitlines()
    after = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in after]
    assert cells == [["nothing", "50.0", "–"], ["a", "[80.0]", "40.0"], ["[red]b", "72.5 −7.5", "[90.0]"]]
    assert any(line.startswith("Last 81.2   BWT −7.5   AP 80.6") for line in lines)
    assert "\x1b[31m−7.5" in printed(score_table(scores), colour=True)


def test_score_table_of_joint_and_empty_runs():
    joint = printed(score_table(Scores.joint(["a", "b"], [0.5, 0.5], [0.7, 0.8])))
    assert "all tasks" in joint
    assert "[" not in joint
    empty = printed(score_table(Scores(["a"], [None], [[None]])))
    assert "no held-out pairs were scored" in " ".join(empty.split())


def test_the_summary_of_a_narrow_table_is_one_line():
    lines = printed(score_table(Scores(["a", "b"], [0.5, 0.5], [[0.8, 0.5], [0.7, 0.9]]))).splitlines()
    assert "Last 80.0   BWT −10.0   AP 80.0   FWT 0.0" in [line.strip() for line in lines]


def test_accuracy_of_correctors_is_explained(tmp_path):
    path = write_run(tmp_path / "run", method="er")
    facts = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(facts | {"objective": "correction"}))
    assert CORRECTION_ACCURACY in report(tmp_path, path).text
    assert any(CORRECTION_ACCURACY in str(part) for part in run_summary([load_run(path)]))
    assert "prefers the correction to the answer in" in headline([load_run(path)], ["er"])


def test_comparison_table_prints_every_run_and_marks_the_best():
    runs = {
        "one": Scores(["a", "b"], [0.5, 0.5], [[0.8, 0.5], [0.7, 0.9]]),
        "two": Scores(["a", "b"], [0.5, 0.5], [[0.8, 0.5], [0.8, 0.9]]),
        "mtl": Scores.joint(["a", "b"], [0.5, 0.5], [0.8, 0.95]),
    }
    lines = [line for line in printed(comparison_table(runs)).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert cells == [
        ["one", "80.0", "−10.0", "80.0", "0.0"],
        ["two", "85.0", "0.0", "82.5", "0.0"],
        ["mtl", "87.5", "–", "–", "–"],
    ]
    coloured = printed(comparison_table(runs), colour=True)
    assert "\x1b[1m87.5" in coloured
    assert "\x1b[1m85.0" not in coloured


# ---- numbers ----


def test_number_formats():
    accuracy, margin = METRICS["accuracy"], METRICS["margin"]
    assert accuracy.full(0.8125) == "81.2%"
    assert accuracy.change(-0.0001) == "0.0"
    assert accuracy.change(0.05) == "+5.0"
    assert accuracy.direction(-0.02) == "lost"
    assert accuracy.direction(0.0004) == ""
    assert accuracy.direction(None) == ""
    assert margin.full(-0.5) == "−0.500 nats per token"
    assert signed(-1.25, 2) == "−1.25"
    assert percent(0.915) == "91.5%"
    assert percent(None) == "–"
    assert significant(6.0) == "6.00"
    assert significant(1234.0) == "1.23e+03"
    assert [seconds(59.96), seconds(61), seconds(3700)] == ["60.0 s", "1 min 1 s", "1 h 1 min"]
    assert elided("a long name 17", 9) == "a lo…e 17"


# ---- headline ----


def test_headline_names_the_run_that_kept_more(tmp_path):
    runs = [
        load_run(write_run(tmp_path / "plain", SEQUENTIAL, method="seqft")),
        load_run(write_run(tmp_path / "ours")),
    ]
    text = headline(runs, ["seqft", "lifealign"])
    assert text.startswith("lifealign kept more of what it had learned: its earlier tasks lost 2.3 points")
    assert "while seqft's lost 17.2 points" in text
    assert "79.2% for lifealign and 71.2% for seqft" in text
    assert cautions(runs, ["seqft", "lifealign"]) == ["Each run is one seed; a claim about methods needs several."]
    swapped = headline(runs[::-1], ["lifealign", "seqft"])
    assert swapped == text


def test_headline_of_one_run_and_of_a_draw(tmp_path):
    one = load_run(write_run(tmp_path / "a"))
    assert headline([one], ["lifealign"]) == (
        "After 3 tasks, lifealign prefers the chosen response in 79.2% of held-out pairs (± 3.2 points); whether its "
        "earlier tasks gained or lost since they were learned cannot be told from chance with 600 pairs "
        "(−2.3 ± 5.4 points on average)."
    )
    lost = load_run(write_run(tmp_path / "lost", SEQUENTIAL))
    assert "; its earlier tasks lost 17.2 points (± 5.8 points) on average since they were learned" in headline(
        [lost], ["seqft"]
    )
    assert "(most on harmless: 22.5 points below its best)" in headline([lost], ["seqft"])
    two = load_run(write_run(tmp_path / "b"))
    assert headline([one, two], ["x", "y"]).startswith("All runs kept equally much: their earlier tasks lost 2.3")


def test_no_headline_stands_on_one_pair_of_sixty(tmp_path):
    one_pair = {"a": [0.5, [1.0, 59 / 60]], "b": [0.5, [0.5, 1.0]]}
    run = load_run(write_run(tmp_path / "run", one_pair, pairs=60))
    assert "cannot be told from chance with 120 pairs (−1.7 ± " in headline([run], ["x"])
    none_lost = {"a": [0.5, [1.0, 1.0]], "b": [0.5, [0.5, 1.0]]}
    other = load_run(write_run(tmp_path / "other", none_lost, pairs=60))
    assert headline([run, other], ["x", "y"]).startswith("Which run kept more cannot be told from chance:")


def test_a_change_that_may_be_chance_has_no_colour(tmp_path):
    few, many = (load_run(write_run(tmp_path / str(pairs), SEQUENTIAL, pairs=pairs)) for pairs in (8, 2000))
    for run, directions in ((few, {""}), (many, {"lost"})):
        errors = error_matrix(run)
        cells = forgetting_view(run.scores(), METRICS["accuracy"], errors)[0].cells
        assert {cell.direction for cell in cells[3:]} == directions
        assert matrix_view(run.scores(), METRICS["accuracy"], errors)[-1].cells[0].direction == "".join(directions)
        assert forgetting_views(run.scores(), errors)[0].direction == "".join(directions)
        assert ("\x1b[31m" in printed(score_table(run.scores(), errors=errors), colour=True)) == (run is many)


def test_every_curve_of_held_out_scores_has_error_bars(tmp_path):
    run = load_run(write_run(tmp_path / "run", pairs=50))
    errors = error_matrix(run)
    share = (0.78 * 50 + 2) / 54
    assert errors[2][0] == pytest.approx(math.sqrt(share * (1 - share) / 54))
    assert standard_error(run.versions[0].scores["harmless"], "margin") is None
    assert change_bar(errors, 3, 0) == pytest.approx(1.96 * math.hypot(errors[2][0], errors[0][0]))
    scores, none = run.scores(), [[0.0] * 3] * 3

    def heights(drawn):
        """Of the vertical strokes in a figure, as they are written: M x y1 L x y2."""
        wide = drawn.partition('<div class="narrow">')[0]
        strokes = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"', wide)
        return sorted(abs(float(b) - float(d)) for a, b, c, d in strokes if a == c and b != d)

    limits = (-0.5, 0.5)
    for drawn, bare, bars in (
        (
            change_lines(scores, errors, METRICS["accuracy"], limits, "n", "x"),
            change_lines(scores, none, METRICS["accuracy"], limits, "n", "x"),
            3,
        ),
        (
            progress_lines({"x": scores}, {"x": errors}, METRICS["accuracy"], "n"),
            progress_lines({"x": scores}, {"x": none}, METRICS["accuracy"], "n"),
            3,
        ),
    ):
        assert len(heights(drawn)) == len(heights(bare)) + bars


def test_small_differences_and_unlike_runs_are_pointed_out(tmp_path):
    near = {task: [zero, [value - 0.01 for value in row]] for task, (zero, row) in LIFEALIGN.items()}
    a = load_run(write_run(tmp_path / "a"))
    b = load_run(write_run(tmp_path / "b", near, model_fingerprint="other"))
    found = " ".join(cautions([a, b], ["a", "b"]))
    assert "different base models" in found
    # Standard errors of Last: sqrt(sum of p(1-p)/200)/3 = 1.66 and 1.68 points, 2.36 together.
    assert "The final score differs between a and b by 1.0 points" in found
    assert "(2.4 points with 600 held-out pairs)" in found
    other = load_run(write_run(tmp_path / "c", dict(reversed(LIFEALIGN.items()))))
    assert "different tasks, or another order" in " ".join(cautions([a, other], ["a", "c"]))
    assert "tested on different held-out pairs" in " ".join(cautions([a, other], ["a", "c"]))


# ---- the page ----


def test_report_shows_the_numbers_of_the_run(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run"))
    assert ["lifealign", "79.2 ± 3.2", "−2.3 ± 5.4", "80.6", "+1.5"] in page.rows
    assert ["after truthful", "78.0 −3.0", "82.5 −1.5", "77.0"] in page.rows
    assert ["zero-shot", "52.0", "55.0", "48.0"] in page.rows
    assert ["after harmless", "0.310", "0.060", "−0.030"] in page.rows
    assert ["harmless", "81.0", "81.0", "78.0", "−3.0", "+3.0"] in page.rows
    assert ["helpful", "3.5", "92.5%", "10.00%", "6.00", "4.00", "8.0", "0.15%", "0.00%"] in page.rows
    assert [
        "model.layers.1.self_attn.v_proj",
        "5",
        "94.0%",
        "20.00%",
        "3.00",
        "2.00",
        "12",
        "0.30%",
        "0.00%",
    ] in page.rows
    assert ["truthful", "harmless", "76.0", "78.0", "+2.0"] in page.rows
    assert [
        "helpful",
        "fpo",
        "stage_start",
        "0.0417",
        "3\u202f000",
        "600",
        "60",
        "3",
        "1 min 35 s",
    ] in page.rows
    assert ["helpful", "test", "data/2.jsonl", "200", f"{102:064x}"] in page.rows
    assert ["after helpful", "0.0123", "0.0123", "0.0123"] in page.rows
    for fact in (
        ["model fingerprint", "5f2d9c0a77e1b3c4"],
        ["method: name", "lifealign"],
        ["setting: learning_rate.fpo", "5e-06"],
        ["seed", "7"],
        ["version: torch", "2.13.0"],
        ["machine: cpu", "AMD EPYC"],
        ["promoted version", "003-3"],
    ):
        assert fact in page.rows


def test_report_sets_runs_side_by_side(tmp_path):
    plain = write_run(tmp_path / "plain", SEQUENTIAL, method="seqft", seed=8)
    page = report(tmp_path, plain, write_run(tmp_path / "ours"))
    summary = [[cell.partition(" ±")[0] for cell in row] for row in page.rows]
    assert ["seqft", "71.2", "−17.2", "77.6", "+1.5"] in summary
    assert ["lifealign", "79.2", "−2.3", "80.6", "+1.5"] in summary
    errors = error_matrix(load_run(tmp_path / "ours"))
    last = 196 * math.sqrt(sum(error**2 for error in errors[-1])) / 3
    assert any(row[:2] == ["lifealign", f"79.2 ± {last:.1f}"] for row in page.rows)
    assert "All runs: loss, margin" in page.text
    assert ["seed", "8", "7"] in page.rows
    assert "This run does not consolidate." in page.text
    best = [attrs for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "best"]
    assert len(best) == 3 * 3  # Last, BWT and AP differ in each of three metrics; FWT is a draw


def test_report_is_one_self_contained_accessible_file(tmp_path):
    ours, plain = write_run(tmp_path / "ours"), write_run(tmp_path / "plain", method="er")
    path = write_report([ours, plain], tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert re.findall(r"https?://[^\"' ]*", text) == []
    assert not {"link", "img", "iframe", "image"} & {tag for tag, _ in page.tags}
    # Of scripts its policy allows this one alone.
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text.replace("&#39;", "'")
    assert all(value.startswith("#") for _, attrs in page.tags if (value := attrs.get("href")))
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert len(page.ids) == len(set(page.ids))
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(plots) == 2 * (2 + 2 * 2)  # each for a wide page and for a narrow one
    for attrs in plots:
        assert attrs["role"] == "img"
        assert all(name in page.ids for name in attrs["aria-labelledby"].split())
    assert "#0a0b" not in text
    assert list(path.parent.iterdir()) == [path]


def test_hostile_names_are_escaped_everywhere(tmp_path):
    accuracies = {HOSTILE: [0.5, [0.8, 0.7]], "b<i>": [0.5, [0.5, 0.9]]}
    path = write_run(tmp_path / "run", accuracies, model="<b>bold</b>")
    text = write_report([path], tmp_path / "report.html").read_text()
    page = Page(text)
    assert text.count("<script") == 1
    assert "<b>" not in text
    assert "<i>" not in text
    assert [HOSTILE, "80.0", "80.0", "70.0", "−10.0", "+10.0"] in page.rows
    assert ["model", "<b>bold</b>"] in page.rows


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"accuracies": {}}, "No training steps were logged."),
        ({"accuracies": {"only": [0.5, [0.8]]}}, "there is no forgetting to show"),
        ({"untested": tuple(LIFEALIGN)}, "No held-out pairs were scored."),
        ({"untested": tuple(LIFEALIGN)}, "no held-out pairs were scored, so nothing can be said"),
        ({"untested": ("helpful",)}, "After 3 tasks, lifealign prefers the chosen response in 77.5%"),
        ({"method": "mtl"}, "All tasks were learned at once"),
        ({"method": "stl", "parents": ["000"] * 3}, "Each task was learned by a model of its own"),
    ],
)
def test_unusual_runs_have_a_report(tmp_path, arguments, expected):
    assert expected in report(tmp_path, write_run(tmp_path / "run", **arguments)).text


def test_names_on_an_axis_are_in_lines_where_they_fit_and_turned_where_not():
    assert fitted_names(["courteous-kitchen", "plain"], 560) == (["courteous-kitchen", "plain"], False)
    assert fitted_names(["courteous-kitchen", "b", "c", "d"], 560)[0][0] == "courteous-\nkitchen"
    assert fitted_names(["courteous-kitchen", "b", "c", "d"], 320) == (["courteous-kitchen", "b", "c", "d"], True)
    assert fitted_names(["unbreakablename"] * 6, 560)[1]


def test_points_of_a_plot_tell_their_values_where_they_are_drawn(tmp_path):
    text = write_report([write_run(tmp_path / "run")], tmp_path / "report.html").read_text()
    tips = re.findall(
        r'<circle class="tip" cx="([\d.]+)" cy="([\d.]+)" r="9" fill="transparent"><title>(.*?)</title>', text
    )
    words = [words for _, _, words in tips]
    assert any(re.fullmatch(r"harmless, after truthful: −3.0 ± [\d.]+ points", one) for one in words)
    assert any(one.startswith("lifealign, harmless, fpo, step") for one in words)
    with figure(400, 300) as drawn:
        axes = drawn.subplots()
        axes.plot([1, 2], [3, 4], marker="o", linestyle="none", color=SERIES[0])
        drawn_svg = inline_svg(drawn, "x", "x", "x", [Tip(axes, 1, 3, "<first>"), Tip(axes, 2, 4, "second")])
    markers = re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--series-0', drawn_svg)
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn_svg)
    for mark, circle in zip(markers, circles, strict=True):
        assert [float(x) for x in circle] == pytest.approx([float(x) for x in mark], abs=0.1)
    assert "<title>&lt;first&gt;</title>" in drawn_svg


def test_a_run_whose_only_task_was_refused_says_so(tmp_path):
    path = write_run(tmp_path / "run", {"a": [0.5, [0.4]]})
    folder = path / "versions" / "001-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    gate = {"tolerance": 0.02, "promoted": False, "fell": {"a": [0.5, 0.4]}, "outcome": "refused"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"gate": gate}))
    (path / "current").write_text("000\n")
    run = load_run(path)
    assert "no version was promoted" in printed(score_table(run.scores()))
    assert headline([run], ["er"]).startswith(
        "er: no version is promoted, so nothing has changed. Tried: 001-1 (refused"
    )
    page = report(tmp_path, path)
    assert "No version was promoted: the scores are the base model's." in page.text
    table = printed(version_table(run))
    assert "+10.0" not in table


def test_answers_are_compared_from_task_to_task():
    pair = AnswerPair("q?", None, "Boil it now.", "Boil it well today.", True, True, (("a", "Boil it well."),), "b")
    assert [name for name, _ in pair.steps] == ["base model", "a", "b"]
    assert [str(html) for _, html in pair.steps] == [
        "Boil it now.",
        "Boil it <del>now</del><ins>well</ins>.",
        "Boil it well<ins> today</ins>.",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_sorts_tables_and_tells_values_on_a_phone(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    runs = [write_run(tmp_path / "ours"), write_run(tmp_path / "plain", SEQUENTIAL, method="seqft")]
    path = write_report(runs, tmp_path / "report.html")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, complaints = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        table = page.locator("table.summary").first
        names = table.locator("tbody th")
        assert names.all_inner_texts() == ["lifealign", "seqft"]
        table.get_by_role("button", name="BWT").click()
        assert names.all_inner_texts() == ["seqft", "lifealign"]  # −17.2 before −2.3
        assert table.get_by_role("columnheader", name="BWT").get_attribute("aria-sort") == "ascending"
        table.get_by_role("button", name="BWT").click()
        assert names.all_inner_texts() == ["lifealign", "seqft"]
        page.locator(".wide .tip").first.hover()
        assert "learned: " in page.locator(".floating").inner_text()
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator(".wide").first.is_hidden()
        for plot in page.locator(".narrow svg").all():
            if plot.is_visible():
                assert plot.bounding_box()["width"] <= 330
                sizes = plot.evaluate("e => [...e.querySelectorAll('text')].map(t => t.getBoundingClientRect().right)")
                assert max(sizes) <= 360
        browser.close()
    assert complaints == []


def test_consolidation_is_shown_where_a_run_consolidates(tmp_path):
    plain, consolidating = write_run(tmp_path / "plain", method="er"), write_run(tmp_path / "consolidating")
    for runs, shown in (([plain], False), ([plain, consolidating], True)):
        text = write_report(runs, tmp_path / "report.html").read_text()
        assert (text.count("#consolidation"), 'id="consolidation"' in text) == (shown, shown)


def test_long_and_many_task_names_stay_whole(tmp_path):
    many = {f"a rather long name {i}": [0.5, [0.5] * i + [0.9] * (9 - i)] for i in range(9)}
    page = report(tmp_path, write_run(tmp_path / "run", many))
    assert "after a rather long name 8" in page.text
    assert "…" not in page.text
    assert ["a rather long name 7", "90.0", "90.0", "90.0", "0.0", "0.0"] in page.rows


def test_a_diverged_run_is_drawn_without_its_nan(tmp_path):
    path = write_run(tmp_path / "run")
    folder = path / "versions" / "003-3"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    (folder / "training.jsonl").write_text('{"stage": "fpo", "step": 5, "loss": NaN, "margin": Infinity}\n')
    text = write_report([path], tmp_path / "report.html").read_text()
    assert not re.search(r'd="[^"]*(nan|inf)', text)


def test_reports_replace_each_other_and_keep_the_old_one_on_failure(tmp_path):
    path, output = write_run(tmp_path / "run"), tmp_path / "report.html"
    output.write_text("old")
    with pytest.raises(InputError, match="at least one run"):
        write_report([], output)
    with pytest.raises(InputError, match="not a run directory"):
        write_report([path, tmp_path], output)
    with pytest.raises(InputError, match="same run is given twice"):
        write_report([path, path], output)
    assert output.read_text() == "old"
    assert write_report([path], output) == output
    first = output.read_text()
    assert first.startswith("<!doctype html>")
    assert write_report([path], output).read_text() == first


def test_a_report_that_cannot_be_written_is_an_input_error(tmp_path):
    path = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/report\.html"):
        write_report([path], tmp_path / "file" / "report.html")


def test_tables_and_reading_need_no_plots_and_no_torch():
    code = (
        "import sys, everalign.reporting as r; r.load_run, r.score_table; "
        "sys.exit(len({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ranks_of_large_models_are_written_out():
    modules = [
        SimpleNamespace(**{field: rank if "rank" in field else 0.5 for field, _, _ in _CONSOLIDATION.values()})
        for rank in (1200, 1269)
    ]
    assert [_consolidation_cells(some)[0] for some in (modules, modules[:1])] == ["1234.5", "1200"]
