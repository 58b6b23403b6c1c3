"""A task's rows on their way to training: checked against the objective, weighted and tokenised."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from everalign.correction.tokenization import encode_learned, learned_corrections
from everalign.data.records import (
    Correction,
    CorrectionSet,
    Preference,
    PreferenceSet,
    Scored,
    ScoredSet,
)
from everalign.data.rows import RowSet
from everalign.data.tokenization import (
    Fitting,
    TargetGroup,
    TokenizedGroups,
    TokenizedPairs,
    distinct,
    fitting,
    tokenize_groups,
    tokenize_pairs,
    tokenize_targets,
)
from everalign.errors import InputError, check_shortfall
from everalign.learning.context import RunContext
from everalign.learning.rollouts import check_lengths, score
from everalign.storage import exclusive
from everalign.training.objectives import SCORED_OBJECTIVES
from everalign.training.reference import policy_key
from everalign.training.reward_weights import TAKE_ONE_COMPLETION, check_comparable, check_completions, weigh

Rows = Sequence[Preference] | Sequence[Scored] | Sequence[Correction]
AnySet = RowSet[Any]

_SETS: tuple[type[AnySet], ...] = (ScoredSet, CorrectionSet)


def as_set(rows: Rows) -> AnySet:
    """Return rows as a set of their kind."""
    if isinstance(rows, RowSet):
        return rows
    kind = next((kind for kind in _SETS if any(isinstance(row, kind.record) for row in rows[:1])), PreferenceSet)
    return kind.of(rows)  # type: ignore[arg-type]  # told by the first


def as_tests(rows: Rows, corrections: bool, log: Callable[[str], None]) -> AnySet:
    """Return held-out rows as what they are judged as: preferences, or corrections that change anything.

    Of a scored row, the best completion over the worst is a preference.

    Args:
        rows: the rows.
        corrections: whether they are judged as corrections.
        log: is told how many rows have nothing better and worse in them and are left out.

    Raises:
        InputError: corrections are wanted, and the rows are none.
    """
    found = as_set(rows)
    if corrections and not isinstance(found, CorrectionSet):
        raise InputError(f"{found.source}: held-out rows of a corrector must be corrections (question, answer, ...)")
    if isinstance(found, PreferenceSet):
        return found
    found.require("correction" if isinstance(found, CorrectionSet) else "rewards")
    kept = [(row, pair) for row in found if (pair := row.preference()) is not None]
    if len(kept) < len(found):
        left = f"{len(found) - len(kept)} of {len(found)} held-out rows"
        what = "change nothing" if isinstance(found, CorrectionSet) else "have no better and worse completion"
        log(f"  {found.source}: {left} {what} and are left out")
    if corrections:
        return CorrectionSet(tuple(row for row, _ in kept), found.source, found.skipped)
    return PreferenceSet.of([pair for _, pair in kept], found.source)


@dataclass(frozen=True)
class TaskRows:
    """A task's rows as they were given and as they will be learned.

    Attributes:
        given: as the user gave them.
        rows: those that are learned, with the weights of their completions if they are scored. Preferences are too,
            as rows of two completions, where the objective learns from scored rows.
        facts: what was done to get them, for the manifest; None where nothing was.
        lines: what is to be announced of it.
        warnings: what of it costs much of what was given.
    """

    given: RowSet[Any]
    rows: RowSet[Any]
    facts: dict[str, Any] | None = None
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def prompts(self) -> bool:
        """Whether the rows are prompts alone, whose answers are sampled when it is their turn."""
        return self.rows.prompts_alone


def prepare_rows(setup: RunContext, rows: RowSet[Any]) -> TaskRows:
    """Make a task's rows ready; nothing is done to preferences that are learned as such.

    Answers without rewards get them here; prompts alone are left to be sampled.

    Raises:
        InputError: the objective does not learn from this kind of rows, there are no rewards or weights for them, or
            most of them are lost on the way (see `everalign.errors`).
        EveralignError: scoring failed.
    """
    prepared = _prepared(setup, rows)
    for warning in prepared.warnings:
        setup.log(f"  warning: {rows.source}: {warning}")
    return replace(prepared, lines=(*setup.notes(rows), *prepared.lines))


def _prepared(setup: RunContext, rows: RowSet[Any]) -> TaskRows:
    name = setup.objective.name
    if setup.encoder is not None or isinstance(rows, CorrectionSet):
        return _corrections(setup, rows)
    if isinstance(rows, ScoredSet) and rows.prompts_alone and setup.scorer is not None:
        _check_sampling(setup)
        check_lengths(setup, rows)
        return TaskRows(rows, rows)
    scored = _rewarded(setup, rows)
    learnable = scored.has("rewards") if name in SCORED_OBJECTIVES else _pairs(scored)
    if not learnable and not (name == "snkl" and _pairs(scored)):
        wanted = "preferences (prompt, chosen, rejected)"
        if name in SCORED_OBJECTIVES:
            wanted = "scored rows (prompt, completions, rewards), or, given reward, from answers and from prompts alone"
        raise InputError(f"{rows.source}: the objective {name} learns from {wanted}")
    return replace(weigh_rows(setup, scored), given=rows) if name in SCORED_OBJECTIVES else _preferences(setup, rows)


def _preferences(setup: RunContext, rows: RowSet[Any]) -> TaskRows:
    """Look at the tokens before anything is trained, the first task's as the last one's."""
    try:
        return TaskRows(rows, rows, warnings=setup.encode(rows).warnings())
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error


def _corrections(setup: RunContext, rows: RowSet[Any]) -> TaskRows:
    if setup.encoder is None or not isinstance(rows, CorrectionSet):
        wanted = (
            "other rows than corrections" if setup.encoder is None else "corrections (question, answer, correction)"
        )
        raise InputError(f"{rows.source}: the objective {setup.objective.name} learns from {wanted}")
    try:
        learned, lines, warnings = learned_corrections(
            rows, setup.encoder, setup.options.max_length, setup.correction.identity, setup.seed
        )
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error
    return TaskRows(rows, learned, lines=lines, warnings=warnings)


def _pairs(rows: RowSet[Any]) -> bool:
    return rows.record is Preference


def _check_sampling(setup: RunContext) -> None:
    estimator = setup.weighting.estimator
    if estimator not in ("group", "group_loo", "in_batch"):
        raise InputError(f"the estimator {estimator} is not for sampled answers: use group, group_loo or in_batch")
    if setup.rollouts.samples < fewest_answers(setup):
        raise InputError(f"one sample a prompt has nothing to be compared to with {estimator}: raise samples")
    longest, room = setup.rollouts.max_new_tokens, setup.options.max_length
    if longest >= room:
        limits = f"max_new_tokens is {longest} and max_length {room}"
        raise InputError(f"{limits}, which leaves no room for a prompt: raise max_length")


def fewest_answers(setup: RunContext) -> int:
    """Return how many answers a sampled prompt needs to be learned from."""
    return 1 if setup.objective.name == "var" and setup.weighting.estimator in TAKE_ONE_COMPLETION else 2


def _rewarded(setup: RunContext, rows: RowSet[Any]) -> RowSet[Any]:
    """Return rows with the rewards that the run's scorer gives them, if it has one and they have none."""
    if setup.scorer is None or any(row.has("rewards") for row in rows):
        return rows
    answers = [row if isinstance(row, Scored) else Scored.from_preference(row, rewards=None) for row in rows]
    unscored = ScoredSet(tuple(answers), rows.source).require("completions")
    key = hashlib.sha256(f"{setup.scorer.fingerprint} {unscored.fingerprint}".encode()).hexdigest()
    setup.log(f"scoring {rows.source}")
    path = setup.folder / f"{key[:32]}.scored.jsonl"

    def waiting(holder: str) -> None:
        setup.log(f"  {holder} is scoring the same answers: waiting for it")

    # Runs may share the folder: the second finds the file of the first, and asks for nothing again.
    with exclusive(path.with_suffix(".lock"), wait=waiting):
        return replace(score(setup, unscored, path), source=rows.source)


