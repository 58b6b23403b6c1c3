"""The verbs `correct data` and `correct distill`: make correction data, and teach a model what a corrector does."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from everalign.cli.console import Display, show, show_json, show_line
from everalign.cli.correct_run import load_corrector
from everalign.cli.options import (
    DropConstant,
    Estimator,
    Json,
    LengthNormalize,
    ScaleRewards,
    TargetEss,
    Temperature,
    TrustRemoteCode,
    WeightCap,
    WeightFloor,
    flag,
    option,
    phrases,
    report_unused,
    resumable,
)
from everalign.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.correction.generators import AnswerSource, ApiUsage, LlmReviser
    from everalign.correction.make_data import CorrectionData, Filters
    from everalign.learning.options import DistillOptions
    from everalign.learning.self_training import Distillation

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
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    answerer = _answerer(answers_from, sampling, asking)
    editor = _editor(corrections_from, instructions, asking, _editor_key(answers_from, corrections_from))
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
    answerer: "AnswerSource | None",
    editor: "LlmReviser | None",
    filters: "Filters",
    keep_going: bool,
    overwrite: bool,
    skip_bad_rows: bool,
    display: Display,
) -> "CorrectionData":
    from everalign.correction.make_data import make_corrections
    from everalign.data.readers import load_drafts

    rows = load_drafts(source, skip_bad_rows=skip_bad_rows)
    report_unused(rows)
    display.log(f"{len(rows)} rows")
    return make_corrections(
        rows,
        output,
        answerer=answerer,
        editor=editor,
        filters=filters,
        keep_going=keep_going,
        overwrite=overwrite,
        log=display.log,
        progress=display.progress,
    )


def _answerer(name: str | None, sampling: dict[str, Any], limits: dict[str, Any]) -> "AnswerSource | None":
    from everalign.correction.generators import EndpointAnswers, LocalModel
    from everalign.llm_client import ChatClient

    given = {flag: value for flag, value in sampling.items() if value is not None}
    if name is None:
        _refuse(sampling, "answers that the rows have are not sampled")
        return None
    if _URL not in name:
        return LocalModel(name, **given)
    _refuse({"seed": sampling["seed"]}, "a server draws by itself")
    return EndpointAnswers(ChatClient.from_name(name, "who answers", **limits), **given)


def _editor_key(answers_from: str | None, corrections_from: str | None) -> str | None:
    """Return the key of who corrects; None for that of OPENAI_API_KEY, which no second server is sent."""
    names = [name for name in (answers_from, corrections_from) if name is not None and _URL in name]
    hosts = {urlsplit(name)[:2] for name in names}
    if len(hosts) < 2:
        return None
    from everalign.llm_client import checked_key

    return checked_key(os.environ.get("CORRECTIONS_API_KEY", ""), "CORRECTIONS_API_KEY")


def _editor(
    name: str | None, instructions: Path | None, limits: dict[str, Any], key: str | None
) -> "LlmReviser | None":
    from everalign.correction.generators import LlmReviser
    from everalign.llm_client import ChatClient, read_instructions

    if name is None:
        _refuse({"instructions": instructions}, "they are for a model that corrects (--corrections-from)")
        return None
    client = ChatClient.from_name(name, "who corrects", key, **limits)
    if instructions is None:
        return LlmReviser(client)
    return LlmReviser(client, read_instructions(instructions, "the", "how answers are to be corrected"))


def _filters(template: str | None, longest: int | None, near: float | None) -> "Filters":
    from everalign.correction.make_data import Filters
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


def _by_stage(costs: "Sequence[ApiUsage]", prices: Prices) -> list[dict[str, Any]]:
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


DISTILL_EPILOG = (
    "Example: everalign correct distill --model Qwen/Qwen2.5-7B-Instruct --corrector runs/corrector "
    "--data prompts.jsonl --output runs/distilled --rounds 2"
)
_TRAINING, _ROUNDS = "Training", "Rounds"
# A recipe's keys that `everalign learn` has as flags too.
_LEARNING = (
    "method",
    "learning_rate",
    "epochs",
    "beta",
    "reference",
    "max_length",
    "rank",
    "alpha",
    "targets",
    "batch_size",
    "tokens_per_batch",
    "checkpointing",
    "precision",
    "replay",
    "estimator",
    "temperature",
    "target_ess",
    "scale_rewards",
    "weight_cap",
    "length_normalize",
    "weight_floor",
    "drop_constant",
)


def distill(
    context: typer.Context,
    model: Annotated[
        str, flag("The stronger model: a Hugging Face folder, a Hub name, a .gguf file, `tiny` or `smollm2`.")
    ],
    corrector: Annotated[str, flag("A corrector's folder, or one on a server.", None, "DIR|URL#MODEL")],
    data: Annotated[str, flag("Prompts; other columns are not looked at.", None, "ROWS")],
    output: Annotated[str, flag("The run directory.", None, "DIR")],
    labels: Annotated[str, flag("What is learned: sft, dpo, fpo or var.", None, "LABELS", "--as")] = "sft",
    test: Annotated[str | None, flag("Held-out preferences, scored after every round.", None, "PAIRS")] = None,
    template: Annotated[str | None, flag("What the corrector reads, if it does not say so.", None, "ID")] = None,
    objectives: Annotated[str | None, flag("Those that one on a server was trained with.", None, "WORDS")] = None,
    seed: Annotated[int, flag("Seeds everything random.")] = 0,
    resume: Annotated[bool, flag("Go on with the run that DIR holds.", None, "", "--resume")] = False,
    rounds: Annotated[int, flag("How often the model answers anew.", _ROUNDS)] = 1,
    sampling_temperature: Annotated[float, flag("What logits are divided by; 1.", _ROUNDS)] = 1.0,
    max_new_tokens: Annotated[int, flag("Longest answer, in tokens; 256.", _ROUNDS)] = 256,
    method: Annotated[str | None, flag("lifealign, er or seqft.", _TRAINING)] = None,
    replay: Annotated[float | None, flag("Share of a round's rows to replay later.", _TRAINING)] = None,
    learning_rate: Annotated[float | None, flag("Peak of the learning rate.", _TRAINING)] = None,
    epochs: Annotated[float | None, flag("Passes over a round's rows; fractions allowed.", _TRAINING)] = None,
    beta: Annotated[float | None, flag("Inverse temperature of dpo and fpo.", _TRAINING)] = None,
    reference: Annotated[str | None, flag("base, stage_start or previous_task (dpo, fpo).", _TRAINING)] = None,
    max_length: Annotated[int | None, flag("Longest prompt plus answer, in tokens.", _TRAINING)] = None,
    rank: Annotated[int | None, flag("Rank of a round's LoRA adapter.", _TRAINING)] = None,
    alpha: Annotated[float | None, flag("LoRA's α: an update is (α/rank)·B·A.", _TRAINING)] = None,
    targets: Annotated[str | None, flag("Modules: names with commas, an expression, all-linear.", _TRAINING)] = None,
    batch_size: Annotated[int | None, flag("Rows of an optimiser step.", _TRAINING)] = None,
    tokens_per_batch: Annotated[int | None, flag("Tokens computed at once.", _TRAINING)] = None,
    precision: Annotated[str | None, flag("auto, fp32 or bf16, for the base model.", _TRAINING)] = None,
    checkpointing: Annotated[
        str | None, flag("Compute activations twice to save memory: auto, on or off.", _TRAINING, "WHEN")
    ] = None,
    estimator: Estimator = None,
    temperature: Temperature = None,
    target_ess: TargetEss = None,
    scale_rewards: ScaleRewards = None,
    weight_cap: WeightCap = None,
    length_normalize: LengthNormalize = None,
    weight_floor: WeightFloor = None,
    drop_constant: DropConstant = None,
    skip_bad_rows: Annotated[bool, flag("Leave bad rows out, and say so.", None, "", "--skip-bad-rows")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Let a small corrector teach a stronger model: it rewrites the model's answers, and the model learns from that.

    Each round is a task of one run, so that LifeAlign keeps what was learned before. Killed in the middle, the same
    command with --resume goes on.
    """
    from everalign.learning.options import DistillOptions

    options = DistillOptions(
        labels=labels,  # type: ignore[arg-type]  # checked there
        rounds=rounds,
        sampling_temperature=sampling_temperature,
        max_new_tokens=max_new_tokens,
    )
    started = time.perf_counter()
    with resumable("the same command with --resume"), Display() as display:
        done = _distill(context.params, options, display)
    (_show_json if as_json else _show_distillation)(done, time.perf_counter() - started)


