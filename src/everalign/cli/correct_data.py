"""The verb `correct data`: questions in, question-answer-correction rows out."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from everalign.cli.display import Display
from everalign.cli.output import show_json, show_line
from everalign.cli.verbs import Json, TrustRemoteCode, option, report_unused, resumable
from everalign.errors import InputError

if TYPE_CHECKING:
    from everalign.chat_models import ChatOptions
    from everalign.correction.answering import Answerer, Editor
    from everalign.correction.asking import Cost
    from everalign.correction.pipeline import CorrectionData, Filters

DATA_EPILOG = (
    "Example: everalign correct data --data questions.jsonl --answers-from http://127.0.0.1:8000/v1#small "
    "--corrections-from http://127.0.0.1:8000/v1#large --output corrections.jsonl; the key is read from "
    "OPENAI_API_KEY, and that of another server that corrects from CORRECTIONS_API_KEY"
)
_URL = "://"


def data(
    data: Annotated[str, option("Questions; rows may have answers and corrections, or be preferences.", "ROWS")],
    output: Annotated[Path, option("The corrections.", "FILE.jsonl")],
    answers_from: Annotated[
        str | None, option("Who answers: a model on a server, or here; the rows themselves.", "URL#MODEL|MODEL")
    ] = None,
    corrections_from: Annotated[
        str | None, option("Who corrects: a stronger model on a server; the rows themselves.", "URL#MODEL")
    ] = None,
    instructions: Annotated[Path | None, option("How answers are to be corrected.", "FILE")] = None,
    temperature: Annotated[float | None, option("What answers are sampled at; 0.5.")] = None,
    max_new_tokens: Annotated[
        int | None, option("Longest answer; the server's own limit, 512 for a model here.")
    ] = None,
    seed: Annotated[int | None, option("Seeds the answers of a model here.")] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", metavar="", help="Write questions that fail into a file, and go on.")
    ] = False,
    template: Annotated[str | None, option("Whose marks no correction may have; everalign-1.", "ID")] = None,
    longest: Annotated[int | None, option("Most characters of a correction.")] = None,
    near: Annotated[float | None, option("Similarity of near-duplicates, to 1.")] = None,
    concurrency: Annotated[int | None, option("Requests to a server under way at once.")] = None,
    requests_per_minute: Annotated[float | None, option("Begin no more requests to a server.")] = None,
    timeout: Annotated[float | None, option("Seconds a server has for one reply.")] = None,
    price_in: Annotated[
        str | None, option("Price of a million tokens read; of answers and corrections, if two.", "PRICE[,PRICE]")
    ] = None,
    price_out: Annotated[str | None, option("Price of a million tokens written.", "PRICE[,PRICE]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace FILE.jsonl.")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", metavar="", help="Leave bad rows out, and say so.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make data to train a corrector on: questions, answers, and their corrections.

    Corrections come from a stronger model, from people's edits (`correction` or `edited_text`), or from preferences
    (rejected into chosen). Killed in the middle, the same command goes on and asks for nothing twice.
    """
    started = time.perf_counter()
    servers = [name for name in (answers_from, corrections_from) if name is not None and _URL in name]
    prices = _prices(price_in, price_out, len(servers))
    asking = {"concurrency": concurrency, "requests_per_minute": requests_per_minute, "timeout": timeout}
    if not servers:
        _refuse(asking, "only a server (URL#MODEL) has it")
    from everalign.chat_models import ChatOptions

    options = ChatOptions(**asking)  # type: ignore[arg-type]  # each under its own name
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    answerer = _answerer(answers_from, sampling, options)
    editor = _editor(corrections_from, instructions, options, _editor_key(answers_from, corrections_from))
    with resumable(), Display() as display:
        done = _make(
            data, output, answerer, editor, _filters(template, longest, near), keep_going, overwrite,
            skip_bad_rows, display,
        )  # fmt: skip
    facts = {**_facts(done, _by_stage(done.costs, prices)), "seconds": round(time.perf_counter() - started, 3)}
    (show_json if as_json else _show)(facts)


def _make(
    source: str,
    output: Path,
    answerer: "Answerer | None",
    editor: "Editor | None",
    filters: "Filters",
    keep_going: bool,
    overwrite: bool,
    skip_bad_rows: bool,
    display: Display,
) -> "CorrectionData":
    from everalign.correction.pipeline import make_corrections
    from everalign.data.drafts import load_drafts

    rows = load_drafts(source, skip_bad_rows=skip_bad_rows)
    report_unused(rows)
    display.announce(f"{len(rows)} rows")
    return make_corrections(
        rows,
        output,
        answerer=answerer,
        editor=editor,
        filters=filters,
        keep_going=keep_going,
        overwrite=overwrite,
        announce=display.announce,
        progress=display.progress,
    )