def weigh_rows(setup: RunContext, rows: RowSet[Any], scale: float | None = None) -> TaskRows:
    """Give every completion its weight; `scale` as in `weigh`, all else as in `prepare_rows`."""
    try:
        return _weigh(setup, rows, scale)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error


def encode_rows(setup: RunContext, rows: Sequence[Any], replayed: Sequence[Any]) -> TokenizedPairs | TokenizedGroups:
    """Return a task's prepared rows and the replayed ones behind them as tokens, cut to the options' length."""
    if setup.encoder is not None:
        return encode_learned([*rows, *replayed], setup.encoder, setup.options.max_length)
    if setup.objective.name in SCORED_OBJECTIVES:
        encode = tokenize_targets if setup.objective.name == "snkl" else tokenize_groups
        return encode([*rows, *replayed], setup.tokenizer, setup.options.max_length)
    # Apart: that all of a task's pairs are alike is an error, and that all replayed ones are is not.
    pairs = setup.encode(rows)
    old = tokenize_pairs(replayed, setup.tokenizer, setup.options.max_length, allow_identical=True)
    return pairs.followed_by(old)


def _weigh(setup: RunContext, rows: RowSet[Any], scale: float | None) -> TaskRows:
    judged = [row if isinstance(row, Scored) else Scored.from_preference(row) for row in rows]
    fit, merged = _usable(setup, judged)
    # Of rows with weights no probabilities are wanted.
    listed = merged is not None and all(row.weights is None for row in fit.rows)
    reference = _base_log_probs(setup, fit.rows) if listed else None
    weighed = weigh(fit.rows, fit.lengths, setup.weighting, reference, scale)
    lines, facts = _losses(fit, judged, merged)
    snkl = setup.objective.name == "snkl"
    lines.append(f"  {'targets' if snkl else 'weights'}: {weighed.one_line()}")
    lines += [f"  warning: {warning}" for warning in weighed.statistics.warnings(can_cap=not snkl)]
    learned = ScoredSet(weighed.rows, rows.source, rows.skipped)
    remedy = f"raise --max-length (max_length), {setup.options.max_length} now"
    total = sum(len(row.completions) for row in judged)
    warnings = (
        *check_shortfall(fit.dropped_rows, len(judged), "rows are too long and left out", remedy),
        *check_shortfall(fit.dropped_completions, total, "completions are too long and left out", remedy),
    )
    return TaskRows(rows, learned, {**facts, **weighed.to_dict()}, tuple(lines), warnings)


