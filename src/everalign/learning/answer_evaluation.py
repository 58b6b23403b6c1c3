"""Evaluate a run by what its policies write: greedy answers of the base model and of versions, and all their metrics.

Answers, rewards and a judge's replies are kept in `RUN/evaluation`: a call that was killed continues, and one that asks
for another metric writes no answer twice. The result is `RUN/evaluation/results.json`, which `everalign report` shows.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from everalign.data.chat_tokens import template_fingerprint
from everalign.data.readers import first_columns, load_preferences, load_prompts, load_unscored
from everalign.data.rows import spread
from everalign.errors import InputError
from everalign.evaluation.answers import (
    Answer,
    HeldOutPrompt,
    ResponseLogProbs,
    judged_scores,
    kl_to_base,
    reference_texts,
    response_log_probs,
    text_similarity,
    win_rate,
    write_answers,
)
from everalign.evaluation.judge import INSTRUCTIONS, RUBRICS, JudgeScorer, reward_cache, rubric_of
from everalign.evaluation.scorers import RewardModel, Scorer
from everalign.evaluation.statistics import bootstrap_mean
from everalign.learning.options import AdapterOptions
from everalign.learning.run_data import BASE, RESULTS, RunData
from everalign.learning.run_store import RunDirectory
from everalign.methods import METHODS, make_method
from everalign.modeling.base_weights import check_device_map
from everalign.modeling.loading import load_base, load_tokenizer
from everalign.modeling.lora import WEIGHTS
from everalign.modeling.policy import Policy
from everalign.modeling.prompt_pool import PROMPTS_FILE
from everalign.modeling.runtime import prepare_process, training_device
from everalign.storage import Journal, exclusive, lock_of, sha256_of, write_json

_TOKENS_PER_BATCH = 4096

Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Prompts = Mapping[str, Sequence[HeldOutPrompt]]


@dataclass(frozen=True)
class AnswerSettings:
    """What is evaluated.

    Args:
        every: every version of the line, not the last one alone; the base model always is.
        limit: most prompts of a task, evenly spaced; all when None.
        max_new_tokens: longest answer.
        compat: also BLEU and ROUGE-L as in LifeAlign's published tables.
        standard: BLEU and ROUGE-L by sacreBLEU and rouge-score.
        likelihoods: perplexity and changes of log-likelihood of known answers, and the KL to the base model, for which
            every version passes over all of them; on a CPU that takes longer than writing short answers.
        rubric: name of the rubric for a judge; each task's own, or the general one, when None.
        device_map: where the base model's layers go (see `TrainingOptions`); to one device when None.
    """

    every: bool = False
    limit: int | None = None
    max_new_tokens: int = 160
    compat: bool = False
    standard: bool = True
    likelihoods: bool = True
    rubric: str | None = None
    device_map: str | None = None


def load_held_out_prompts(source: str | os.PathLike[str]) -> list[HeldOutPrompt]:
    """Loads prompts alone, with completions (the first is the reference), or with chosen and rejected answers."""
    columns = first_columns(source, "train", ("completions", "chosen", "rejected"))
    if not columns:
        return [HeldOutPrompt(row.prompt) for row in load_prompts(source)]
    if "completions" in columns:
        rows = load_unscored(source, overwrite=True)
        return [HeldOutPrompt(row.prompt, row.completions[0]) for row in rows]
    return [HeldOutPrompt(row.prompt, row.chosen, row.rejected) for row in load_preferences(source)]


def run_prompts(run: RunData) -> dict[str, list[HeldOutPrompt]]:
    """Returns the held-out rows that the run keeps, by task.

    Raises:
        InputError: it has none.
    """
    directory = RunDirectory(run.path)
    _, tests, _ = directory.read_zero_shot()
    if not tests:
        raise InputError(f"{run.path}: learned without held-out rows; name prompts with --prompts NAME=FILE")
    found = {}
    for task, facts in tests.items():
        rows = directory.read_test(facts, load_preferences)
        found[task] = [HeldOutPrompt(row.prompt, row.chosen, row.rejected) for row in rows]
    return found


def labels_of_prompts(run: RunData) -> dict[str, str]:
    """Returns which label is meant by a task's name, or by a label; nothing of a run without labels."""
    _, tests, _ = RunDirectory(run.path).read_zero_shot()
    known = {task: facts["label"] for task, facts in tests.items()}
    known |= {version.task: version.manifest.label for version in run.versions}
    labels = {label: label for label in known.values() if label is not None}
    return {**labels, **{task: label for task, label in known.items() if label is not None}}