def _answerer(name: str | None, sampling: dict[str, Any], options: "ChatOptions") -> "Answerer | None":
    from everalign.correction.answering import EndpointAnswers, SampledAnswers

    given = {flag: value for flag, value in sampling.items() if value is not None}
    if name is None:
        _refuse(sampling, "answers that the rows have are not sampled")
        return None
    if _URL not in name:
        return SampledAnswers(name, **given)
    _refuse({"seed": sampling["seed"]}, "a server draws by itself")
    return EndpointAnswers(options.client(name, "who answers"), **given)


def _editor_key(answers_from: str | None, corrections_from: str | None) -> str | None:
    """Return the key of who corrects; None for that of OPENAI_API_KEY, which no second server is sent."""
    names = [name for name in (answers_from, corrections_from) if name is not None and _URL in name]
    hosts = {urlsplit(name)[:2] for name in names}
    if len(hosts) < 2:
        return None
    from everalign.chat_arguments import checked_key

    return checked_key(os.environ.get("CORRECTIONS_API_KEY", ""), "CORRECTIONS_API_KEY")


def _editor(name: str | None, instructions: Path | None, options: "ChatOptions", key: str | None) -> "Editor | None":
    from everalign.chat_models import read_instructions
    from everalign.correction.answering import Editor

    if name is None:
        _refuse({"instructions": instructions}, "they are for a model that corrects (--corrections-from)")
        return None
    client = options.client(name, "who corrects", key)
    if instructions is None:
        return Editor(client)
    return Editor(client, read_instructions(instructions, "the", "how answers are to be corrected"))


def _filters(template: str | None, longest: int | None, near: float | None) -> "Filters":
    from everalign.correction.pipeline import Filters
    from everalign.correction.templates import get_template

    given = {"longest": longest, "near": near, "template": None if template is None else get_template(template)}
    return Filters(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _refuse(flags: dict[str, Any], why: str) -> None:
    """Refuse flags that would be ignored."""
    for name, value in flags.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} would be ignored: {why}; leave it out")


Prices = Sequence[tuple[float, float]]


def _prices(price_in: str | None, price_out: str | None, servers: int) -> Prices:
    """Prices in and out of each server's stage, in order; none where none are given."""
    if price_in is None and price_out is None:
        return ()
    if price_in is None or price_out is None:
        missing = "--price-in" if price_in is None else "--price-out"
        raise InputError(f"{missing} is missing: give both prices, or none")
    if not servers:
        _refuse({"price_in": price_in}, "no server is asked, so no tokens are paid for")
    found = [_numbers(flag, text, servers) for flag, text in (("--price-in", price_in), ("--price-out", price_out))]
    return list(zip(*found, strict=True))


def _numbers(flag: str, text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise InputError(f"{flag} {text}: must be a price of at least 0, or two with a comma")
    if len(numbers) not in (1, count):
        raise InputError(f"{flag} {text}: {len(numbers)} prices for {count} models that are asked; give one or {count}")
    return numbers if len(numbers) == count else numbers * count


def _by_stage(costs: "Sequence[Cost]", prices: Prices) -> list[dict[str, Any]]:
    """What each stage took, with its price where it has one."""
    left = iter(prices)
    found = []
    for cost in costs:
        paid = cost.prompt_tokens is not None and bool(prices)
        found.append({**asdict(cost), **({"cost": cost.price(*next(left))} if paid else {})})
    return found


def _facts(done: "CorrectionData", stages: list[dict[str, Any]]) -> dict[str, Any]:
    costs = [stage["cost"] for stage in stages if "cost" in stage]
    return {
        "output": str(done.path),
        "rows": len(done.rows),
        "identities": done.identities,
        "dropped": dict(done.dropped),
        "failed": done.failed,
        "failures": None if done.failures is None else str(done.failures),
        "stages": stages,
        "cost": sum(costs) if costs else None,
    }


def _show(facts: dict[str, Any]) -> None:
    show_line("rows", f"{facts['rows']} corrections, {facts['identities']} of them the answer unchanged")
    if facts["dropped"]:
        show_line("dropped", ", ".join(f"{count} {reason}" for reason, count in facts["dropped"].items()))
    if facts["failed"]:
        show_line("failed", f"{facts['failed']}, in {facts['failures']}")
    for stage in facts["stages"]:
        show_line("edits" if stage["stage"] == "corrections" else stage["stage"], _told(stage))
    if facts["cost"] is not None:
        least = " at least: not every reply told its tokens" if any(s["untold"] for s in facts["stages"]) else ""
        show_line("cost", f"{facts['cost']:.4g}{least}")
    show_line("output", facts["output"])


def _told(stage: dict[str, Any]) -> str:
    earlier = f" ({stage['earlier']} by an earlier run)" if stage["earlier"] else ""
    told = f"{stage['replies']} of {stage['model']}{earlier}"
    if stage["prompt_tokens"] is None:
        return told
    untold = f"; {stage['untold']} replies did not tell theirs" if stage["untold"] else ""
    price = f", cost {stage['cost']:.4g}" if "cost" in stage else ""
    tokens = f"{stage['prompt_tokens']} + {stage['completion_tokens']} tokens read and written{untold}{price}"
    return f"{told}: {stage['requests']} requests, {tokens}"
