"""Load training rows from a file, the Hugging Face Hub or memory; an error names file, line and field.

Every `load_*` function takes the same arguments, explained at `load_preferences`. Those without `columns` take a source
with columns of other names as `renamed(source, columns)`.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from everalign.data.file_formats import WHOLE, Part, Renamed, raw_rows, source_name
from everalign.data.messages import PROMPT_COLUMNS, checked_answer, checked_prompt, prompt_of
from everalign.data.records import (
    CORRECTION_SCHEMA,
    LABELLED_SCHEMA,
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    SCORED_SCHEMA,
    Correction,
    CorrectionSet,
    Preference,
    PreferenceSet,
    Scored,
    ScoredSet,
    checked_completions,
    correction_of,
)
from everalign.data.rows import Row, RowSet, Schema, check_text, field_error, kind
from everalign.errors import InputError, located

Set = TypeVar("Set", bound=RowSet[Any])
Source = str | os.PathLike[str] | Renamed | Sequence[Any] | Any
"""A path, a name on the Hub, a list of dictionaries, a pandas DataFrame, or a `datasets.Dataset`."""


def check_columns(columns: Mapping[str, str]) -> Mapping[str, str]:
    """Returns a source's names of columns, by the names that are read here.

    Raises:
        InputError: no reader reads a column of that name, or two are to come from one.
    """
    for name in columns:
        if name not in _COLUMNS:
            near = difflib.get_close_matches(name, _COLUMNS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_COLUMNS)}"
            raise InputError(f"columns: no column {name!r} is read: {hint}", field="columns", hint=hint)
    if len(set(columns.values())) < len(columns):
        raise InputError("columns: one column of the source is given for two columns", field="columns")
    return columns


def _in_source(error: InputError, source: Any) -> InputError:
    """Returns an error on a row that also says what the source calls the column."""
    columns = source.columns if isinstance(source, Renamed) else {}
    theirs = columns.get((error.field or "").partition("[")[0])
    if theirs is None:
        return error
    ours = f"field {error.field!r}"
    message = str(error).replace(ours, f"{ours} (column {theirs!r})", 1)
    return InputError(message, where=error.where, field=error.field, hint=error.hint)


def parse_columns(text: str) -> dict[str, str]:
    """Returns the columns of a text such as `prompt=question,chosen=better`."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and theirs.strip() for name, _, theirs in pairs):
        raise InputError(f"columns: must be NAME=COLUMN,... such as prompt=question, found {text!r}", field="columns")
    columns = {name.strip(): theirs.strip() for name, _, theirs in pairs}
    if len(columns) < len(pairs):
        raise InputError(f"columns: a column is given twice in {text!r}", field="columns")
    return columns


def renamed(source: Source, columns: Mapping[str, str] | None) -> Source:
    """Returns a source whose columns have the names that are read here; errors as in `check_columns`."""
    return Renamed(source, dict(check_columns(columns))) if columns else source


@dataclass(frozen=True)
class RowReader:
    """How rows of one kind are read from raw ones. Made of functions of modules, it can be sent to other processes.

    Args:
        schema: the columns.
        read: makes one row or more of a raw one, given with its place; an InputError says that it is bad.
        refuse: raises an InputError for a row that must not be skipped either.
    """

    schema: Schema
    read: Callable[[object, str], Iterable[Row]]
    refuse: Callable[[object, str], None] | None = None

    def rows(
        self,
        source: Source,
        split: str = "train",
        part: Part = WHOLE,
        skipped: Callable[[str], None] | None = None,
        ignored: dict[str, None] | None = None,
    ) -> Iterator[Any]:
        """Yields rows one after the other.

        Args:
            source: a file, or a name on the Hub.
            split: split of a Hub dataset.
            part: the part of the file to read.
            skipped: called with a message for each bad row; None stops at the first.
            ignored: gets the names of columns that are not read.
        """
        for where, value in raw_rows(source, split, self.schema, part):
            if ignored is not None and isinstance(value, Mapping):
                ignored |= dict.fromkeys(str(name) for name in value if name not in self.schema.columns)
            try:
                if isinstance(value, InputError):
                    raise value
                rows = self.read(value, where)
            except InputError as found:
                error = _in_source(found, source)
                if skipped is None:
                    raise error from found.__cause__
                skipped(str(error))
                continue
            if self.refuse is not None:
                self.refuse(value, where)
            yield from rows


