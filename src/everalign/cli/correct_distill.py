"""The verb `correct distill`: a model learns what a corrector makes of its own answers."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.correct_run import load_corrector
from everalign.cli.display import Display
from everalign.cli.output import show, show_json, show_line
from everalign.cli.verbs import Json, TrustRemoteCode, flag, phrases, report_unused, resumable
from everalign.cli.weighting_flags import (
    DropConstant,
    Estimator,
    LengthNormalize,
    ScaleRewards,
    TargetEss,
    Temperature,
    WeightCap,
    WeightFloor,
)

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.learning.distill import Distillation
    from everalign.learning.distill_options import DistillOptions

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
    from everalign.learning.distill_options import DistillOptions

    options = DistillOptions(labels, rounds, sampling_temperature, max_new_tokens)  # type: ignore[arg-type]  # checked
    started = time.perf_counter()
    with resumable("the same command with --resume"), Display() as display:
        done = _distill(context.params, options, display)
    (_show_json if as_json else _show)(done, time.perf_counter() - started)


def _distill(flags: dict[str, Any], options: "DistillOptions", display: Display) -> "Distillation":
    from everalign.data.drafts import load_drafts
    from everalign.data.prompts import PromptRow, PromptSet
    from everalign.data.readers import load_preferences
    from everalign.learning.distill import distill

    arguments = _learner_arguments(flags)
    drafts = load_drafts(flags["data"], skip_bad_rows=flags["skip_bad_rows"])
    report_unused(drafts)
    prompts = PromptSet(tuple(PromptRow(row.question, row.weight) for row in drafts), drafts.source)
    test = None if flags["test"] is None else load_preferences(flags["test"])
    display.announce(f"{len(prompts)} prompts")
    return distill(
        corrector=load_corrector(flags["corrector"], flags["template"], {}, None, phrases(flags["objectives"])),
        prompts=prompts,
        options=options,
        test=test,
        resume=flags["resume"],
        announce=display.announce,
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


def _show(done: "Distillation", seconds: float) -> None:
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