def _distill(flags: dict[str, Any], options: "DistillOptions", display: Display) -> "Distillation":
    from everalign.data.readers import load_drafts, load_preferences
    from everalign.data.records import Scored, ScoredSet
    from everalign.learning.self_training import distill

    arguments = _learner_arguments(flags)
    drafts = load_drafts(flags["data"], skip_bad_rows=flags["skip_bad_rows"])
    report_unused(drafts)
    prompts = ScoredSet(tuple(Scored(row.question, weight=row.weight) for row in drafts), drafts.source)
    test = None if flags["test"] is None else load_preferences(flags["test"])
    display.log(f"{len(prompts)} prompts")
    return distill(
        corrector=load_corrector(flags["corrector"], flags["template"], {}, None, phrases(flags["objectives"])),
        prompts=prompts,
        options=options,
        test=test,
        resume=flags["resume"],
        log=display.log,
        progress=display.progress,
        **arguments,
    )


def _learner_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """What a recipe with these flags makes of them, checks included; its one task stands for the rounds."""
    from everalign.learning.recipe import Recipe

    given = {name: flags[name] for name in (*_LEARNING, "model", "output", "seed")}
    task = {"name": "round-1", "train": flags["data"]}
    found = Recipe.from_flags({**given, "objective": flags["labels"], "tasks": [task]}).learner_arguments()
    return {name: value for name, value in found.items() if name not in ("objective", "sample_answers")}


def _show_json(done: "Distillation", seconds: float) -> None:
    from everalign.cli import results

    run = done.learner.run
    rounds = [asdict(found) for found in done.rounds]
    scored = results.scores(run) if run.tasks else {}
    show_json({"output": str(run.path), "rounds": rounds, "scores": scored, "seconds": round(seconds, 3)})


def _show_distillation(done: "Distillation", seconds: float) -> None:
    from everalign.cli import results
    from everalign.reporting.formats import seconds as duration

    run = done.learner.run
    show(_table(done))
    if run.zero_shot:
        show(*results.summary([run]))
    show_line("time", duration(seconds))
    show_line("run", run.path)


def _table(done: "Distillation") -> "Table":
    from rich.table import Table

    from everalign.reporting.formats import percent

    table = Table()
    for title in ("round", "answers", "unanswered", "changed", "of their words", "rows"):
        table.add_column(title, justify="right")
    for found in done.rounds:
        counts = (str(found.round), str(found.answers), str(found.unanswered), percent(found.changed_share))
        table.add_row(*counts, percent(found.edit), str(found.rows))
    return table
