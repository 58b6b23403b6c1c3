"""Self-training on corrections (weak to strong): a small corrector rewrites a stronger model's own answers.

    distill("Qwen/Qwen2.5-7B-Instruct", Corrector.from_pretrained("runs/corrector"), load_prompts("prompts.jsonl"),
            "runs/distilled", options=DistillOptions(rounds=2))

In each round (Ji et al., NeurIPS 2024, arXiv 2402.02416, §4 and appendix A) the policy answers, the corrector rewrites,
and the policy learns the rewritten answers as one task of a run, so that a method keeps what earlier rounds and tasks
taught; the next round samples from the policy that this one left. Only text is passed on: the two models may have
different tokenizers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from everalign.correction.edits import edit_share, words
from everalign.data.records import Correction, CorrectionSet, PreferenceSet, Scored, ScoredSet
from everalign.data.rows import RowSet
from everalign.distributed import launched
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.learning.context import Log, Progress
from everalign.learning.learner import Learner
from everalign.learning.options import DistillOptions, TrainingOptions
from everalign.learning.promotion import exclusive_run
from everalign.methods import LifeAlign, Method
from everalign.modeling.sampling import sample_journalled
from everalign.options import SamplingOptions
from everalign.storage import Journal, json_line, read_json, write_json, write_text
from everalign.training.options import WeightOptions
from everalign.training.reward_weights import FROM_REFERENCE_REWARDS
from everalign.training.stage import StageFigures

HELD_OUT = "held-out"
"""The name under which held-out preferences are scored after every round."""

_FACTS = "distill.json"
_PER_BATCH = 64
# Of VAR: an answer and its correction are two standard deviations apart. At the temperature that suits sampled answers
# the answer itself would count for nothing.
_TEMPERATURE = 1.0
# Rounds sample this far apart, and runs of neighbouring seeds further.
_ROUND_STRIDE, _RUN_STRIDE, _SEEDS = 7919, 1_000_003, 2**31


class Rewritten(Protocol):
    """An answer after a corrector has seen it."""

    @property
    def text(self) -> str:
        """The correction; the answer itself where it is not changed."""
        ...

    @property
    def changed(self) -> bool:
        """Whether it is another text than the answer."""
        ...


class Rewriter(Protocol):
    """Corrects answers, as `everalign.Corrector` does."""

    @property
    def fingerprint(self) -> str:
        """Names what corrections depend on."""
        ...

    def correct_batch(self, pairs: Sequence[tuple[Any, str]]) -> Sequence[Rewritten]:
        """Return the answers of (question, answer) pairs corrected, in their order."""
        ...


@dataclass(frozen=True)
class Round:
    """What happened in one round, as `distill/round-N.json` of the run records it.

    Args:
        round: from 1 on.
        prompts: that were asked.
        unanswered: prompts whose answer did not end within max_new_tokens, or says nothing; left out.
        answers: that the corrector saw.
        changed: answers that it changed.
        changed_share: of the answers.
        edit: mean `everalign.correction.edits.edit_share` in words over the changed answers; 0 where none was changed.
        rows: that were given to the policy to learn, which leaves out those above max_length (the version's manifest
            counts them); 0 where there was nothing left to learn.
    """

    round: int
    prompts: int
    unanswered: int
    answers: int
    changed: int
    changed_share: float
    edit: float
    rows: int

    def one_line(self) -> str:
        """One line of text for a log."""
        line = f"{self.answers} answers, {self.changed} of them changed ({self.changed_share:.1%})"
        if self.changed:
            line += f", {self.edit:.1%} of their words"
        if self.unanswered:
            line += f"; {self.unanswered} answers did not end within max_new_tokens and are left out"
        return line


@dataclass(frozen=True)
class Distillation:
    """A finished run.

    Args:
        learner: with the policy that the last round left.
        rounds: those that were learned, and the last one if nothing was left to learn in it.
    """

    learner: Learner
    rounds: tuple[Round, ...]


def distill(
    model: str,
    corrector: Rewriter,
    prompts: ScoredSet,
    output: str | Path,
    *,
    options: DistillOptions | None = None,
    test: PreferenceSet | None = None,
    method: Method | None = None,
    training: TrainingOptions | None = None,
    weighting: WeightOptions | None = None,
    seed: int = 0,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
    figures: StageFigures = lambda *_: None,
    **arguments: Any,
) -> Distillation:
    """Teach a model what a corrector makes of its own answers, round after round, each a task of one run.

    Killed in the middle, the same call with `resume` keeps finished rounds, sampled answers and their corrections, and
    ends with the same weights. With more rounds it continues.

    Args:
        model: the stronger model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`.
        corrector: rewrites its answers.
        prompts: what the policy answers.
        output: the run directory; beside the run's own files it has `distill/round-N.jsonl`, the corrections.
        options: what is learned from them; the defaults when None.
        test: held-out preferences, scored before the first round and after each.
        method: what is carried from round to round; LifeAlign when None.
        training: how each round is trained.
        weighting: how the rewards of the labels `var` become weights, at temperature 1 unless it says another; the
            defaults when None.
        seed: seeds everything random.
        log: called with one line for each thing that happens.
        progress: called with (stage, done, all).
        figures: called with what is measured of training, see `everalign.training.stage.Figures`.
        arguments: further ones of `Learner`, such as `adapter` and `resume`.

    Raises:
        InputError: most answers of the first round did not end, the method forgets between tasks or pools them,
            `max_length` leaves no room for a prompt, the
            labels have no use for `weighting` or its estimator needs what corrections do not have, or the run in
            `output` was started with another corrector, other prompts or other options.
        EveralignError: the first round's answers were all good as they are.
    """
    if (count := launched() or 1) > 1:
        raise InputError(f"a corrector rewrites answers in one process, found {count}: start it without a launcher")
    options, method = options or DistillOptions(), LifeAlign() if method is None else method
    training = training or TrainingOptions()
    room = training.max_length - options.max_new_tokens
    if not prompts:
        raise InputError(f"{prompts.source}: no rows in it")
    if method.regime != "sequential" or method.labelled:
        raise InputError(f"{method.name} does not go on from round to round: choose a method that learns task by task")
    if room < 1:
        limits = f"max_new_tokens is {options.max_new_tokens} and max_length {training.max_length}"
        raise InputError(f"{limits}, which leaves no room for a prompt: raise max_length")
    weighting = _weighting(options, weighting)
    with exclusive_run(Path(output)):
        learner = Learner(
            model,
            method,
            options.objective,
            output,
            training=training,
            weighting=weighting,
            seed=seed,
            log=log,
            progress=progress,
            figures=figures,
            **arguments,
        )
        run = _Run(learner, corrector, prompts, options, room, Path(output) / "distill", seed, log, progress)
        run.begin()
        if test is not None:
            learner.register_test(HELD_OUT, test)
        rounds: list[Round] = []
        for number in range(1, options.rounds + 1):
            rounds.append(run.round(number))
            if not rounds[-1].rows:
                break
    return Distillation(learner, tuple(rounds))


def _weighting(options: DistillOptions, given: WeightOptions | None) -> WeightOptions | None:
    """Return how rewards become weights, or refuse what the labels would ignore or cannot serve."""
    if given is not None and options.labels != "var":
        raise InputError(f"weighting is for the labels var, found {options.labels}: leave it out")
    if options.objective != "var":
        return None
    found = (given or WeightOptions()).resolved(_TEMPERATURE)
    if found.estimator in FROM_REFERENCE_REWARDS:
        raise InputError(
            f"the estimator {found.estimator} needs reference_rewards, which corrections do not have: "
            "choose another estimator"
        )
    return found


@dataclass(frozen=True)
class _Run:
    """The rounds' files and what they are made with; `room` is what an answer leaves for its prompt, in tokens."""

    learner: Learner
    corrector: Rewriter
    prompts: ScoredSet
    options: DistillOptions
    room: int
    folder: Path
    seed: int
    log: Log
    progress: Progress

    def begin(self) -> None:
        """Write down what the rounds are made with, or refuse to continue with something else."""
        facts = {
            **self.options.model_dump(exclude={"rounds"}),
            "corrector": self.corrector.fingerprint,
            "prompts": self.prompts.fingerprint,
        }
        path = self.folder / _FACTS
        if not path.exists():
            if self.learner.run.versions:
                raise InputError(f"{self.folder.parent} holds a run of other tasks: choose another output directory")
            write_json(path, facts)
        written = read_json(path)
        for name, value in facts.items():
            if written.get(name) != value:
                which = f"{'' if name.endswith('s') else 'a '}different {name}"
                raise InputError(
                    f"{path}: was started with {which} ({written.get(name)!r} then, {value!r} now): use the "
                    "same, or another output directory"
                )

    def round(self, number: int) -> Round:
        """Sample, correct and learn; a finished round is taken as it is."""
        name, path = f"round-{number}", self.folder / f"round-{number}.json"
        if any(version.task == name for version in self.learner.run.versions):
            self.log(f"{name} (learned already)")
            return Round(**read_json(path))
        if path.exists() and not (last := Round(**read_json(path))).rows and number > 1:
            self.log(f"{name}: an earlier call found nothing left to learn")
            return last
        self.log(name)
        samples = Journal(self.folder / f"{name}.samples.partial")
        corrected = Journal(self.folder / f"{name}.corrected.partial")
        rows = self._correct(self._answer(number, samples), corrected)
        learned = self._labels(rows)
        edits = [edit_share(words(row.answer), words(row.correction)) for row in rows if not row.is_identity]
        result = Round(
            round=number,
            prompts=len(self.prompts),
            unanswered=len(self.prompts) - len(rows),
            answers=len(rows),
            changed=len(edits),
            changed_share=len(edits) / len(rows),
            edit=fmean(edits) if edits else 0.0,
            rows=len(learned),
        )
        self.log(f"  {result.one_line()}")
        write_text(self.folder / f"{name}.jsonl", "".join(json_line(row.to_json()) for row in rows))
        write_json(path, asdict(result))
        if learned:
            self.learner.learn(learned, name)
        elif number == 1:
            raise EveralignError(f"{self.prompts.source}: the corrector changed none of {len(rows)} answers")
        else:
            self.log("  the corrector changed no answer: there is nothing left to learn from it")
        samples.remove()
        corrected.remove()
        return result

    def _answer(self, number: int, journal: Journal) -> list[Correction]:
        """Return the prompts that the policy answers, with its answers."""
        options = self.options
        sampling = SamplingOptions(
            completions=1,
            temperature=options.sampling_temperature,
            max_new_tokens=options.max_new_tokens,
            max_prompt_tokens=self.room,
        )
        found = sample_journalled(
            self.learner.policy,
            self.learner.tokenizer,
            [row.prompt for row in self.prompts],
            sampling,
            journal,
            seed=(self.seed * _RUN_STRIDE + number * _ROUND_STRIDE) % _SEEDS,
            progress=self.progress,
        )
        answered = [
            Correction(row.prompt, sample.texts[0], weight=row.weight)
            for row, sample in zip(self.prompts, found, strict=True)
            if sample.texts
        ]
        if not answered:
            limit = f"max_new_tokens {sampling.max_new_tokens}: raise it (--max-new-tokens)"
            raise InputError(f"{self.prompts.source}: no sampled answer ends within {limit}")
        lost, what = len(self.prompts) - len(answered), "sampled answers did not end or are empty, and are left out"
        remedy = f"raise --max-new-tokens (max_new_tokens), {sampling.max_new_tokens} now"
        # What earlier rounds have taught stands, however long the policy's answers have become.
        for warning in check_shortfall(lost, len(self.prompts), what, remedy, refuse=number == 1):
            self.log(f"  warning: {self.prompts.source}: {warning}")
        return answered

    def _correct(self, answers: Sequence[Correction], journal: Journal) -> CorrectionSet:
        """Return the answers with their corrections, each kept on disk as soon as it is made."""
        texts: dict[int, str] = journal.read(range(len(answers)))
        if not all(isinstance(text, str) for text in texts.values()):
            raise journal.damaged()
        missing = [number for number in range(len(answers)) if number not in texts]
        for start in range(0, len(missing), _PER_BATCH):
            numbers = missing[start : start + _PER_BATCH]
            batch = [(answers[number].question, answers[number].answer) for number in numbers]
            found = self.corrector.correct_batch(batch)
            # An unchanged answer is kept letter by letter, whatever the corrector's text says.
            new = [one.text if one.changed else answer for one, (_, answer) in zip(found, batch, strict=True)]
            journal.put(dict(zip(numbers, new, strict=True)))
            texts |= zip(numbers, new, strict=True)
            self.progress("correcting", len(texts), len(answers))
        rows = (replace(row, correction=texts[number]) for number, row in enumerate(answers))
        return CorrectionSet(tuple(rows), self.prompts.source)

    def _labels(self, rows: CorrectionSet) -> RowSet[Any]:
        """Return what is learned of a round's corrections; nothing where the corrector has changed nothing."""
        source = self.prompts.source
        pairs = [pair for row in rows if (pair := row.preference()) is not None]
        if not pairs or self.options.labels in ("dpo", "fpo"):
            return PreferenceSet(tuple(pairs), source)
        if self.options.labels == "var":
            return ScoredSet(tuple(map(Scored.from_preference, pairs)), source)
        labels = (Scored(row.question, (row.correction,), (1.0,), row.weight, (1.0,)) for row in rows)
        return ScoredSet(tuple(labels), source)
