"""The phases of a bench: tuning on validation rows, a rehearsal of the comparison on them, and one locked test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everalign.bench.answers import AnswersFile, KeptRewards, Said, Written, read_said
from everalign.bench.comparison import ModelResult, compare, to_json
from everalign.bench.contenders import Choice
from everalign.bench.data import Asked, Part, TaskRows, check_files, check_reward_model, choose_asked, load_rows
from everalign.bench.execution import Progress, Settings, run_all
from everalign.bench.locked import (
    ChosenFile,
    Trial,
    best_of,
    check_chosen,
    check_targets,
    data_facts,
    find_models,
    merged,
    read_chosen,
    touch,
    trial_of,
)
from everalign.bench.recipe import Bench, expanded
from everalign.bench.records import Record, Records, Run, code_digest, plan, plan_trials
from everalign.errors import EveralignError, InputError
from everalign.learning.run_store import now
from everalign.storage import exclusive, read_model, write_json

Log = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning came to: the chosen settings, and notes on them."""

    file: ChosenFile
    notes: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to, for every model, with what a reader should know of it, and the runs that failed.

    `judge` is the fingerprint of the reward model that has judged the answers; None without one.
    """

    part: Part
    models: Sequence[ModelResult]
    notes: Sequence[str]
    failed: Sequence[str]
    orders: Sequence[tuple[str, ...]]
    seeds: Sequence[int]
    judge: str | None = None


def tune(bench: Bench, settings: Settings, log: Log, progress: Progress) -> Tuned:
    """Makes the trials on validation rows and writes the best settings of every contender to chosen.json.

    Trials that an earlier call finished are taken as they are. Settings that contenders outside `only` got from the
    same recipe stay.
    """
    with exclusive(settings.output / ".lock", "making this bench"):
        models = check_bench(bench, settings)
        rows, records = _rows(bench, "validation", log), Records(settings.output)
        _asked(bench, rows, log)  # trials are asked nothing, but what is wrong is said before they are learned
        runs = plan_trials(bench, rows, settings.only, models)
        notes = [*bench.preset_notes(), *_checked(bench, records, runs)]
        log(f"tuning: {len(runs)} runs")
        run_all(runs, records, settings, log, progress)
        file, wrong = _choose(bench, settings, runs, records)
        file = file.model_copy(update={"data": data_facts(rows), "models": models})
        path = settings.output / "chosen.json"
        write_json(path, merged(path, file).model_dump())
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise bench.located(InputError(f"{wrong[0]}{more}; what the others chose is in {path}"))
        notes += _notes_on_trials(bench, file)
    return Tuned(read_model(path, ChosenFile), notes)


def _choose(
    bench: Bench, settings: Settings, runs: Sequence[Run], records: Records
) -> tuple[ChosenFile, list[InputError]]:
    """Returns what the trials' records choose, and an error for every contender that they choose nothing for."""
    chosen: dict[str, dict[str, Any]] = {model: {} for model in bench.models}
    trials: dict[str, dict[str, list[Trial]]] = {model: {} for model in bench.models}
    codes: dict[str, dict[str, list[str]]] = {model: {} for model in bench.models}
    for name, model, choice in bench.all_trials():
        if settings.only and name not in settings.only:
            continue
        mine = [run for run in runs if (run.contender, run.model, run.choice) == (name, model, choice)]
        found = [record for run in mine if (record := records.get(run)) is not None]
        trials[model].setdefault(name, []).append(trial_of(choice, found, bench.tune_on))
        codes[model][name] = sorted({*codes[model].get(name, []), *(record.code for record in found)})
    wrong = []
    for model, contenders in trials.items():
        for name, tried in contenders.items():
            try:
                chosen[model][name] = best_of(name, model, tried)
            except InputError as error:
                wrong.append(error)
    file = ChosenFile(
        format=1,
        recipe=bench.digest,
        created=now(),
        tune_on=bench.tune_on,
        chosen=chosen,
        trials=trials,
        codes=codes,
    )
    return file, wrong


def _checked(bench: Bench, records: Records, runs: Sequence[Run]) -> list[str]:
    """Refuses records of models that have changed; returns notes on those that do not say."""
    try:
        return records.check_models(runs)
    except InputError as error:
        raise bench.located(error) from None


