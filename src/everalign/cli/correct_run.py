"""The verbs `correct run` and `correct evaluate`: correct a file of answers, and measure what that does."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from everalign.bulk.job import BulkOptions
from everalign.cli.console import Display, show, show_json, show_line, table
from everalign.cli.options import (
    Approve,
    Columns,
    Concurrency,
    Device,
    Gate,
    Guarded,
    Json,
    JudgeInstructions,
    LocalPrecision,
    Margin,
    MaxNewTokens,
    Objectives,
    Overwrite,
    RequestsPerMinute,
    SkipBadRows,
    Strength,
    Template,
    Timeout,
    TokensPerBatch,
    TrustRemoteCode,
    check_inputs,
    flags,
    option,
    report_skipped,
    report_unused,
    resumable,
    source,
    split_commas,
)
from everalign.errors import InputError

if TYPE_CHECKING:
    from everalign.bulk.job import Finished
    from everalign.correction import CorrectionOptions, Corrector
    from everalign.correction.batch import CorrectionWork
    from everalign.correction.checks import Approver
    from everalign.correction.evaluation import CorrectionScores, EvaluationReport

RUN_EPILOG = (
    "Example: everalign correct run --corrector runs/corrector --data answers.jsonl --output corrections.jsonl; "
    "from a server, whose key is read from CORRECTOR_API_KEY: --corrector http://127.0.0.1:8000/v1#aligner "
    "--template aligner-1; a judge's key is read from APPROVER_API_KEY"
)
EVALUATE_EPILOG = (
    "Example: everalign correct evaluate --corrector runs/corrector --data edits.test.jsonl --scorer runs/reward; "
    "with a judge, whose key is read from OPENAI_API_KEY: --scorer http://127.0.0.1:8000/v1#qwen2.5"
)

CorrectorName = Annotated[str, option("A corrector's folder, or one on a server.", "DIR|URL#MODEL")]


@flags(BulkOptions)
def run(
    corrector: CorrectorName,
    data: Annotated[str, option("Rows with question and answer, or prompt and completion.", "ROWS")],
    output: Annotated[str, option("The corrections: .jsonl or .parquet.", "FILE|URL")],
    columns: Columns = None,
    template: Template = None,
    objectives: Objectives = None,
    gate: Gate = None,
    guards: Guarded = True,
    approve: Approve = None,
    margin: Margin = None,
    max_new_tokens: MaxNewTokens = None,
    strength: Strength = None,
    precision: LocalPrecision = None,
    device: Device = None,
    batch_size: Annotated[
        int | None, option("Rows corrected at once; results are kept after each batch.", default="64")
    ] = None,
    tokens_per_batch: TokensPerBatch = None,
    overwrite: Overwrite = False,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Correct answers, and write question, answer, correction, and whether it changed.

    Memory does not grow with the rows. If it is killed, the same command continues from its last batch.
    """
    check_inputs(None if "://" in corrector else corrector, data)
    from everalign.bulk.run import run_bulk
    from everalign.correction import NO_GUARDS, CorrectionOptions, Guards
    from everalign.correction.batch import ROWS_PER_BATCH, CorrectionWork, shortfalls
    from everalign.data.readers import UNCORRECTED
    from everalign.data.streams import RowStream

    options = CorrectionOptions(gate, Guards() if guards else NO_GUARDS, max_new_tokens)
    local = {
        "device": device,
        "precision": precision,
        "tokens_per_batch": tokens_per_batch,
        "strength": strength or None,
    }
    work = partial(
        _correction_work,
        *(corrector, template, local, approve, margin, split_commas(objectives), options),
        ROWS_PER_BATCH if batch_size is None else batch_size,
    )
    started = time.perf_counter()
    with resumable(), Display() as display:
        done = run_bulk(
            RowStream(source(data, columns), UNCORRECTED, skip_bad_rows),
            work,
            output,
            CorrectionWork.words,
            options=BulkOptions.from_flags(given),
            overwrite=overwrite,
            log=display.log,
            progress=display.progress,
            found=partial(report_skipped, data),
        )
        for warning in shortfalls(_reasons(done), done.rows):
            display.log(f"  warning: {warning}")
    facts = _facts(done, time.perf_counter() - started)
    if as_json:
        show_json(facts)
        return

    from everalign.reporting.formats import percent

    show_line("rows", facts["rows"])
    show_line("changed", percent(facts["changed"]))
    if facts["kept_because"]:
        show_line("kept", ", ".join(f"{count} by {reason}" for reason, count in sorted(facts["kept_because"].items())))
    if facts["forward_passes"] is not None:
        accepted, rejected = facts["accepted_draft_tokens"], facts["rejected_draft_tokens"]
        show_line("passes", f"{facts['forward_passes']}, {accepted} draft tokens accepted and {rejected} rejected")
    show_line("speed", f"{facts['tokens_per_second']} tokens/s")
    show_line("output", facts["output"])


