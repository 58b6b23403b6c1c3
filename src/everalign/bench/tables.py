"""A bench's results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from everalign.bench.answer_measures import MEASURES, WINS
from everalign.bench.comparison import Contest, ModelResult, compared
from everalign.bench.numbers import Number
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


def metric_table(result: ModelResult, metric: Metric) -> Table:
    """One metric of all contenders: its numbers, the differences to the baseline, and each task at the end."""
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
    table = Table(
        title=Text(f"{metric.title} on {result.model}"), title_justify="left", caption=about, caption_justify="left"
    )
    tasks = list(result.zero_shot_tasks[metric.key])
    table.add_column("contender", style="bold")
    for name in ("runs", *NUMBER_TITLES.values(), *(f"Δ {NUMBER_TITLES[key]}" for key in differences), *tasks):
        table.add_column(Text(name), justify="right", no_wrap=True)
    zero = result.zero_shot_tasks[metric.key]
    empty = [UNMEASURED] * (len(NUMBER_TITLES) - 1 + len(differences))
    table.add_row(
        "base model", "", metric.value(result.zero_shot[metric.key]), *empty, *map(metric.value, zero.values())
    )
    for name, one in result.contenders.items():
        numbers = one.numbers[metric.key]
        cells = [number_text(metric, number, numbers[number]) for number in NUMBER_TITLES]
        moved = [difference_text(metric, numbers[key]) for key in differences]
        ends = [metric.value(one.tasks[metric.key][task]) for task in tasks]
        table.add_row(Text(name), str(one.runs), *cells, *moved, *ends)
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
    "perplexity": "Perplexity of held-out chat.",
}


def answers_table(result: ModelResult) -> Table | None:
    """What the contenders' answers are worth; None where nothing was asked."""
    measures = answer_measures(result)
    if not measures:
        return None
    about = answers_about(result, measures)
    table = Table(title=Text(f"Answers on {result.model}"), title_justify="left", caption=about, caption_justify="left")
    table.add_column("contender", style="bold")
    for name in ("runs", *(ANSWER_METRICS[measure][0] for measure in measures)):
        table.add_column(Text(name), justify="right", no_wrap=True)
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
    "processor s", "peak MiB", "adapter KiB", "state KiB", "buffer KiB", "kept KiB a task", "Δ chosen", "Δ rejected",
    "settings",
)  # fmt: skip


def cost_table(result: ModelResult) -> Table:
    """What the contenders cost, what they did to the log-likelihoods, and the settings they had."""
    about = (
        "Processor seconds of a run's training with what the method does around it, scoring left out; bytes kept at "
        "the end for each task. Δ chosen, Δ rejected: change of the log-likelihood per token against the base model, "
        "nats, mean over the tasks at the end."
    )
    table = Table(title=Text(f"Cost on {result.model}"), title_justify="left", caption=about, caption_justify="left")
    table.add_column("contender", style="bold")
    for name in COST_COLUMNS:
        table.add_column(name, justify="left" if name == "settings" else "right", no_wrap=True)
    for name, one in result.contenders.items():
        table.add_row(Text(name), *cost_cells(one))
    return table


def outcome_tables(outcome: Outcome) -> list[RenderableType]:
    """One table a metric and model, then the costs and the notes."""
    tables: list[RenderableType] = []
    for result in outcome.models:
        tables += [metric_table(result, metric) for metric in METRICS.values()]
        answers = answers_table(result)
        tables += [*([] if answers is None else [answers]), cost_table(result)]
    return [*_spaced(tables), *(Text(f"note: {note}", style="yellow") for note in outcome.notes), Text("")]


def tuning_tables(tuned: Tuned) -> list[RenderableType]:
    """Every trial with its score; the chosen one is marked."""
    tables: list[RenderableType] = []
    for model, contenders in tuned.file.trials.items():
        caption = f"Score: mean of {', '.join(tuned.file.tune_on)} on validation rows."
        table = Table(title=Text(f"Trials on {model}"), title_justify="left", caption=caption, caption_justify="left")
        for name in ("contender", "settings", "score", ""):
            table.add_column(name, justify="right" if name == "score" else "left", no_wrap=True)
        for name, trials in contenders.items():
            for trial in trials:
                mark = "chosen" if trial.choice == tuned.file.chosen[model].get(name) else ""
                score = "failed" if trial.failed else fixed(trial.score, 4)
                table.add_row(Text(name), choice_text(trial.choice), score, mark)
        tables.append(table)
    return [*_spaced(tables), *(Text(f"note: {note}", style="yellow") for note in tuned.notes)]


def _spaced(tables: Sequence[RenderableType]) -> list[RenderableType]:
    return [part for table in tables for part in (table, Text(""))]