def _notes_on_trials(bench: Bench, file: ChosenFile) -> list[str]:
    """Notes on chosen numbers beyond which there may be better ones, and on trials that failed."""
    found = []
    for model, contenders in file.trials.items():
        for name, tried in contenders.items():
            choice = file.chosen[model][name]
            for option, values in (bench.contenders[name].tune or {}).items():
                numbers = len(values) > 2 and all(isinstance(value, int | float) for value in values)
                if numbers and choice[option] in (min(values), max(values)):
                    found.append(f"{name} on {model}: {option} {choice[option]} lies at the end of what was tried")
            found += [f"{name} on {model}: {one.choice} failed: {one.failed}" for one in tried if one.failed]
    return found


def confirm(bench: Bench, settings: Settings, part: Part, log: Log, progress: Progress) -> Outcome:
    """Compares the contenders, each with its chosen settings, on validation or on test rows.

    Raises:
        InputError: tuning has not chosen yet, or for another recipe.
    """
    with exclusive(settings.output / ".lock", "making this bench"):
        models, path = check_bench(bench, settings), settings.output / "chosen.json"
        file = read_chosen(bench, path, settings.only)
        rows, records = _rows(bench, part, log), Records(settings.output)
        notes = bench.preset_notes()
        if file is not None:
            notes += check_chosen(path, file, rows, models, settings.only)
        chosen: Mapping[str, Mapping[str, Choice]]
        if file is not None:
            chosen = file.chosen
        else:  # nothing is tuned: every contender has one choice
            chosen = {model: {name: one.trials[0] for name, one in bench.contenders.items()} for model in bench.models}
        asked, unsure = _asked(bench, rows, log)
        runs = plan(bench, part, rows, chosen, settings.only, asked, models)
        notes += _checked(bench, records, runs)
        log(f"{part}: {len(runs)} runs")
        if part == "test":
            # Last, when nothing can be refused any more; and before a row is scored, for a test that is interrupted.
            notes += touch(bench, settings.output, bool(records.missing(runs)))
        run_all(runs, records, settings, log, progress)
        others = [name for name in bench.contenders if settings.only and name not in settings.only]
        known = [name for name in others if all(name in chosen[model] for model in bench.models)]
        if known:
            more = plan(bench, part, rows, chosen, known, asked, models)
            notes += _checked(bench, records, more)
            runs += more
        outcome = _outcome(bench, part, runs, records, settings, [*notes, *unsure], log)
        write_json(settings.output / f"{result_name(part, settings)}.json", outcome_json(bench, outcome))
    return outcome


def result_name(part: Part, settings: Settings) -> str:
    """What the files of a comparison are called."""
    return f"{part}.without-{'-'.join(settings.without)}" if settings.without else part


def _asked(bench: Bench, rows: Mapping[str, TaskRows], log: Log) -> tuple[dict[str, Asked], list[str]]:
    """What every model's final policies are asked, and notes on it."""
    try:
        asked, notes = choose_asked(bench, rows), check_reward_model(bench, rows)
    except InputError as error:
        raise bench.located(error) from None
    for model, one in asked.items():
        for task, count in one.too_long.items():
            if count:
                longest = one.max_prompt_tokens
                notes.append(f"{model}: {count} prompts of {task} have over {longest} tokens and are not answered")
        if one.chat_cut:
            rows_cut = f"{model}: {one.chat_cut} of {len(one.chat)} chat rows"
            notes.append(f"{rows_cut} have more tokens than max_length, or than the model reads, and are cut")
    for note in notes:
        log(f"  warning: {note}")
    return asked, notes


def _outcome(
    bench: Bench,
    part: Part,
    runs: Sequence[Run],
    records: Records,
    settings: Settings,
    notes: list[str],
    log: Log,
) -> Outcome:
    """Compares the finished runs of every model."""
    without, scorer = settings.without, _scorer(bench, settings, log)
    finished = [(run, record) for run in runs if (record := records.get(run)) is not None]
    failed = [f"{run.label}, {' > '.join(run.order)}: {one.failed}" for run, one in finished if one.failed is not None]
    models, judged = list[ModelResult](), list[Written]()
    for model in bench.models:
        found: dict[str, list[Record]] = {name: [] for name in bench.contenders}
        said: dict[str, list[Said]] = {name: [] for name in bench.contenders}
        for run, record in finished:
            if run.model == model and record.failed is None:
                found[run.contender].append(record.without(without) if without else record)
                if run.asked is not None and records.answers(run).exists():
                    file = read_model(records.answers(run), AnswersFile, "delete this file, and the run is made again")
                    said[run.contender].append(read_said(record, file, scorer, without))
                    judged += [one for task, ones in file.answers.items() if task not in without for one in ones]
        if not any(found.values()):
            raise EveralignError(f"no run on {model} has a result: {failed[0]}")
        models.append(compare(model, found, bench.baseline, said))
        notes += _limits(models[-1], [name for name, ones in found.items() if not ones])
    if scorer is not None:
        notes += scorer.cut_note([one.prompt for one in judged], [one.text for one in judged])
    budgets = bench.budgets
    if len(set(budgets.values())) > 1:
        notes.append(f"unequal trials: {', '.join(f'{name} {count}' for name, count in budgets.items())}")
    if without:
        notes.append(f"without {', '.join(without)}: learned, and left out of every number")
    if len(codes := sorted({record.code for _, record in finished})) > 1:
        notes.append(f"the runs were made by {len(codes)} versions of the code: {', '.join(codes)}")
    notes += [f"failed, and missing from every number: {text}" for text in failed]
    judge = None if scorer is None else scorer.fingerprint
    return Outcome(part, models, notes, failed, bench.task_orders(), bench.seeds, judge)


