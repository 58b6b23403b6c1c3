"""The verbs `correct data` and `correct distill`: make correction data, and teach a model what a corrector does."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from everalign.cli.console import Display, run_scores, run_summary, show, show_json, show_line, table
from everalign.cli.correct_run import CorrectorName, load_corrector
from everalign.cli.options import (
    Columns,
    Concurrency,
    Json,
    Objectives,
    Overwrite,
    RequestsPerMinute,
    Seed,
    SkipBadRows,
    Template,
    Timeout,
    TrustRemoteCode,
    check_inputs,
    flags,
    option,
    report_unused,
    resumable,
    source,
    split_commas,
)
from everalign.errors import InputError
from everalign.learning.options import AdapterOptions, DistillOptions, MethodOptions, TrainingOptions
from everalign.training.options import WeightOptions

if TYPE_CHECKING:
    from everalign.correction.generators import AnswerSource, LlmReviser
    from everalign.correction.make_data import CorrectionData

DATA_EPILOG = (
    "Example: everalign correct data --data questions.jsonl --answers-from http://127.0.0.1:8000/v1#small "
    "--corrections-from http://127.0.0.1:8000/v1#large --output corrections.jsonl; the key is read from "
    "OPENAI_API_KEY, and of another server for corrections from CORRECTIONS_API_KEY"
)
_URL = "://"


def data(
    data: Annotated[str, option("Questions; rows may have answers and corrections, or be preferences.", "ROWS")],
    output: Annotated[Path, option("The corrections.", "FILE.jsonl")],
    columns: Columns = None,
    answers_from: Annotated[
        str | None,
        option(
            "Model that answers, on a server or in this process; by default the rows have answers.", "URL#MODEL|MODEL"
        ),
    ] = None,
    corrections_from: Annotated[
        str | None, option("Model that corrects, on a server; by default the rows have corrections.", "URL#MODEL")
    ] = None,
    instructions: Annotated[
        Path | None, option("How answers are to be corrected; built-in instructions by default.", "FILE")
    ] = None,
    temperature: Annotated[float | None, option("Temperature of the answers; 0.5 by default.")] = None,
    max_new_tokens: Annotated[
        int | None, option("Longest answer, in tokens; by default the server's limit, or 512 in this process.")
    ] = None,
    seed: Annotated[int | None, option("Random seed of answers sampled in this process.", default="0")] = None,
    keep_going: Annotated[
        bool, option("Write questions that fail into a file, and continue.", "", "--keep-going")
    ] = False,
    template: Annotated[
        str | None, option("Template whose markers corrections must not contain; everalign-1 by default.", "ID")
    ] = None,
    longest: Annotated[int | None, option("Maximum number of characters of a correction.", default="16384")] = None,
    near: Annotated[float | None, option("Lowest similarity of near-duplicates, up to 1.", default="0.9")] = None,
    concurrency: Concurrency = None,
    requests_per_minute: RequestsPerMinute = None,
    timeout: Timeout = None,
    price_in: Annotated[
        str | None,
        option(
            "Price of a million input tokens; give two if answers and corrections differ.",
            "PRICE[,PRICE]",
            default="none",
        ),
    ] = None,
    price_out: Annotated[
        str | None, option("Price of a million output tokens.", "PRICE[,PRICE]", default="none")
    ] = None,
    overwrite: Overwrite = False,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make data to train a corrector on: questions, answers, and their corrections.

    Corrections come from a stronger model, from people's edits (`correction` or `edited_text`), or from preferences
    (rejected into chosen). If it is killed, the same command continues and repeats no request.
    """
    check_inputs(None, data)
    started = time.perf_counter()
    servers = [name for name in (answers_from, corrections_from) if name is not None and _URL in name]
    prices = _prices(price_in, price_out, len(servers))
    limits = {"concurrency": concurrency, "requests_per_minute": requests_per_minute, "timeout": timeout}
    if not servers:
        _refuse(limits, "only a server (URL#MODEL) has it")
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    answerer = _answerer(answers_from, sampling, limits)
    # No second server is sent OPENAI_API_KEY.
    two_hosts = len({urlsplit(name)[:2] for name in servers}) > 1
    editor = _editor(corrections_from, instructions, limits, two_hosts)

    from everalign.correction.make_data import Filters, make_corrections
    from everalign.correction.templates import get_template
    from everalign.data.readers import load_drafts

    given = {"longest": longest, "near": near, "template": None if template is None else get_template(template)}
    filters = Filters(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    with resumable(), Display() as display:
        rows = load_drafts(source(data, columns), skip_bad_rows=skip_bad_rows)
        report_unused(rows)
        display.log(f"{rows.row_numbers[-1]} rows")
        done = make_corrections(
            rows,
            output,
            answerer=answerer,
            reviser=editor,
            filters=filters,
            keep_going=keep_going,
            overwrite=overwrite,
            log=display.log,
            progress=display.progress,
        )
    facts = {**_facts(done, prices), "seconds": round(time.perf_counter() - started, 3)}
    (show_json if as_json else _show_data)(facts)


def _answerer(name: str | None, sampling: dict[str, Any], limits: dict[str, Any]) -> "AnswerSource | None":
    from everalign.correction.generators import EndpointAnswers, LocalModel
    from everalign.llm_client import ChatClient

    given = {flag: value for flag, value in sampling.items() if value is not None}
    if name is None:
        _refuse(sampling, "answers that the rows have are not sampled")
        return None
    if _URL not in name:
        return LocalModel(name, **given)
    _refuse({"seed": sampling["seed"]}, "a server chooses its own seed")
    return EndpointAnswers(ChatClient.from_name(name, "who answers", **limits), **given)


def _editor(name: str | None, instructions: Path | None, limits: dict[str, Any], own_key: bool) -> "LlmReviser | None":
    """The editor; `own_key`: with the key in CORRECTIONS_API_KEY instead of OPENAI_API_KEY."""
    from everalign.correction.generators import LlmReviser
    from everalign.llm_client import ChatClient, checked_key, read_instructions

    key = checked_key(os.environ.get("CORRECTIONS_API_KEY", ""), "CORRECTIONS_API_KEY") if own_key else None
    if name is None:
        _refuse({"instructions": instructions}, "they are for a model that corrects (--corrections-from)")
        return None
    client = ChatClient.from_name(name, "who corrects", key, **limits)
    if instructions is None:
        return LlmReviser(client)
    return LlmReviser(client, read_instructions(instructions, "the", "how answers are to be corrected"))


def _refuse(flags: dict[str, Any], why: str) -> None:
    """Refuses flags that would be ignored."""
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

    def numbers(flag: str, text: str) -> list[float]:
        try:
            found = [float(part) for part in text.split(",")]
        except ValueError:
            found = []
        if not found or not all(math.isfinite(number) and number >= 0 for number in found):
            raise InputError(f"{flag} {text}: must be a price of at least 0, or two with a comma")
        if len(found) not in (1, servers):
            counts = f"{len(found)} prices for {servers} models that are asked"
            raise InputError(f"{flag} {text}: {counts}; give one or {servers}")
        return found if len(found) == servers else found * servers

    return list(zip(numbers("--price-in", price_in), numbers("--price-out", price_out), strict=True))


def _facts(done: "CorrectionData", prices: Prices) -> dict[str, Any]:
    left = iter(prices)
    stages: list[dict[str, Any]] = []
    for cost in done.usage:
        paid = cost.prompt_tokens is not None and bool(prices)
        stages.append({**asdict(cost), **({"cost": cost.price(*next(left))} if paid else {})})
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


def _show_data(facts: dict[str, Any]) -> None:
    show_line("rows", f"{facts['rows']} corrections, {facts['identities']} of them the answer unchanged")
    if facts["dropped"]:
        show_line("dropped", ", ".join(f"{count} {reason}" for reason, count in facts["dropped"].items()))
    if facts["failed"]:
        show_line("failed", f"{facts['failed']}, in {facts['failures']}")
    for stage in facts["stages"]:
        line = f"{stage['replies']} of {stage['model']}"
        if stage["earlier"]:
            line += f" ({stage['earlier']} by an earlier run)"
        if stage["prompt_tokens"] is not None:
            line += f": {stage['requests']} requests, {stage['prompt_tokens']} + {stage['completion_tokens']} tokens "
            line += "read and written"
            if stage["untold"]:
                line += f"; {stage['untold']} replies did not report theirs"
            if "cost" in stage:
                line += f", cost {stage['cost']:.4g}"
        show_line("edits" if stage["stage"] == "corrections" else stage["stage"], line)
    if facts["cost"] is not None:
        least = " at least: not every reply reported its tokens" if any(s["untold"] for s in facts["stages"]) else ""
        show_line("cost", f"{facts['cost']:.4g}{least}")
    show_line("output", facts["output"])


DISTILL_EPILOG = (
    "Example: everalign correct distill --model Qwen/Qwen2.5-7B-Instruct --corrector runs/corrector "
    "--data prompts.jsonl --output runs/distilled --rounds 2"
)


@flags(
    MethodOptions,
    TrainingOptions,
    AdapterOptions,
    WeightOptions,
    DistillOptions,
    names={"labels": "--as"},
    only=(
        *("replay", "learning_rate", "epochs", "beta", "reference", "max_length", "batch_size", "tokens_per_batch"),
        *("precision", "checkpointing", *AdapterOptions.model_fields, *WeightOptions.model_fields),
        *DistillOptions.model_fields,
    ),
)
def distill(
    model: Annotated[
        str, option("The stronger model: a Hugging Face folder, a Hub name, a .gguf file, `tiny` or `smollm2`.")
    ],
    corrector: CorrectorName,
    data: Annotated[str, option("Prompts; other columns are not read.", "ROWS")],
    output: Annotated[Path, option("The run directory.", "DIR")],
    columns: Columns = None,
    test: Annotated[
        str | None, option("Held-out preferences, scored after every round.", "PAIRS", default="none")
    ] = None,
    template: Template = None,
    objectives: Objectives = None,
    seed: Seed = 0,
    resume: Annotated[bool, option("Continue the run in DIR.", "", "--resume")] = False,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    method: Annotated[str | None, option("lifealign (default), er or seqft.")] = None,
    **given: Any,
) -> None:
    """Let a small corrector teach a stronger model: it rewrites the model's answers, and the model learns from that.

    Each round is a task of one run, so that LifeAlign keeps what was learned before. If it is killed, the same command
    with --resume continues.
    """
    options = DistillOptions.from_flags(given)
    check_inputs(model, data, test)
    started = time.perf_counter()
    with resumable("the same command with --resume"), Display() as display:
        from everalign.data.readers import load_preferences, load_questions
        from everalign.learning.recipe import Recipe
        from everalign.learning.self_training import distill as run_rounds

        # A recipe checks the keys; its one task stands for the rounds.
        keys = {name: value for name, value in given.items() if name not in DistillOptions.model_fields}
        about = {"model": model, "output": str(output), "seed": seed, "method": method, "objective": options.labels}
        recipe = Recipe.from_flags({**keys, **about, "tasks": [{"name": "round-1", "train": data}]})
        arguments = recipe.learner_arguments()
        for name in ("objective", "sample_answers"):
            arguments.pop(name, None)
        prompts = load_questions(source(data, columns), skip_bad_rows=skip_bad_rows)
        report_unused(prompts)
        display.log(f"{len(prompts)} prompts")
        done = run_rounds(
            corrector=load_corrector(corrector, template, {}, None, split_commas(objectives)),
            prompts=prompts,
            options=options,
            test=None if test is None else load_preferences(test),
            resume=resume,
            log=display.log,
            progress=display.progress,
            figures=display.figures,
            **arguments,
        )
    seconds = time.perf_counter() - started

    from everalign.reporting.formats import percent
    from everalign.reporting.formats import seconds as duration

    run = done.learner.run
    if as_json:
        scored = run_scores(run) if run.tasks else {}
        rounds = [asdict(one) for one in done.rounds]
        show_json({"output": str(run.path), "rounds": rounds, "scores": scored, "seconds": round(seconds, 3)})
        return
    lines = [
        (
            *(str(one.round), str(one.answers), str(one.unanswered)),
            *(percent(one.changed_share), percent(one.edit), str(one.rows)),
        )
        for one in done.rounds
    ]
    show(table(("round", "answers", "unanswered", "changed", "of their words", "rows"), lines))
    if run.zero_shot:
        show(*run_summary([run]))
    show_line("time", duration(seconds))
    show_line("run", run.path)
