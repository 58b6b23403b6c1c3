"""The verb `correct evaluate`: what a corrector does to answers, and whether they are better for it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.correct_run import load_corrector, make_approver
from everalign.cli.display import Display
from everalign.cli.output import show, show_json
from everalign.cli.verbs import Json, TrustRemoteCode, option, phrases, report_unused, resumable
from everalign.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.correction.evaluation import CorrectionScores, EvaluationReport, Referee

EPILOG = (
    "Example: everalign correct evaluate --corrector runs/corrector --data edits.test.jsonl --scorer runs/reward; "
    "with a judge, whose key is read from OPENAI_API_KEY: --scorer http://127.0.0.1:8000/v1#qwen2.5"
)


def evaluate(
    corrector: Annotated[str, option("A corrector's folder, or one on a server as URL#MODEL.", "DIR|URL#MODEL")],
    data: Annotated[str, option("Rows with question, answer, and what is known: correction, good, kind.", "ROWS")],
    scorer: Annotated[str | None, option("Who says which answer is better.", "DIR|MODULE:FUNCTION|URL#MODEL")] = None,
    template: Annotated[str | None, option("What the corrector reads, if it does not say so itself.", "ID")] = None,
    objectives: Annotated[str | None, option("Those that one on a server was trained with.", "WORDS")] = None,
    gate: Annotated[
        float | None, option("Let answers pass from this mean log-likelihood on, in nats per token.", "NATS")
    ] = None,
    guards: Annotated[
        bool, typer.Option("--guards/--no-guards", help="Return the answer where a correction cannot be trusted.")
    ] = True,
    approve: Annotated[
        str | None, option("Who must find a correction better, as in correct run.", "DIR|MODULE:FUNCTION|URL#MODEL")
    ] = None,
    margin: Annotated[float | None, option("How much better, in units of its rewards.")] = None,
    strength: Annotated[float | None, option("Steer, as in correct run.", "ALPHA")] = None,
    max_new_tokens: Annotated[int | None, option("Longest correction; twice the answer and 256 more.")] = None,
    judge_instructions: Annotated[Path | None, option("What makes an answer good, for a judge.", "FILE")] = None,
    cache: Annotated[
        Path | None, option("Keep corrections and a judge's verdicts here, to make none twice.", "DIR")
    ] = None,
    concurrency: Annotated[int | None, option("Requests to a judge under way at once.")] = None,
    requests_per_minute: Annotated[float | None, option("Begin no more requests to a judge.")] = None,
    timeout: Annotated[float | None, option("Seconds a judge has for one reply.")] = None,
    precision: Annotated[str | None, option("fp32 or bf16.", "PRECISION")] = None,
    device: Annotated[str | None, option("Such as cuda:0; the GPU if there is one.")] = None,
    tokens_per_batch: Annotated[int | None, option("Tokens computed at once; fewer save memory.")] = None,
    seed: Annotated[int, option("Seeds the bootstrap.")] = 0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", metavar="", help="Leave bad rows out, and say so.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Correct answers, and report on the edits: how many, how large, how many too many, and who wins by them.

    With --cache, the same command goes on where it was killed, and another scorer rates the same corrections.
    """
    from everalign.correction import NO_GUARDS, CorrectionOptions, Guards
    from everalign.correction.evaluation import evaluate_corrector
    from everalign.data.answers import load_answers

    options = CorrectionOptions(gate, Guards() if guards else NO_GUARDS, max_new_tokens, strength or 0.0)
    local = {"device": device, "precision": precision, "tokens_per_batch": tokens_per_batch}
    judge = (judge_instructions, concurrency, requests_per_minute, timeout)
    with resumable() if cache else nullcontext(), Display() as display:
        rows = load_answers(data, skip_bad_rows=skip_bad_rows)
        report_unused(rows)
        referee = _referee(scorer, cache, judge, display.announce)
        display.announce(f"{len(rows)} rows to correct")
        report = evaluate_corrector(
            rows,
            load_corrector(corrector, template, local, make_approver(approve, margin), phrases(objectives)),
            referee,
            options=options,
            seed=seed,
            cache=cache,
            announce=display.announce,
            progress=display.progress,
        )
    if as_json:
        show_json({"corrector": corrector, "scorer": scorer, **report.facts()})
    else:
        show(_table(report))


def _referee(
    name: str | None, cache: Path | None, judge: tuple[Any, ...], announce: Callable[[str], None]
) -> "Referee | None":
    from everalign.evaluation.comparing import compare_answers
    from everalign.evaluation.judge import JudgeOptions
    from everalign.evaluation.scorers import make_scorer

    instructions, *others = judge
    # Corrections are kept whoever rates them; verdicts are a judge's alone.
    options = JudgeOptions(instructions, cache if name is not None and "://" in name else None, *others)
    if name is None:
        if options.given:
            raise InputError(f"{options.given[0]}: is for a judge; name one with --scorer URL#MODEL, or leave it out")
        announce("no scorer, so whether answers get better is not measured")
        return None
    return partial(compare_answers, make_scorer(name, judge=options))


def _table(report: "EvaluationReport") -> "Table":
    from rich.table import Table

    table = Table(title=f"{report.overall.rows} answers", title_justify="left")
    table.add_column("measure")
    columns = {"all": report.overall, **report.kinds}
    for name in columns:
        table.add_column(name, justify="right")
    for title, cell in _lines(report):
        table.add_row(title, *map(cell, columns.values()))
    return table


def _lines(report: "EvaluationReport") -> list[tuple[str, Callable[["CorrectionScores"], str]]]:
    from everalign.reporting.formats import UNMEASURED, fixed, percent

    lines: list[tuple[str, Callable[[CorrectionScores], str]]] = [
        ("rows", lambda one: str(one.rows)),
        ("edited", lambda one: percent(one.edit_rate)),
        ("tokens kept in order", lambda one: percent(one.copy_rate)),
        ("edits per token", lambda one: fixed(one.edit_ratio, 2)),
        ("good answers", lambda one: str(one.good)),
        ("edited though good", lambda one: percent(one.over_edit_rate)),
        ("tokens before", lambda one: fixed(one.length_before, 1)),
        ("tokens after", lambda one: fixed(one.length_after, 1)),
        *((f"kept by {reason}", partial(_kept, reason)) for reason in report.overall.kept),
    ]
    if report.overall.win is not None:
        lines += [
            ("wins / draws / losses", _counts),
            ("net win rate", lambda one: UNMEASURED if one.win is None else percent(one.win.net)),
            ("95 % interval", _interval),
            ("p (sign test)", lambda one: UNMEASURED if one.win is None else f"{one.win.p_value:.2g}"),
        ]
    return lines


def _kept(reason: str, scores: "CorrectionScores") -> str:
    from everalign.reporting.formats import percent

    return percent(scores.kept.get(reason, 0.0))


def _counts(scores: "CorrectionScores") -> str:
    win = scores.win
    return "" if win is None else f"{win.wins} / {win.draws} / {win.losses}"


def _interval(scores: "CorrectionScores") -> str:
    from everalign.reporting.formats import UNMEASURED, percent

    win = scores.win
    if win is None or win.low is None or win.high is None:
        return UNMEASURED
    return f"{percent(win.low)} to {percent(win.high)}"