def _check_references(prompts: Prompts, settings: AnswerSettings, log: Log) -> None:
    """Refuses, before an hour of writing, to compare with references without the packages for it."""
    for task, rows in prompts.items():
        if lacking := sum(row.reference is None for row in rows):
            log(f"  {task}: {lacking} of {len(rows)} prompts have no reference: no BLEU-4, ROUGE-L and likelihoods")
    if not settings.standard or all(reference_texts(rows) is None for rows in prompts.values()):
        return
    try:
        text_similarity(["a"], ["a"])
    except InputError as error:
        hint = "leave BLEU-4 and ROUGE-L out with --no-standard (standard=False)"
        raise InputError(f"{error}, or {hint}", hint=hint) from error


def _check_names(runs: Sequence[RunData], prompts: Prompts) -> None:
    """Refuses prompts of which nothing tells which of a run's models answers them."""
    for run in runs:
        tasks = [version.task for version in run.versions]
        if run.regime == "separate" and (unknown := next((name for name in prompts if name not in tasks), None)):
            raise InputError(
                f"{run.path}: has a model for each task, and {unknown!r} is none of them: name the prompts by one of "
                f"{', '.join(tasks)}"
            )
        known = labels_of_prompts(run)
        if known and (unknown := next((name for name in prompts if name not in known), None)):
            raise InputError(
                f"{run.path}: keeps an adapter for each label, and {unknown!r} is none of its tasks and labels, so "
                f"that nothing tells which adapter answers: name the prompts by one of {', '.join(known)}"
            )


