"""The verbs `feedback stats` and `feedback export`: what people said of answers, counted, and as rows to learn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from everalign.cli.console import show_json, show_line
from everalign.cli.options import Json, option
from everalign.errors import InputError

feedback = typer.Typer(help="Count the feedback that a gateway stored, and write it as rows.", no_args_is_help=True)

_RATED = {-1: "bad", 0: "neither", 1: "good"}

Store = Annotated[
    str,
    typer.Option(
        help="The store: sqlite:///feedback.db, or postgresql://user:password@host/database.",
        metavar="URL",
        envvar="EVERALIGN_STORE",
        show_default=False,
        show_envvar=True,
    ),
]


@feedback.command(epilog="Example: everalign feedback stats --store sqlite:///feedback.db")
def stats(store: Store, as_json: Json = False) -> None:
    """Count exchanges and feedback."""
    from dataclasses import asdict

    from everalign.serving.store import FeedbackStore

    check_is_there(store)
    with FeedbackStore.open(store) as opened:
        counted = opened.stats()
    facts = asdict(counted)
    for name in ("oldest", "newest"):
        facts[name] = None if facts[name] is None else facts[name].isoformat()
    facts["ratings"] = {str(rating): count for rating, count in counted.ratings.items()}
    if as_json:
        show_json({"store": opened.name, **facts})
        return
    show_line("store", opened.name)
    show_line("answers", _with(facts["exchanges"], facts["outcomes"]))
    if facts["oldest"] is not None:
        show_line("from", f"{facts['oldest']} to {facts['newest']}")
    show_line("judged", f"{facts['feedback']} of {facts['keys']} keys, {facts['waiting']} not learned yet")
    show_line(
        "ratings",
        _with(sum(counted.ratings.values()), {_RATED[name]: count for name, count in counted.ratings.items()}),
    )
    show_line("sides", _with(sum(counted.preferred.values()), facts["preferred"]))
    show_line("edits", facts["edits"])


@feedback.command(
    epilog="Example: everalign feedback export --store sqlite:///feedback.db --as corrections --output edits.jsonl"
)
def export(
    store: Store,
    kind: Annotated[str, typer.Option("--as", help="preferences, corrections or scored.", metavar="KIND")],
    output: Annotated[Path, option("The rows.", "FILE.jsonl")],
    unlearned: Annotated[
        bool, typer.Option("--unlearned", metavar="", help="Leave out what was learned already.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace FILE.jsonl.")] = False,
    as_json: Json = False,
) -> None:
    """Write feedback as rows that learn, reward train and correct train read; all of it, without a task's guards."""
    from everalign.serving.feedback.task import rows_of
    from everalign.serving.store import FeedbackStore
    from everalign.storage import check_new_file, json_line, write_text

    check_new_file(output, ".jsonl", overwrite)
    check_is_there(store)
    with FeedbackStore.open(store) as opened:
        rows, left = rows_of(opened.feedback(unlearned=unlearned), kind)
    if not rows:
        reasons = f" ({', '.join(f'{count} {reason}' for reason, count in left.items())} left out)" if left else ""
        raise InputError(f"{opened.name}: no feedback gives {kind}{reasons}; see everalign feedback stats")
    write_text(output, "".join(json_line(row.to_json()) for row in rows))
    if as_json:
        show_json({"output": str(output), "as": kind, "rows": len(rows), "left_out": dict(left)})
        return
    show_line("rows", len(rows))
    show_line("left", _with(left.total(), left))
    show_line("output", output)


def check_is_there(url: str) -> None:
    """Refuse a file that does not exist, which reading would make.

    Raises:
        InputError: there is no such file, or the address is none.
    """
    from everalign.serving.store.engine import parse_url, safe_url

    address = parse_url(url)
    if address.get_backend_name() == "sqlite" and not Path(str(address.database)).exists():
        raise InputError(f"{safe_url(address)}: no such store; everalign serve --store makes one")


def _with(total: int, parts: Mapping[str, int]) -> str:
    """A number and what it is made of."""
    listed = ", ".join(f"{count} {name}" for name, count in parts.items())
    return f"{total} ({listed})" if listed else str(total)
