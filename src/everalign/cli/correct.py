"""The verbs `correct train` and `correct steer`, and the group of all verbs on correctors."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli import correct_data, correct_run
from everalign.cli.console import Display, say, show, show_json, show_line, table
from everalign.cli.launch import Processes, share_work
from everalign.cli.options import (
    AllowOverlap,
    Columns,
    Json,
    Overwrite,
    Seed,
    SkipBadRows,
    TokensPerBatch,
    TrustRemoteCode,
    check_inputs,
    flags,
    option,
    report_unused,
    resumable,
    source,
)
from everalign.correction.options import CorrectorOptions
from everalign.errors import InputError

if TYPE_CHECKING:
    from everalign.data import CorrectionSet
    from everalign.data.readers import Source

correct = typer.Typer(
    help="Make a corrector, which reads an answer and writes a better one, and use it.", no_args_is_help=True
)
correct.command(epilog=correct_data.DATA_EPILOG)(correct_data.data)
correct.command(epilog=correct_run.RUN_EPILOG)(correct_run.run)
correct.command(epilog=correct_data.DISTILL_EPILOG)(correct_data.distill)
correct.command(epilog=correct_run.EVALUATE_EPILOG)(correct_run.evaluate)


@correct.command(
    epilog="Example: everalign correct train --model Qwen/Qwen2.5-0.5B-Instruct --data edits.jsonl "
    "--test edits.test.jsonl --output runs/corrector --lora-rank 16"
)
@flags(CorrectorOptions)
def train(
    context: typer.Context,
    model: Annotated[
        str,
        option("A Hugging Face folder, a Hub name, a .gguf file, `tiny`, `smollm2`, or a corrector to train further."),
    ],
    data: Annotated[str, option("Corrections to learn, or preferences (rejected into chosen).", "ROWS")],
    output: Annotated[Path, option("The corrector's folder.", "DIR")],
    test: Annotated[str | None, option("Held-out rows, for the report.", "ROWS", default="none")] = None,
    columns: Columns = None,
    seed: Seed = 0,
    filtered: Annotated[
        bool, option("Leave out corrections that teach nothing, and report why.", "", "--filter")
    ] = False,
    allow_overlap: AllowOverlap = False,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    processes: Processes = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train a corrector on corrections: first to copy a share of the answers, then to correct all of them.

    If it is killed, the same command continues.
    """
    options = CorrectorOptions.from_flags(given)
    share_work(processes, context, lambda: check_inputs(model, data, test, output=output))
    with resumable(), Display() as display:
        display.log("data")
        rows = _load(source(data, columns), skip_bad_rows)
        held_out = None if test is None else _load(source(test, columns), skip_bad_rows)
        from everalign.correction import filter_corrections, get_template, train_corrector

        if filtered:
            template = None if options.template is None else get_template(options.template)
            kept = filter_corrections(rows, template=template)
            display.log(f"  {kept.one_line()}")
            rows = kept.rows
        trained = train_corrector(
            model,
            rows,
            output,
            test=held_out,
            options=options,
            seed=seed,
            allow_overlap=allow_overlap,
            log=display.log,
            progress=display.progress,
            figures=display.figures,
        )
    facts, report, stages = trained.facts, trained.report, trained.stages
    if as_json:
        show_json(
            {
                "output": str(trained.path),
                "held_out": facts.held_out,
                "rows": facts.rows,
                "template": facts.template,
                "objectives": list(facts.objectives),
                "max_length": facts.max_length,
                "stages": {
                    name: {"steps": stage.steps, "seconds": round(stage.seconds, 3)} for name, stage in stages.items()
                },
            }
        )
        return

    from everalign.reporting.formats import fixed, percent, seconds

    if report is None:
        show("No held-out rows (--test), so the corrector was not evaluated.")
    else:
        lines = [
            ("perplexity", fixed(report.perplexity, 2), "per token of the corrections"),
            ("copying", fixed(report.copy_log_likelihood, 3), "nats per token of the answers as output"),
            ("starts by copying", percent(report.starts_by_copying), "greedy decoding begins like the answer"),
            ("copies", percent(report.copies), "it would return the answer unchanged"),
        ]
        if report.keeps is not None:
            lines.append(("keeps", percent(report.keeps), f"of {report.identities} answers that need no correction"))
        show(table(("measure", "value", "meaning"), lines, title=f"{report.rows} held-out rows"))
    show_line("time", seconds(sum(stage.seconds for stage in stages.values())))
    show_line("model", trained.path)