def _correction_work(
    name: str,
    template: str | None,
    local: dict[str, Any],
    approve: str | None,
    margin: float | None,
    objectives: tuple[str, ...] | None,
    options: "CorrectionOptions",
    rows_per_batch: int,
) -> "CorrectionWork":
    """Loads the corrector; a Ray worker calls it too."""
    from everalign.correction.batch import CorrectionWork

    corrector = load_corrector(name, template, local, make_approver(approve, margin), objectives)
    return CorrectionWork(corrector, options, rows_per_batch)


def _reasons(done: "Finished") -> dict[str, int]:
    """Why answers were kept, and how many."""
    return {name.removeprefix("kept "): int(n) for name, n in done.totals.items() if name.startswith("kept ")}


def _facts(done: "Finished", seconds: float) -> dict[str, Any]:
    # None where nothing is known, as of a server's passes.
    names = ("forward_passes", "accepted_draft_tokens", "rejected_draft_tokens")
    known = {name: int(done.totals[name]) if name in done.totals else None for name in names}
    return {
        "output": done.output,
        "rows": done.rows,
        "resumed": done.resumed,
        "skipped": done.checked.skipped,
        "changed": done.totals["changed"] / done.rows,
        "kept_because": _reasons(done),
        **known,
        "tokens_per_second": round(done.totals["written"] / seconds, 1),
        "seconds": round(seconds, 3),
    }


def make_approver(name: str | None, margin: float | None) -> "Approver | None":
    """Returns the scorer that approves of corrections; None without a name.

    A judge's key comes from APPROVER_API_KEY, because no server is sent another one's key.

    Raises:
        InputError: there is no such scorer, or the margin would be ignored.
    """
    if name is None:
        if margin is not None:
            raise InputError("margin: is for a scorer; name one with --approve, or leave it out")
        return None
    from everalign.evaluation.scoring import ScorerApprover

    if "://" in name:
        from everalign.evaluation.judge import JudgeScorer

        return ScorerApprover(JudgeScorer.from_name(name, api_key=_key("APPROVER_API_KEY")), margin or 0.0)
    from everalign.evaluation.scorers import make_scorer

    return ScorerApprover(make_scorer(name), margin or 0.0)


