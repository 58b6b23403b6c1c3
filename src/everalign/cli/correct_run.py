"""The verbs `correct run` and `correct evaluate`: correct a file of answers, and measure what that does."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import Display, show, show_json, show_line
from everalign.cli.options import Json, TrustRemoteCode, option, phrases, report_unused, resumable
from everalign.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.correction import CorrectionOptions, Corrector
    from everalign.correction.batch import CorrectionRun
    from everalign.correction.evaluation import CorrectionScores, EvaluationReport, Referee
    from everalign.correction.output_checks import Approver

EPILOG = (
    "Example: everalign correct run --corrector runs/corrector --data answers.jsonl --output corrections.jsonl; "
    "from a server, whose key is read from CORRECTOR_API_KEY: --corrector http://127.0.0.1:8000/v1#aligner "
    "--template aligner-1; a judge's key is read from APPROVER_API_KEY"
)


def run(
    corrector: Annotated[str, option("A corrector's folder, or one on a server as URL#MODEL.", "DIR|URL#MODEL")],
    data: Annotated[str, option("Rows with question and answer, or prompt and completion.", "ROWS")],
    output: Annotated[Path, option("The corrections.", "FILE.jsonl")],
    template: Annotated[str | None, option("What it reads, if it does not say so itself.", "ID")] = None,
    objectives: Annotated[
        str | None, option('Those that one on a server was trained with: "helpful,harmless".', "WORDS")
    ] = None,
    gate: Annotated[
        float | None, option("Let answers pass from this mean log-likelihood on, in nats per token.", "NATS")
    ] = None,
    guards: Annotated[
        bool, typer.Option("--guards/--no-guards", help="Return the answer where a correction cannot be trusted.")
    ] = True,
    approve: Annotated[
        str | None, option("Who must find a correction better than the answer.", "DIR|MODULE:FUNCTION|URL#MODEL")
    ] = None,
    margin: Annotated[float | None, option("How much better, in units of its rewards.")] = None,
    max_new_tokens: Annotated[int | None, option("Longest correction; twice the answer and 256 more.")] = None,
    strength: Annotated[
        float | None, option("Steer towards copying (below 0) or correcting (above 0); see correct steer.", "ALPHA")
    ] = None,
    precision: Annotated[str | None, option("fp32 or bf16.", "PRECISION")] = None,
    device: Annotated[str | None, option("Such as cuda:0; the GPU if there is one.")] = None,
    batch_size: Annotated[int | None, option("Rows corrected at once; kept after each batch.")] = None,
    tokens_per_batch: Annotated[int | None, option("Tokens computed at once; fewer save memory.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace FILE.jsonl.")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", metavar="", help="Leave bad rows out, and say so.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Correct answers, and write question, answer, correction, and whether it changed.

    Killed in the middle, the same command goes on from its last batch.
    """
    from everalign.correction import NO_GUARDS, CorrectionOptions, Guards
    from everalign.correction.batch import ROWS_PER_BATCH, correct_rows
    from everalign.data.readers import load_uncorrected
    from everalign.storage import exclusive, lock_of

    options = CorrectionOptions(gate, Guards() if guards else NO_GUARDS, max_new_tokens)
    local: dict[str, Any] = {"device": device, "precision": precision, "tokens_per_batch": tokens_per_batch}
    local["strength"] = strength or None
    started = time.perf_counter()
    # Before anything is loaded: a second process is told at once.
    with resumable(), Display() as display, exclusive(lock_of(output)):
        rows = load_uncorrected(data, skip_bad_rows=skip_bad_rows)
        report_unused(rows)
        display.log(f"{len(rows)} rows to correct")
        done = correct_rows(
            rows,
            load_corrector(corrector, template, local, make_approver(approve, margin), phrases(objectives)),
            output,
            options=options,
            overwrite=overwrite,
            rows_per_batch=ROWS_PER_BATCH if batch_size is None else batch_size,
            log=display.log,
            progress=display.progress,
        )
    facts = _facts(done, time.perf_counter() - started)
    (show_json if as_json else _show)(facts)


def make_approver(name: str | None, margin: float | None) -> "Approver | None":
    """Return who approves of corrections: a scorer of that name, or nobody.

    A judge's key comes from APPROVER_API_KEY: what opens another server is not for its eyes.

    Raises:
        InputError: there is no such scorer, or a margin that nobody would heed.
    """
    from everalign.evaluation.pairwise import ScorerApprover

    if name is None:
        if margin is not None:
            raise InputError("margin: is for a scorer; name one with --approve, or leave it out")
        return None
    if "://" in name:
        from everalign.evaluation.judge import JudgeScorer

        return ScorerApprover(JudgeScorer.from_name(name, api_key=_key("APPROVER_API_KEY")), margin or 0.0)
    from everalign.evaluation.scorers import make_scorer

    return ScorerApprover(make_scorer(name), margin or 0.0)


def _key(variable: str) -> str:
    """The key of one server, which no other one is sent."""
    from everalign.llm_client import checked_key

    return checked_key(os.environ.get(variable, ""), variable)