def load_preferences(
    source: Source,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> PreferenceSet:
    """Loads preferences: rows of `prompt`, `chosen` and `rejected`, and optionally `weight`.

        load_preferences("pairs.csv", columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
        load_preferences([{"prompt": "Is the sea salty?", "chosen": "Yes.", "rejected": "No."}])

    Args:
        source: a path that ends in .json (one list), .jsonl, .json.gz, .jsonl.gz, .csv, .tsv or .parquet; if there is
            no such file, a name on the Hugging Face Hub; or a list of dictionaries, a pandas DataFrame or a
            `datasets.Dataset`.
        split: split of a dataset on the Hub; other sources have none.
        skip_bad_rows: skip bad rows and keep one message for each in `.skipped`, instead of stopping at the first.
        label: column of the rows' labels, texts or whole numbers, one in every row; none are read when None.
        columns: the source's names of columns that are called otherwise there, by their names here:
            `{"prompt": "question"}`.

    Raises:
        InputError: the source cannot be read, holds no usable row, or a row is bad; names the file, the line and the
            field.
    """
    return _load(PreferenceSet, PREFERENCE_SCHEMA, renamed(source, columns), split, skip_bad_rows, label=label)


def load_scored(
    source: Source,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> ScoredSet:
    """Loads rows of `prompt`, `completions` and `rewards`."""
    return _load(ScoredSet, SCORED_SCHEMA, renamed(source, columns), split, skip_bad_rows, label=label)


def load_prompts(
    source: Source,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> ScoredSet:
    """Loads the prompts of a file alone, whose answers are to be sampled."""
    return _load(ScoredSet, PROMPT_SCHEMA, renamed(source, columns), split, skip_bad_rows, label=label)


def load_corrections(
    source: Source,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> CorrectionSet:
    """Loads rows of `question`, `answer` and `correction`."""
    return _load(CorrectionSet, CORRECTION_SCHEMA, renamed(source, columns), split, skip_bad_rows, label=label)


def load_answers(source: Source, *, split: str = "train", skip_bad_rows: bool = False) -> CorrectionSet:
    """Loads answers for the evaluation of a corrector, with `correction`, `good` and `kind` where known."""
    return _load(CorrectionSet, LABELLED_SCHEMA, source, split, skip_bad_rows)


def load_judged(
    source: Source, *, split: str = "train", skip_bad_rows: bool = False, label: str | None = None
) -> ScoredSet | PreferenceSet:
    """Loads scored rows, or preferences if the first row has `chosen` or `rejected` and no `completions`.

    All rows must be of one kind.
    """
    first = first_columns(source, split, ("completions", "chosen", "rejected"))
    load = load_preferences if first and "completions" not in first else load_scored
    return load(source, split=split, skip_bad_rows=skip_bad_rows, label=label)


def load_edits(source: Source, *, split: str = "train", skip_bad_rows: bool = False) -> CorrectionSet | PreferenceSet:
    """Loads corrections, or preferences if the first row has `chosen` or `rejected` and no `correction`.

    All rows must be of one kind. `CorrectionSet.of_preferences` converts the one into the other.
    """
    first = first_columns(source, split, ("correction", "chosen", "rejected"))
    load = load_preferences if first and "correction" not in first else load_corrections
    return load(source, split=split, skip_bad_rows=skip_bad_rows)


UNSCORED_SCHEMA = Schema(
    columns=("prompt", "completions", "chosen", "rejected", "rewards", "weight", *PROMPT_COLUMNS),
    required=(),
    expected="expected 'prompt' and 'completions', or 'prompt', 'chosen' and 'rejected'",
)
_UNREWARDED = replace(UNSCORED_SCHEMA, columns=("prompt", "completions", "weight"), required=("completions", "prompt"))


def load_unscored(
    source: Source,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    label: str | None = None,
) -> ScoredSet:
    """Loads answers to be scored: `completions`, or the `chosen` and `rejected` answers of preferences.

    Args:
        source: a file, or a name on the Hub.
        split: split of a Hub dataset.
        skip_bad_rows: skip bad rows and keep one message for each in `.skipped`.
        overwrite: drop rewards that rows have already.
        label: column of the rows' labels.

    Raises:
        InputError: also if a row has rewards and `overwrite` is not set; names the first such row.
    """
    return _load(
        ScoredSet, UNSCORED_SCHEMA, source, split, skip_bad_rows, label=label, reader=unscored_reader(overwrite)
    )


def unscored_reader(overwrite: bool) -> RowReader:
    """Returns what `load_unscored` reads rows with."""
    if overwrite:
        return RowReader(UNSCORED_SCHEMA, _read_unscored)
    return RowReader(UNSCORED_SCHEMA, _read_unscored, _refuse_rewards)


def _read_unscored(obj: object, where: str) -> tuple[Scored]:
    with located(where):
        row = UNSCORED_SCHEMA.checked_row(obj)
        # A table may have the columns of both kinds, those of the other kind null.
        pair = [name for name in ("chosen", "rejected") if row.get(name) is not None]
        if pair and row.get("completions") is not None:
            problem = f"the row has {pair[0]!r} too, which is a completion itself"
            raise field_error("completions", problem, "keep one")
    if pair:
        return (Scored.from_preference(Preference.from_json(obj, where), rewards=None),)
    return (Scored.from_json(obj, where, _UNREWARDED),)


def _refuse_rewards(obj: object, where: str) -> None:
    if isinstance(obj, Mapping) and obj.get("rewards") is not None:
        problem = "the row has rewards already"
        hint = "ask for --overwrite to score all rows anew, or remove the column"
        raise field_error("rewards", problem, hint).at(where)


_UNCORRECTED_SCHEMA = Schema(
    columns=("question", "answer", "prompt", "completion", *PROMPT_COLUMNS),
    required=(),
    expected="expected 'question' and 'answer', or 'prompt' and 'completion'",
)


def load_uncorrected(source: Source, *, split: str = "train", skip_bad_rows: bool = False) -> CorrectionSet:
    """Loads answers to be corrected: `question` and `answer`, or `prompt` and `completion`."""
    return _load(CorrectionSet, _UNCORRECTED_SCHEMA, source, split, skip_bad_rows, reader=UNCORRECTED)


def _read_uncorrected(obj: object, where: str) -> tuple[Correction]:
    with located(where):
        row = _UNCORRECTED_SCHEMA.checked_row(obj)
        given = {name for name in _UNCORRECTED_SCHEMA.columns[:4] if row.get(name) is not None}
        names = ("prompt", "completion") if given & {"prompt", "completion"} else ("question", "answer")
        if others := sorted(given - set(names)):
            raise field_error(others[0], f"the row has {names[0]!r} or {names[1]!r} too", "keep one pair")
        replace(_UNCORRECTED_SCHEMA, required=names).check_columns(row.keys())
        found = Correction(prompt_of(row, row[names[0]], names[0]), row[names[1]])
        if not found.has("answer"):
            raise found.lacks("answer")
        return (found,)


UNCORRECTED = RowReader(_UNCORRECTED_SCHEMA, _read_uncorrected)
"""What `load_uncorrected` reads rows with."""


_DRAFT_SCHEMA = Schema(
    columns=(
        "question", "prompt", "answer", "chosen", "rejected", "completions", "correction", "edited_text", "rewards",
        "weight", "id", *PROMPT_COLUMNS,
    ),
    required=(),
    expected="expected 'question' or 'prompt', alone or with 'answer' (and 'correction' or 'edited_text'), "
    "'chosen' and 'rejected', or 'completions' (and 'rewards')",
)  # fmt: skip


# What any reader reads, for columns that have other names.
_COLUMNS = tuple(
    dict.fromkeys(
        name
        for schema in (PREFERENCE_SCHEMA, SCORED_SCHEMA, LABELLED_SCHEMA, _UNCORRECTED_SCHEMA, _DRAFT_SCHEMA)
        for name in schema.columns
    )
)


def load_drafts(source: Source, *, split: str = "train", skip_bad_rows: bool = False) -> CorrectionSet:
    """Loads questions with whatever is known of their answers, as a start for correction data.

    A row has a question alone, an answer with or without its edit, a preference, or completions with or without
    rewards. It gives one `Correction` for each answer: a preference's rejected answer with the chosen one as its
    correction; each completion, the worst with the best as its correction.
    """
    reader = RowReader(_DRAFT_SCHEMA, read_draft)
    return _load(CorrectionSet, _DRAFT_SCHEMA, source, split, skip_bad_rows, reader=reader)


def load_questions(source: Source, *, split: str = "train", skip_bad_rows: bool = False) -> ScoredSet:
    """Loads the questions of a file that `load_drafts` reads as prompts: one a row, whatever answers it has."""

    def read(obj: object, where: str) -> tuple[Scored]:
        first = read_draft(obj, where)[0]
        return (Scored(first.question, weight=first.weight),)

    return _load(ScoredSet, _DRAFT_SCHEMA, source, split, skip_bad_rows, reader=RowReader(_DRAFT_SCHEMA, read))


def read_draft(obj: object, where: str) -> tuple[Correction, ...]:
    """Reads a row of `load_drafts`; at least one correction."""
    with located(where):
        row = _DRAFT_SCHEMA.checked_row(obj)
        found = [name for name in ("answer", "chosen", "rejected", "completions") if row.get(name) is not None]
        kinds = list(dict.fromkeys("chosen" if name == "rejected" else name for name in found))
        if len(kinds) > 1:
            problem = f"the row has {found[-1]!r} too, which is another kind of answer"
            raise field_error(found[0], problem, "keep one")
        name = row.get("id")
        if name is not None:
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise field_error("id", f"must be text or a whole number, found {kind(name)}")
            name = str(name)
        question = _one_of(row, "question", "prompt")
        if kinds == ["chosen"]:
            asked = {} if question is None else {"prompt": question}
            pair = Preference.from_json({**row, **asked}, "as a preference")
            return (replace(correction_of(pair), name=name, place=where),)
        if question is None:
            raise _DRAFT_SCHEMA.missing_column("question", row.keys())
        question = checked_prompt(prompt_of(row, question, "question"), "question", "answer")
        weight = 1.0 if row.get("weight") is None else row["weight"]
        if kinds != ["completions"]:
            answer: Any = row.get("answer")
            edit: Any = _one_of(row, "correction", "edited_text")
            return (Correction(question, answer, edit, weight, name=name, place=where),)
        rewards: Any = row.get("rewards")
        scored = Scored(question, checked_completions(row["completions"]), rewards, weight)
        texts = [checked_answer(text, f"completions[{i}]") for i, text in enumerate(scored.completions)]
        rows = [Correction(question, text, weight=weight, name=name, place=where) for text in texts]
        best_over_worst = scored.preference()
        if best_over_worst is not None:
            worst = texts.index(checked_answer(best_over_worst.rejected, "rejected"))
            rows[worst] = replace(rows[worst], correction=checked_answer(best_over_worst.chosen, "chosen"))
        return tuple(rows)


def _one_of(row: Mapping[Any, Any], first: str, second: str) -> Any:
    """Returns the one of two names of a column that the row has, None if it has neither."""
    if row.get(first) is not None and row.get(second) is not None:
        raise field_error(first, f"the row has {second!r} too, which is another name of it", "keep one")
    return row.get(second) if row.get(first) is None else row[first]


def with_label(schema: Schema, column: str) -> Schema:
    """Returns a schema with a column of labels that every row must have.

    Raises:
        InputError: the column is read for something else.
    """
    if column in schema.columns:
        raise InputError(f"label: {column!r} is read as a part of every row: name a column that holds labels")
    return replace(schema, columns=(*schema.columns, column), required=(*schema.required, column))


def label_of(row: Any, column: str, where: str, schema: Schema) -> str:
    """Returns a raw row's label, without white space at its ends.

    Raises:
        InputError: the row has no such column, or it holds neither text nor a whole number; names the row.
    """
    with located(where):
        schema.checked_row(row)
        value = row.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        check_text(value, column)
        return str(value).strip()


def first_columns(source: Source, split: str, columns: tuple[str, ...]) -> set[str]:
    """Returns which of `columns` the first readable row has, to tell what kind of rows a file holds."""
    schema = Schema(("prompt", *columns), required=(), expected=f"expected some of {', '.join(columns)}", lists=())
    rows = (value for _, value in raw_rows(source, split, schema) if isinstance(value, Mapping))
    first = next(rows, {})
    return {name for name in columns if first.get(name) is not None}


def check_learnable(train: RowSet[Any], test: RowSet[Any] | None, allow_overlap: bool) -> None:
    """Refuses sets without rows, and a test set that shares rows with the training set unless that is allowed."""
    for rows in (train, *([] if test is None else [test])):
        if not rows:
            raise InputError(f"{rows.source}: no rows in it")
    check_disjoint(train, test or (), allow=allow_overlap)


def check_disjoint(train: Iterable[Row], test: Iterable[Row], allow: bool = False) -> tuple[str, ...]:
    """Refuses a test set that shares rows, of the same prompt and answers, with the training set.

    A scored row equals a preference, or another scored row, if its best and worst completions do.

    Returns:
        The shared ids in the order of the test set; empty unless `allow` is set.
    """
    seen = {key for row in train for key in row.dedup_keys}
    shared = tuple(dict.fromkeys(row.id for row in test if not seen.isdisjoint(row.dedup_keys)))
    if shared and not allow:
        names = " and ".join(rows.source for rows in (train, test) if isinstance(rows, RowSet))
        first = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise InputError(
            f"{names or 'train and test'}: {len(shared)} rows are in both the training and the test set "
            f"(ids {first}); remove them from one, or allow the overlap explicitly"
        )
    return shared


def _load(
    kind: type[Set],
    schema: Schema,
    source: Source,
    split: str,
    skip_bad_rows: bool,
    *,
    label: str | None = None,
    reader: RowReader | None = None,
) -> Set:
    """Reads all rows of a source; by `kind.record.from_json` where no reader is given."""
    if label is not None:
        schema = with_label(schema, label)
    given = reader or RowReader(schema, lambda value, where: (kind.record.from_json(value, where, schema),))

    def read(value: object, where: str) -> Iterable[Row]:
        if isinstance(value, kind.record):
            return (value,)
        rows: Iterable[Any] = given.read(value, where)
        if label is None:
            return rows
        named = label_of(value, label, where, schema)
        return [replace(row, label=named) for row in rows]

    skipped: list[str] = []
    ignored: dict[str, None] = {}
    found = RowReader(schema, read, given.refuse)
    items = tuple(found.rows(source, split, skipped=skipped.append if skip_bad_rows else None, ignored=ignored))
    name = source_name(source)
    if not items:
        raise no_rows(name, skipped)
    columns = source.columns if isinstance(source, Renamed) else {}
    return kind(items, name, tuple(skipped), tuple(ignored), columns)


def no_rows(name: str, skipped: Sequence[str]) -> InputError:
    """Returns the error for a source without usable rows, of which `skipped` have been skipped."""
    found = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "no rows in it"
    return InputError(f"{name}: {found}", where=name)
