"""A bench's results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from everalign.bench.answers import MEASURES, WINS, Number
from everalign.bench.comparison import Contest, ModelResult, compared
from everalign.bench.phases import Outcome, Tuned
from everalign.bench.records import PAIR_METRICS
from everalign.evaluation.statistics import stars
from everalign.reporting.formats import (
    ANSWER_METRICS,
    METRICS,
    SUMMARY_TITLES,
    UNMEASURED,
    Metric,
    elided,
    fixed,
    significant,
)

NUMBER_TITLES = {**SUMMARY_TITLES, "worst": "Worst"}


def choice_text(choice: object) -> str:
    """Values of options in one line."""
    if not isinstance(choice, dict) or not choice:
        return UNMEASURED
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {elided(str(value), 40)}"
        for name, value in choice.items()
    )


def number_text(metric: Metric, name: str, number: Number) -> str:
    """A mean with half its 95 % interval, or with its standard deviation over the runs."""
    show = metric.change if name.endswith("transfer") else metric.value
    if number.mean is None:
        return UNMEASURED
    if number.low is not None and number.high is not None:
        return f"{show(number.mean)} ± {metric.value((number.high - number.low) / 2)}"
    return show(number.mean)


def difference_text(metric: Metric, number: Number) -> str:
    """A difference to the baseline with its 95 % interval and its mark."""
    if number.difference is None:
        return UNMEASURED
    value, low, high = map(metric.change, number.difference)
    return f"{value} [{low}, {high}]{stars(number.p_holm)}"


_ABOUT_NUMBERS = (
    "Last: mean over the tasks, after the last one. BWT: mean change of earlier tasks since each was learned; below "
    "zero is forgetting. AP: mean, over time, of the mean over the tasks learned by then. FWT: mean gain over the base "
    "model on a task just before it is learned. Worst: the lowest task at the end, mean over the runs."
)


def _table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """A table of contenders. Where the terminal is too narrow, cells take several lines: nothing is cut."""
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("contender", style="bold", no_wrap=True, overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="left" if name == "settings" else "right", overflow="fold")
    return table


def metric_table(result: ModelResult, metric: Metric) -> Table:
    """One metric of all contenders: its numbers, and the differences to the baseline."""
    about = (
        f"{metric.title}, {metric.unit.strip()}, mean over runs"
        f"{' ± half its 95 % interval over runs and pairs' if metric.key in PAIR_METRICS else ''}. {metric.meaning}"
    )
    differences = compared(result, metric.key)
    if differences:
        about += (
            f" Δ: difference to {result.baseline} in {metric.change_unit}, with its interval; * p < 0.05, ** 0.01, "
            "*** 0.001 by changing signs over runs, after Holm."
        )
    columns = ("runs", *NUMBER_TITLES.values(), *(f"Δ {NUMBER_TITLES[key]}" for key in differences))
    table = _table(f"{metric.title} on {result.model}", about, columns)
    empty = [UNMEASURED] * (len(NUMBER_TITLES) - 1 + len(differences))
    table.add_row("base model", "", metric.value(result.zero_shot[metric.key]), *empty)
    for name, one in result.contenders.items():
        numbers = one.numbers[metric.key]
        cells = [number_text(metric, number, numbers[number]) for number in NUMBER_TITLES]
        moved = [difference_text(metric, numbers[key]) for key in differences]
        table.add_row(Text(name), str(one.runs), *cells, *moved)
    return table


def task_table(result: ModelResult, metric: Metric) -> Table:
    """One metric of all contenders on each task at the end."""
    zero = result.zero_shot_tasks[metric.key]
    about = f"{metric.title}, {metric.unit.strip()}, after the last task, mean over runs."
    table = _table(f"{metric.title} by task on {result.model}", about, list(zero))
    table.add_row("base model", *map(metric.value, zero.values()))
    for name, one in result.contenders.items():
        table.add_row(Text(name), *(metric.value(one.tasks[metric.key][task]) for task in zero))
    return table


def answer_measures(result: ModelResult) -> list[str]:
    """The measures of answers and of chat that any contender has."""
    found = [one.answers for one in result.contenders.values() if one.answers]
    return [name for name in MEASURES if any(numbers[name].mean is not None for numbers in found)]


def answer_text(name: str, number: Number | None) -> str:
    """A measure of answers with half its 95 % interval, and the mark of its difference to the baseline."""
    factor = ANSWER_METRICS[name][1]
    if number is None or number.mean is None:
        return UNMEASURED
    text = significant(factor * number.mean)
    if number.low is not None and number.high is not None:
        text += f" ± {significant(factor * (number.high - number.low) / 2, 2)}"
    return f"{text}{stars(number.p_holm)}"


def answers_about(result: ModelResult, measures: Sequence[str]) -> str:
    """What the table of answers shows, of the measures that are in it."""
    baseline = result.baseline or "the baseline"
    has_wins, about = any(name in measures for name in WINS), []
    if has_wins:
        about.append(
            f"Wins: share of prompts on which the reward model prefers the answer to that of {baseline} with the same "
            "order and seed; ties count half."
        )
    about += [text for name, text in _ABOUT_MEASURE.items() if name in measures]
    from_half = " (wins: from half)" if has_wins else ""
    return (
        "Greedy answers of the final policies to held-out prompts, mean over runs and tasks ± half the 95 % interval "
        f"over runs and prompts. {' '.join(about)} Marked: what differs from {baseline}{from_half}, * p < 0.05, "
        "** 0.01, *** 0.001 by changing signs over runs, after Holm."
    )


_ABOUT_MEASURE = {
    "length": "Length in characters.",
    "kl": "KL to the base model along the answers, nats per token.",
    "perplexity": "Perplexity of held-out chat: exp of the mean loss per token, over all tokens and runs.",
}


def answers_table(result: ModelResult) -> Table | None:
    """What the contenders' answers are worth; None where nothing was asked."""
    measures = answer_measures(result)
    if not measures:
        return None
    about = answers_about(result, measures)
    columns = ("runs", *(ANSWER_METRICS[measure][0] for measure in measures))
    table = _table(f"Answers on {result.model}", about, columns)
    for name, one in result.contenders.items():
        cells = [answer_text(measure, one.answers.get(measure)) for measure in measures]
        table.add_row(Text(name), str(one.runs), *cells)
    return table


