"""The verb `correct steer`: find out how a corrector is made to correct more, or less."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import Display, show, show_json, show_line
from everalign.cli.options import Json, TrustRemoteCode, option, report_unused
from everalign.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.contrib.steering_vectors import SteeringFacts

EPILOG = (
    "Example: everalign correct steer --corrector runs/corrector --data edits.test.jsonl; then "
    "everalign correct run --corrector runs/corrector --data answers.jsonl --output more.jsonl --strength 0.5"
)


def steer(
    corrector: Annotated[str, option("A corrector's folder; the direction is written into it.", "DIR")],
    data: Annotated[str, option("Corrections, best such as it was not trained on.", "CORRECTIONS")],
    direction: Annotated[str | None, option("mean of the differences, or principal.", "KIND")] = None,
    layers: Annotated[str | None, option("Layers to steer together, such as 3,4; the best one if not given.")] = None,
    strengths: Annotated[str | None, option('Strengths to try: "-1,-0.5,0.5,1".', "NUMBERS")] = None,
    rows: Annotated[int | None, option("Most rows to extract from.")] = None,
    trials: Annotated[int | None, option("Most rows to compare layers on.")] = None,
    prefix: Annotated[int | None, option("Most tokens of each answer that are looked at.")] = None,
    precision: Annotated[str | None, option("fp32 or bf16.", "PRECISION")] = None,
    tokens_per_batch: Annotated[int | None, option("Tokens computed at once; fewer save memory.")] = None,
    seed: Annotated[int, option("Draws the rows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace a direction.")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", metavar="", help="Leave bad rows out, and say so.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the direction between copying and correcting, and report what each strength does to held-out answers."""
    from everalign.contrib.steering import SteeringOptions, steer_corrector
    from everalign.data import load_corrections

    given = {
        "direction": direction,
        "layers": None if layers is None else tuple(map(_whole, layers.split(","))),
        "strengths": None if strengths is None else tuple(map(_number, strengths.split(","))),
        "rows": rows,
        "trials": trials,
        "prefix": prefix,
    }
    options = SteeringOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    local: dict[str, Any] = {"precision": precision, "tokens_per_batch": tokens_per_batch}
    with Display() as display:
        found = load_corrections(data, skip_bad_rows=skip_bad_rows)
        report_unused(found)
        display.log("steering")
        facts = steer_corrector(
            corrector,
            found,
            options=options,
            seed=seed,
            overwrite=overwrite,
            log=display.log,
            progress=display.progress,
            **{name: value for name, value in local.items() if value is not None},
        )
    (_show_json if as_json else _show)(Path(corrector), facts)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--layers: must be whole numbers with commas, found {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--strengths: must be numbers with commas, found {text!r}") from None


def _show_json(folder: Path, facts: "SteeringFacts") -> None:
    show_json({"corrector": str(folder), **facts.model_dump(mode="json")})


def _show(folder: Path, facts: "SteeringFacts") -> None:
    from everalign.contrib.steering_vectors import FACTS_FILE

    show(_table(facts))
    show_line("layers", ", ".join(map(str, facts.layers)))
    show_line("Spearman", f"{facts.spearman:.2f}, of strength and edits")
    show_line("range", f"{facts.lowest:g} to {facts.highest:g}, where edits follow and corrections stay well-formed")
    show_line("facts", folder / FACTS_FILE)


def _table(facts: "SteeringFacts") -> "Table":
    from rich.table import Table

    from everalign.reporting.formats import fixed, percent

    table = Table(title=f"{facts.held_out} held-out rows", title_justify="left")
    for title in ("strength", "edited", "changed", "well-formed"):
        table.add_column(title, justify="right")
    for one in facts.settings:
        table.add_row(f"{one.strength:g}", fixed(one.edit_share, 2), percent(one.changed), percent(one.well_formed))
    return table