def _key(variable: str) -> str:
    """The key of one server."""
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
    """Loads the corrector of a name.

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


def evaluate(
    corrector: CorrectorName,
    data: Annotated[str, option("Rows with question, answer, and what is known: correction, good, kind.", "ROWS")],
    columns: Columns = None,
    scorer: Annotated[
        str | None, option("Scorer that compares the answers.", "DIR|MODULE:FUNCTION|URL#MODEL", default="none")
    ] = None,
    template: Template = None,
    objectives: Objectives = None,
    gate: Gate = None,
    guards: Guarded = True,
    approve: Approve = None,
    margin: Margin = None,
    strength: Strength = None,
    max_new_tokens: MaxNewTokens = None,
    judge_instructions: JudgeInstructions = None,
    cache: Annotated[
        Path | None, option("Folder that keeps corrections and a judge's verdicts.", "DIR", default="none")
    ] = None,
    concurrency: Concurrency = None,
    requests_per_minute: RequestsPerMinute = None,
    timeout: Timeout = None,
    precision: LocalPrecision = None,
    device: Device = None,
    tokens_per_batch: TokensPerBatch = None,
    seed: Annotated[int, option("Seed of the bootstrap; 0 by default.")] = 0,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Correct answers, and report on the edits: how many, how large, how many too many, and who wins by them.

    With --cache, the same command continues if it is killed, and another scorer rates the same corrections.
    """
    check_inputs(None if "://" in corrector else corrector, data)
    from everalign.correction import NO_GUARDS, CorrectionOptions, Guards
    from everalign.correction.evaluation import evaluate_corrector
    from everalign.data.readers import load_answers
    from everalign.evaluation.judge import JudgeOptions
    from everalign.evaluation.scorers import make_scorer
    from everalign.evaluation.scoring import compare_answers

    options = CorrectionOptions(gate, Guards() if guards else NO_GUARDS, max_new_tokens)
    local = {
        "device": device,
        "precision": precision,
        "tokens_per_batch": tokens_per_batch,
        "strength": strength or None,
    }
    with resumable() if cache else nullcontext(), Display() as display:
        rows = load_answers(source(data, columns), skip_bad_rows=skip_bad_rows)
        report_unused(rows)
        # The cache keeps corrections for any scorer, and verdicts of a judge.
        verdicts = cache if scorer is not None and "://" in scorer else None
        judge = JudgeOptions(judge_instructions, verdicts, concurrency, requests_per_minute, timeout)
        if scorer is None and judge.given:
            raise InputError(f"{judge.given[0]}: is for a judge; name one with --scorer URL#MODEL, or leave it out")
        if scorer is None:
            display.log("no scorer, so whether answers get better is not measured")
        referee = None if scorer is None else partial(compare_answers, make_scorer(scorer, judge=judge))
        display.log(f"{len(rows)} rows to correct")
        report = evaluate_corrector(
            rows,
            load_corrector(corrector, template, local, make_approver(approve, margin), split_commas(objectives)),
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
        groups = {"all": report.overall, **report.kinds}
        lines = [(title, *map(cell, groups.values())) for title, cell in _measures(report)]
        show(table(("measure", *groups), lines, title=f"{report.overall.rows} answers"))
        if report.overall.win is not None and not report.overall.edit_rate:
            show("No answer was edited, so there is no win rate.")


def _measures(report: "EvaluationReport") -> list[tuple[str, Callable[["CorrectionScores"], str]]]:
    """Each line's title, and how it shows the scores of a column."""
    from everalign.reporting.formats import UNMEASURED, fixed, percent

    def kept(reason: str) -> Callable[["CorrectionScores"], str]:
        return lambda one: percent(one.kept.get(reason, 0.0))

    def interval(one: "CorrectionScores") -> str:
        win = one.win
        # Where nothing was edited, there are no corrections to compare with the answers.
        known = win is not None and win.low is not None and win.high is not None and one.edit_rate
        return f"{percent(win.low)} to {percent(win.high)}" if known else UNMEASURED  # type: ignore[union-attr]

    lines: list[tuple[str, Callable[[CorrectionScores], str]]] = [
        ("rows", lambda one: str(one.rows)),
        ("edited", lambda one: percent(one.edit_rate)),
        ("tokens kept in order", lambda one: percent(one.copy_rate)),
        ("edits per token", lambda one: fixed(one.edit_ratio, 2)),
        ("good answers", lambda one: str(one.good)),
        ("edited though good", lambda one: percent(one.over_edit_rate)),
        ("tokens before", lambda one: fixed(one.length_before, 1)),
        ("tokens after", lambda one: fixed(one.length_after, 1)),
        *((f"kept by {reason}", kept(reason)) for reason in report.overall.kept),
    ]
    if report.overall.win is not None:
        lines += [
            ("wins / draws / losses", lambda o: "" if (w := o.win) is None else f"{w.wins} / {w.draws} / {w.losses}"),
            ("net win rate", lambda o: UNMEASURED if o.win is None or not o.edit_rate else percent(o.win.net)),
            ("95 % interval", interval),
            ("p (sign test)", lambda o: UNMEASURED if o.win is None or not o.edit_rate else f"{o.win.p_value:.2g}"),
        ]
    return lines