def _scorer(bench: Bench, settings: Settings, log: Log) -> KeptRewards | None:
    """The reward model that judges the answers, with the rewards that it has given already; None without one."""
    if bench.answers is None or bench.answers.reward_model is None:
        return None
    from everalign.evaluation.scorers import RewardModel

    folder = expanded(bench.answers.reward_model)
    log(f"rewards by {folder}")
    return KeptRewards(RewardModel.from_folder(folder), settings.output / "rewards.sqlite")


def _limits(result: ModelResult, absent: Sequence[str]) -> list[str]:
    """Notes on what a comparison on one model lacks."""
    found = [f"{result.model}: without {', '.join(absent)}, of which no run is finished"] if absent else []
    # Contenders share the option, but a model may have no room for it behind a method's learned prompts.
    lengths = {
        name: length
        for name, one in result.contenders.items()
        if (length := one.records[0].facts.get("settings", {}).get("max_length")) is not None
    }
    if len(set(lengths.values())) > 1:
        named = ", ".join(f"{name} {length}" for name, length in lengths.items())
        found.append(
            f"{result.model}: held-out pairs are not the same for all, but cut to max_length tokens, {named}: set it "
            f"to {min(lengths.values())} in the shared training"
        )
    # Runs that failed, of the baseline too, leave a contender with fewer pairs than others.
    paired: dict[int, list[str]] = {}
    others = [(name, one) for name, one in result.contenders.items() if name != result.baseline]
    for name, one in others if result.baseline is not None else []:
        paired.setdefault(one.paired, []).append(name)
    for runs, names in sorted(paired.items()):
        if 2 / 2**runs >= 0.05:
            who = "a contender" if len(names) == len(others) else f"of {', '.join(names)}"
            found.append(
                f"{result.model}: {runs} {'run' if runs == 1 else 'runs'} {who} to compare with the baseline's: no "
                f"test over runs gives p below {min(1.0, 2 / 2**runs):g}"
            )
    return found


def outcome_json(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "part": outcome.part,
        "recipe": bench.digest,
        "code": code_digest(),
        "created": now(),
        "orders": [list(order) for order in outcome.orders],
        "seeds": list(outcome.seeds),
        "notes": list(outcome.notes),
        "reward_model": outcome.judge,
        "models": [to_json(result) for result in outcome.models],
    }


def check_bench(bench: Bench, settings: Settings) -> dict[str, str | None]:
    """Refuses what is wrong before anything is learned: contenders, their options, files. Returns models' contents."""
    for flag, names, known in (
        ("--only", settings.only, bench.contenders),
        ("--without", settings.without, bench.tasks),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"{flag} {name}: the recipe has no such name, but {', '.join(known)}", field=flag)
    if len(set(settings.without)) == len(bench.tasks):
        raise InputError("--without leaves no task to compare", field="--without")
    try:
        bench.check_contenders()
        check_files(bench)
        found = find_models(bench)
        check_targets(bench)
        return found
    except InputError as error:
        raise bench.located(error) from None


def _rows(bench: Bench, part: Part, log: Log) -> dict[str, TaskRows]:
    log("data")
    rows = load_rows(bench, part, lambda line: log(f"  {line}"))
    for name, found in rows.items():
        scored = "".join(f", {len(others)} scored rows ({key})" for key, others in found.scored.items())
        log(f"  {name}: {len(found.train)} rows to learn{scored}, {len(found.held_out)} of the {part} part")
    return rows