def evaluate_run(
    run: RunData,
    prompts: Prompts | None = None,
    settings: AnswerSettings | None = None,
    *,
    reward: Scorer | None = None,
    judge: JudgeScorer | None = None,
    against: RunData | None = None,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Writes the answers of a run's policies and returns what `results.json` holds.

    Args:
        run: a run of preferences, scored rows or prompts; not one of corrections.
        prompts: held-out prompts by task; those that the run keeps when None.
        settings: what is evaluated.
        reward: a reward model or function, for mean rewards and win rates.
        judge: an LLM judge, for mean scores and win rates, whose replies are cached in the run.
        against: a run whose last version's answers are the opponent; the run's own base model when None.
        log: called with one line for each thing that happens.
        progress: called with what is done, how much, and of how much.

    Raises:
        InputError: run, prompts or settings cannot be used, before any answer is written.
        EveralignError: a scorer failed; what was written and judged is kept.
    """
    settings = settings or AnswerSettings()
    if settings.rubric is not None and settings.rubric not in RUBRICS:
        raise InputError(f"rubric: must be one of {', '.join(RUBRICS)}, found {settings.rubric!r}", field="rubric")
    for one in (run, against):
        if one is not None and one.facts.objective == "correction":
            raise InputError(f"{one.path}: learned corrections: evaluate it with everalign correct evaluate")
    if not run.versions:
        raise InputError(f"{run.path}: nothing was learned yet")
    chosen = {task: _distinct(rows, settings.limit) for task, rows in (prompts or run_prompts(run)).items()}
    if any(not rows for rows in chosen.values()) or not chosen:
        raise InputError("every task needs at least one prompt")
    _check_references(chosen, settings, log)
    _check_names([run] if against is None else [run, against], chosen)
    with exclusive(lock_of(run.path / "evaluation"), "evaluating this run"):
        opponents = None
        if against is not None:
            opponents = _written(_Runner(against, replace(settings, every=False), log, progress), chosen)
        runner = _Runner(run, settings, log, progress)
        scorers = _scorers(run, chosen, reward, judge, settings)
        written = _written(runner, chosen, base=True)
        results = []
        base: dict[str, dict[str, ResponseLogProbs]] = {task: {} for task in chosen}
        for version in (BASE, *runner.versions):
            for task, rows in chosen.items():
                log(f"  metrics of {version} on {task}")
                runner.switch(version, task)
                other = written[BASE] if opponents is None else next(iter(opponents.values()))
                answers = written[version][task]
                found = _metrics(runner, version, rows, answers, other[task], scorers[task], base[task])
                results.append({"version": version, "task": task, "prompts": len(rows), **found})
        _warn_of_cuts(reward, chosen, [*written.values(), *(opponents or {}).values()], log)
        shown = {
            "against": BASE if against is None else f"{against.path}",
            "reward": None if reward is None else reward.fingerprint,
            "judge": None if judge is None else judge.client.model,
            "settings": asdict(settings),
            "worst": worst_tasks(results, runner.versions[-1]),
            "results": results,
            "answers": _shown_answers(chosen, written),
        }
        write_json(run.path / RESULTS, shown)
    return shown


def _warn_of_cuts(
    reward: Scorer | None, prompts: Prompts, written: Sequence[Mapping[str, Sequence[Answer]]], log: Log
) -> None:
    if not isinstance(reward, RewardModel):
        return
    asked = [row.prompt for by_task in written for task in by_task for row in prompts[task]]
    texts = [one.text for by_task in written for answers in by_task.values() for one in answers]
    for note in reward.cut_note(asked, texts):
        log(f"  warning: {note}")


def worst_tasks(results: Sequence[Mapping[str, Any]], version: str) -> dict[str, Any]:
    """Returns for each metric in which more is better, by the version, the task with the least of it."""
    better = ["bleu", "rouge_l", "compat_bleu", "compat_rouge_l", "reward", "judge"]
    better += ["reward_win_rate", "reward_win_rate_lc", "judge_win_rate", "judge_win_rate_lc"]
    found = {}
    for name in better:
        rows = [row for row in results if row["version"] == version and name in row["metrics"]]
        values = [(row["metrics"][name][0], row["task"]) for row in rows]
        if values:
            value, task = min(values)
            found[name] = {"task": task, "value": value}
    return found


class _Runner:
    """A run's model, which can be switched to any of its versions."""

    def __init__(self, run: RunData, settings: AnswerSettings, log: Log, progress: Progress) -> None:
        self.run, self.settings, self.log, self.progress = run, settings, log, progress
        check_device_map(settings.device_map, "sdpa", None if run.base_adapter is None else str(run.base_adapter))
        prepare_process()
        facts = run.facts
        self.tokenizer = load_tokenizer(facts.model, adapter=run.base_adapter)
        precision = facts.settings.get("precision", "fp32")
        model, key = load_base(
            facts.model,
            precision,
            adapter=run.base_adapter,
            device=training_device(log),
            quantize=facts.settings.get("quantize"),
            device_map=settings.device_map,
        )
        if key != facts.model_fingerprint:
            raise InputError(f"{facts.model}: is not the model that {run.path} was begun with")
        shape = {name: facts.settings[name] for name in AdapterOptions.model_fields if name in facts.settings}
        options = AdapterOptions(**shape)
        # The size of the pool that the run's method learns; None for an adapter.
        arguments = facts.method.model_dump(exclude={"gamma"})  # which is the objective's, too
        known = METHODS.get(arguments["name"])
        pool = None if known is None or known.prompts is None else make_method(**arguments).prompts
        self.policy = Policy(model, options.rank, options.alpha, options.module_names(), prompts=pool)
        self.max_length = int(facts.settings.get("max_length", 1024))
        self.longest = max(self.max_length, 768) + settings.max_new_tokens
        versions = [version.id for version in run.versions]
        self.versions = versions if settings.every else versions[-1:]
        self.journal = Journal(run.path / "evaluation" / "answers.sqlite")
        self._model = f"{facts.model_fingerprint} {template_fingerprint(self.tokenizer)}"
        self._labels = labels_of_prompts(run)
        self._loaded: Path | None = None

    def switch(self, version: str, task: str) -> Path | None:
        """Makes the policy what answers to a task's prompts as of a version: with labels, its label's adapter.

        Returns the adapter's folder; None for the base model.
        """
        own = None
        if version != BASE:
            at = next(one for one in self.run.versions if one.id == version)
            if self.run.regime == "separate":
                # Each task is answered by its own model, once it has one.
                until = self.run.versions[: self.run.versions.index(at) + 1]
                own = next((one for one in until if one.task == task), None)
            else:
                own = self.run.adapters_at(at).get(self._labels[task] if self._labels else None)
        folder = None if own is None else self.run.path / "versions" / own.id / "adapter"
        if folder is None:
            self.policy.reset(0)
        elif folder != self._loaded:
            self.policy.load_adapter(folder, long_term=True, seed=0)
        self._loaded = folder
        return folder

    def answers(self, version: str, task: str, rows: Sequence[HeldOutPrompt]) -> list[Answer]:
        folder = self.switch(version, task)
        learned = WEIGHTS if self.policy.prompts is None else PROMPTS_FILE
        adapter = "" if folder is None else sha256_of(folder / learned)
        return write_answers(
            self.policy,
            self.tokenizer,
            [row.prompt for row in rows],
            self.journal,
            f"{self._model} {adapter}",
            max_new_tokens=self.settings.max_new_tokens,
            max_prompt_tokens=max(self.max_length, 768),
            progress=lambda done, total: self.progress(f"answers of {version}", done, total),
        )


def _written(runner: _Runner, prompts: Prompts, base: bool = False) -> dict[str, dict[str, list[Answer]]]:
    """The answers by version and task."""
    found = {}
    for version in (*((BASE,) if base else ()), *runner.versions):
        runner.log(f"  answers of {version}")
        found[version] = {task: runner.answers(version, task, rows) for task, rows in prompts.items()}
    return found


def _scorers(
    run: RunData, prompts: Prompts, reward: Scorer | None, judge: JudgeScorer | None, settings: AnswerSettings
) -> dict[str, dict[str, Scorer]]:
    """The scorers by task and name; a judge has each task's rubric."""
    found: dict[str, dict[str, Scorer]] = {}
    for task in prompts:
        found[task] = {} if reward is None else {"reward": reward}
        if judge is not None:
            rubric = settings.rubric or rubric_of(task)
            cache = judge.cache or reward_cache(run.path / "evaluation")
            instructions = INSTRUCTIONS if rubric is None else RUBRICS[rubric]
            found[task]["judge"] = JudgeScorer(
                judge.client, instructions=instructions, cache=cache, keep_unreadable=True
            )
    return found


def _metrics(
    runner: _Runner,
    version: str,
    rows: Sequence[HeldOutPrompt],
    answers: Sequence[Answer],
    others: Sequence[Answer],
    scorers: Mapping[str, Scorer],
    base: dict[str, ResponseLogProbs],
) -> dict[str, Any]:
    """The metrics, each (value, low, high), and how often a judge's reply could not be read."""
    prompts, settings = [row.prompt for row in rows], runner.settings
    found: dict[str, Any] = {"unfinished": bootstrap_mean([float(not one.ended) for one in answers])}
    found["length"] = bootstrap_mean([float(len(one.text)) for one in answers])
    references, failed, texts = reference_texts(rows), dict[str, int](), [one.text for one in answers]
    if references is not None:
        if settings.standard:
            found |= text_similarity(texts, references)
        if settings.compat:
            found |= text_similarity(texts, references, compat=True)
        if settings.likelihoods:
            found |= _likelihoods(runner, rows, base)
    if settings.likelihoods and version != BASE and any(texts):
        found["kl"] = kl_to_base(runner.policy, runner.tokenizer, prompts, answers, max_length=runner.longest)
    for name, scorer in scorers.items():
        scores = judged_scores(scorer, prompts, texts)
        rewards = [score for score in scores if score is not None]
        if not rewards:
            raise InputError(
                f"none of {len(scores)} scores could be read: take a judge that follows instructions better"
            )
        found[name], failed[name] = bootstrap_mean(rewards), len(scores) - len(rewards)
        if version != BASE:
            won = win_rate(scorer, prompts, texts, [one.text for one in others])
            found |= {f"{name}_win_rate": won.win_rate, f"{name}_win_rate_lc": won.length_controlled}
            failed[f"{name}_win_rate"] = won.failed
    return {"metrics": {name: list(value) for name, value in found.items()}, "failed": failed}


def _likelihoods(runner: _Runner, rows: Sequence[HeldOutPrompt], base: dict[str, ResponseLogProbs]) -> dict[str, Any]:
    """Perplexity of the references, and what learning changed of the log-likelihood of references and rejected.

    `base` is filled by the first call for a task, which is for the base model.
    """
    found: dict[str, Any] = {}
    for name in ("reference", "rejected"):
        given = [(row.prompt, getattr(row, name)) for row in rows]
        if any(response is None for _, response in given):
            continue
        scored = response_log_probs(
            runner.policy,
            runner.tokenizer,
            [prompt for prompt, _ in given],
            [response for _, response in given],
            max_length=runner.longest,
            tokens_per_batch=_TOKENS_PER_BATCH,
        )
        if name == "reference":
            found["perplexity"] = scored.perplexity()
        change = scored.change_since(base.setdefault(name, scored))
        found[f"{'chosen' if name == 'reference' else name}_change"] = change
    return found


def _shown_answers(prompts: Prompts, written: Mapping[str, Mapping[str, Sequence[Answer]]]) -> dict[str, Any]:
    """All answers by task: the prompt, and what each version wrote."""
    return {
        task: [
            {
                "prompt": row.prompt if isinstance(row.prompt, str) else [dict(message) for message in row.prompt],
                "answers": {version: asdict(found[task][number]) for version, found in written.items()},
            }
            for number, row in enumerate(rows)
        ]
        for task, rows in prompts.items()
    }


def _distinct(rows: Sequence[HeldOutPrompt], limit: int | None) -> list[HeldOutPrompt]:
    """At most `limit` distinct prompts, evenly far apart."""
    distinct = list({repr(row.prompt): row for row in reversed(rows)}.values())[::-1]
    return distinct if limit is None else spread(distinct, limit)