def _usable(setup: RunContext, rows: Sequence[Scored]) -> tuple[Fitting, int | None]:
    """Return the rows that can be learned from, and how many completions were merged (None where none should be)."""
    options, snkl = setup.weighting, setup.objective.name == "snkl"
    given, merged = any(row.weights is not None for row in rows), None
    if options.estimator == "support" and not given:
        before = sum(len(row.completions) for row in rows)
        rows = distinct(rows, setup.tokenizer)
        merged = before - sum(len(row.completions) for row in rows)
    if snkl:
        check_comparable(rows)
    check_completions(rows, options)
    takes_one = not snkl and (given or options.estimator in TAKE_ONE_COMPLETION)
    fit = fitting(rows, setup.tokenizer, setup.options.max_length, fewest=1 if takes_one else 2)
    if not fit.rows:
        raise InputError(f"no row has completions that fit max_length {setup.options.max_length}: raise it")
    return fit, merged


def _losses(fit: Fitting, rows: Sequence[Scored], merged: int | None) -> tuple[list[str], dict[str, Any]]:
    """Say what of the rows is not learned, for the log and for the manifest."""
    lines, facts = [], {"dropped_completions": fit.dropped_completions, "dropped_rows": fit.dropped_rows}
    total = sum(len(row.completions) for row in rows)
    if merged is not None:
        facts["merged_completions"] = merged
    if merged:
        lines.append(f"  {merged} of {total} completions are listed before with the same reward and left out")
    if fit.dropped_completions:
        lines.append(
            f"  {fit.dropped_completions} of {total} completions are longer than max_length allows and left out, and "
            f"{fit.dropped_rows} of {len(rows)} rows with them"
        )
    return lines, facts


def _base_log_probs(setup: RunContext, rows: Sequence[Scored]) -> list[Tensor]:
    """Log-probabilities of each row's completions under the base model, whatever was learned by now."""
    alike = [replace(row, weights=(1.0,) * len(row.completions)) for row in rows]
    groups = tokenize_targets(alike, setup.tokenizer, setup.options.max_length)
    compared = [group for group in groups if isinstance(group, TargetGroup)]
    with setup.policy.as_base():
        return setup.cache.group_log_probs(
            setup.policy, policy_key(setup.model_key, {}), compared, setup.options.tokens_per_batch
        )