def cost_cells(one: Contest) -> list[str]:
    """Processor seconds, peak memory, and bytes kept a task, with what they are."""
    costs, kib = one.costs, 1024
    return [
        significant(costs.processor_seconds),
        f"{costs.peak_bytes / 2**20:.0f}",
        *(fixed(value / kib, 0) for value in (costs.adapter, costs.state, costs.buffer, costs.kept)),
        significant(one.changes["chosen_logprob"]),
        significant(one.changes["rejected_logprob"]),
        choice_text(dict(one.choice)),
    ]


COST_COLUMNS = (
    "CPU seconds", "peak MiB", "adapter KiB", "state KiB", "buffer KiB", "kept KiB a task", "Δ chosen", "Δ rejected",
    "settings",
)  # fmt: skip


_COSTS = 6
"""How many of the columns are costs; the others are shown apart, so that a terminal of 80 columns has room."""


def cost_tables(result: ModelResult) -> list[Table]:
    """What the contenders cost, and what they did to the log-likelihoods with the settings they had."""
    costs = _table(
        f"Cost on {result.model}",
        "CPU seconds: processor time of a run's training with what the method does around it, scoring left out. KiB "
        "kept at the end for each task: the sum of the three before it.",
        COST_COLUMNS[:_COSTS],
    )
    settings = _table(
        f"Log-likelihoods and settings on {result.model}",
        "Δ chosen, Δ rejected: change of the log-likelihood per token against the base model, nats, mean over the "
        "tasks at the end.",
        COST_COLUMNS[_COSTS:],
    )
    for name, one in result.contenders.items():
        cells = cost_cells(one)
        costs.add_row(Text(name), *cells[:_COSTS])
        settings.add_row(Text(name), *cells[_COSTS:])
    return [costs, settings]


def outcome_tables(outcome: Outcome) -> list[RenderableType]:
    """Two tables a metric and model, then the answers, the costs and the notes."""
    tables: list[RenderableType] = []
    for result in outcome.models:
        for metric in METRICS.values():
            tables += [metric_table(result, metric), task_table(result, metric)]
        tables.append(Text(_ABOUT_NUMBERS, style="dim"))
        answers = answers_table(result)
        tables += [*([] if answers is None else [answers]), *cost_tables(result)]
    spaced = [part for table in tables for part in (table, Text(""))]
    return [*spaced, *(Text(f"note: {note}", style="yellow") for note in outcome.notes), Text("")]


def tuning_tables(tuned: Tuned) -> list[RenderableType]:
    """Every trial with its score; the chosen one is marked."""
    tables: list[RenderableType] = []
    for model, contenders in tuned.file.trials.items():
        caption = f"Score: mean of {', '.join(tuned.file.tune_on)} on validation rows."
        table = Table(title=Text(f"Trials on {model}"), title_justify="left", caption=caption, caption_justify="left")
        for name in ("contender", "settings", "score", ""):
            table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
        for name, trials in contenders.items():
            for trial in trials:
                mark = "chosen" if trial.choice == tuned.file.chosen[model].get(name) else ""
                score = "failed" if trial.failed else fixed(trial.score, 4)
                table.add_row(Text(name), choice_text(trial.choice), score, mark)
        tables += [table, Text("")]
    return [*tables, *(Text(f"note: {note}", style="yellow") for note in tuned.notes)]