def _load(source: "Source", skip_bad_rows: bool) -> "CorrectionSet":
    from everalign.data import CorrectionSet, load_edits

    rows = load_edits(source, skip_bad_rows=skip_bad_rows)
    report_unused(rows)
    if isinstance(rows, CorrectionSet):
        return rows
    say("note", f"{source} holds preferences: each rejected answer is corrected into the chosen one", "bold")
    return CorrectionSet.of_preferences(rows)


@correct.command(
    epilog="Example: everalign correct steer --corrector runs/corrector --data edits.test.jsonl; then "
    "everalign correct run --corrector runs/corrector --data answers.jsonl --output more.jsonl --strength 0.5"
)
def steer(
    corrector: Annotated[str, option("A corrector's folder; the direction is written into it.", "DIR")],
    data: Annotated[str, option("Corrections, preferably ones that it was not trained on.", "CORRECTIONS")],
    columns: Columns = None,
    direction: Annotated[
        str | None, option("Direction: mean of the differences, or principal.", "KIND", default="mean")
    ] = None,
    layers: Annotated[str | None, option("Layers to steer together, such as 3,4; the best one by default.")] = None,
    strengths: Annotated[
        str | None, option('Strengths to try; by default "-0.75,-0.5,-0.25,0.25,0.5,0.75".', "NUMBERS")
    ] = None,
    rows: Annotated[int | None, option("Maximum number of rows to extract from.", default="64")] = None,
    trials: Annotated[int | None, option("Maximum number of rows to compare layers on.", default="24")] = None,
    prefix: Annotated[int | None, option("Maximum number of tokens to look at in each answer.", default="8")] = None,
    precision: Annotated[str | None, option("Precision of the computation.", "fp32|bf16", default="fp32")] = None,
    tokens_per_batch: TokensPerBatch = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the direction between copying and correcting, and report what each strength does to held-out answers."""
    check_inputs(corrector, data)
    from everalign.contrib.steering import SteeringOptions, steer_corrector
    from everalign.contrib.steering_vectors import FACTS_FILE
    from everalign.data import load_corrections
    from everalign.reporting.formats import fixed, percent

    given = {
        "direction": direction,
        "layers": _numbers(layers, int, "--layers: must be whole numbers with commas"),
        "strengths": _numbers(strengths, float, "--strengths: must be numbers with commas"),
        "rows": rows,
        "trials": trials,
        "prefix": prefix,
    }
    options = SteeringOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    local: dict[str, Any] = {"precision": precision, "tokens_per_batch": tokens_per_batch}
    with Display() as display:
        found = load_corrections(source(data, columns), skip_bad_rows=skip_bad_rows)
        report_unused(found)
        display.log("steering")
        facts = steer_corrector(
            corrector,
            found,
            options=options,
            seed=seed,
            overwrite=overwrite,
            log=display.log,
            progress=partial(display.progress, unit="trials"),
            **{name: value for name, value in local.items() if value is not None},
        )
    if as_json:
        show_json({"corrector": str(Path(corrector)), **facts.model_dump(mode="json")})
        return
    lines = [
        (f"{one.strength:g}", fixed(one.edit_share, 2), percent(one.changed), percent(one.well_formed))
        for one in facts.settings
    ]
    show(table(("strength", "edited", "changed", "well-formed"), lines, title=f"{facts.held_out} held-out rows"))
    show_line("layers", ", ".join(map(str, facts.layers)))
    show_line("Spearman", f"{facts.spearman:.2f}, of strength and edits")
    show_line("range", f"{facts.lowest:g} to {facts.highest:g}, where edits follow and corrections stay well-formed")
    show_line("facts", Path(corrector) / FACTS_FILE)


def _numbers(text: str | None, kind: Any, message: str) -> tuple[Any, ...] | None:
    try:
        return None if text is None else tuple(map(kind, text.split(",")))
    except ValueError:
        raise InputError(f"{message}, found {text!r}") from None