def load_corrector(
    name: str,
    template: str | None,
    local: dict[str, Any],
    approver: "Approver | None" = None,
    objectives: tuple[str, ...] | None = None,
    options: "CorrectionOptions | None" = None,
) -> "Corrector":
    """Return the corrector of a name.

    Args:
        name: a folder, or URL#MODEL; the server's key comes from CORRECTOR_API_KEY.
        template: what it reads, if it does not say so itself.
        local: `device`, `precision`, `tokens_per_batch` and `strength` of one in this process; None where not given.
        approver: asked whether each correction may take the answer's place.
        objectives: those that one on a server was trained with; None where not given.
        options: how it corrects, unless a call says otherwise.

    Raises:
        InputError: there is no such corrector, or it would ignore something that is given.
    """
    from everalign.correction import Corrector

    given = {flag: value for flag, value in local.items() if value is not None}
    if not name.startswith(("http://", "https://")):
        if objectives is not None:
            raise InputError("--objectives: is for a corrector on a server; a folder holds its own, so leave it out")
        load = Corrector.from_pretrained
        if "strength" in given:
            from everalign.contrib.steering import load_steered_corrector as load
        return load(name, template=template, approver=approver, options=options, **given)
    url, _, model = name.partition("#")
    if not model:
        raise InputError(f"{name}: name the model behind the address, such as http://127.0.0.1:8000/v1#aligner")
    if template is None:
        raise InputError(f"{name}: a server does not say what its corrector reads; name it with --template")
    if given:
        flag = next(iter(given)).replace("_", "-")
        raise InputError(f"--{flag}: is for a corrector in this process; a server decides for itself")
    key = _key("CORRECTOR_API_KEY")
    return Corrector.from_endpoint(
        url, model, template=template, objectives=objectives or (), approver=approver, options=options, api_key=key
    )


def _facts(done: "CorrectionRun", seconds: float) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    for one in done.corrected:
        if one.reason is not None:
            reasons[one.reason] = reasons.get(one.reason, 0) + 1
    new = done.corrected[done.resumed :]
    tokens = sum(one.output_tokens or 0 for one in new)
    return {
        "output": str(done.path),
        "rows": len(done.corrected),
        "resumed": done.resumed,
        "changed": sum(one.changed for one in done.corrected) / len(done.corrected),
        "kept_because": reasons,
        "forward_passes": _total(one.forward_passes for one in done.corrected),
        "accepted_draft_tokens": _total(one.accepted_draft_tokens for one in done.corrected),
        "rejected_draft_tokens": _total(one.rejected_draft_tokens for one in done.corrected),
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 3),
    }


def _total(counts: Any) -> int | None:
    """The sum; None where nothing is known, as of a server's passes."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _show(facts: dict[str, Any]) -> None:
    from everalign.reporting.formats import percent

    show_line("rows", facts["rows"])
    show_line("changed", percent(facts["changed"]))
    if facts["kept_because"]:
        show_line("kept", ", ".join(f"{count} by {reason}" for reason, count in sorted(facts["kept_because"].items())))
    if facts["forward_passes"] is not None:
        accepted, rejected = facts["accepted_draft_tokens"], facts["rejected_draft_tokens"]
        show_line("passes", f"{facts['forward_passes']}, {accepted} tokens guessed rightly and {rejected} wrongly")
    show_line("speed", f"{facts['tokens_per_second']} tokens/s")
    show_line("output", facts["output"])


EVALUATE_EPILOG = (
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
    from everalign.data.readers import load_answers

    options = CorrectionOptions(gate, Guards() if guards else NO_GUARDS, max_new_tokens)
    local: dict[str, Any] = {"device": device, "precision": precision, "tokens_per_batch": tokens_per_batch}
    local["strength"] = strength or None
    judge = (judge_instructions, concurrency, requests_per_minute, timeout)
    with resumable() if cache else nullcontext(), Display() as display:
        rows = load_answers(data, skip_bad_rows=skip_bad_rows)
        report_unused(rows)
        referee = _referee(scorer, cache, judge, display.log)
        display.log(f"{len(rows)} rows to correct")
        report = evaluate_corrector(
            rows,
            load_corrector(corrector, template, local, make_approver(approve, margin), phrases(objectives)),
            referee,
            options=options,
            seed=seed,
            cache=cache,
            log=display.log,
            progress=display.progress,
        )
    if as_json:
        show_json({"corrector": corrector, "scorer": scorer, **report.to_dict()})
    else:
        show(_table(report))


def _referee(
    name: str | None, cache: Path | None, judge: tuple[Any, ...], log: Callable[[str], None]
) -> "Referee | None":
    from everalign.evaluation.judge import JudgeOptions
    from everalign.evaluation.pairwise import compare_answers
    from everalign.evaluation.scorers import make_scorer

    instructions, *others = judge
    # Corrections are kept whoever rates them; verdicts are a judge's alone.
    options = JudgeOptions(instructions, cache if name is not None and "://" in name else None, *others)
    if name is None:
        if options.given:
            raise InputError(f"{options.given[0]}: is for a judge; name one with --scorer URL#MODEL, or leave it out")
        log("no scorer, so whether answers get better is not measured")
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
