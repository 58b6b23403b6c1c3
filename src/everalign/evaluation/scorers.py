"""Scorers, which give answers their rewards: a reward model, a Python function, or an LLM judge."""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from everalign.data.messages import Completion, Prompt, completion_column
from everalign.data.readers import load_preferences
from everalign.data.records import PreferenceSet
from everalign.data.tokenization import tokenize_answers
from everalign.errors import EveralignError, InputError
from everalign.evaluation.judge import JudgeOptions, JudgeScorer
from everalign.modeling.loading import model_fingerprint
from everalign.modeling.reward_model import RewardFacts, RewardNetwork, load_reward_model, sequence_rewards
from everalign.modeling.runtime import prepare_process
from everalign.notebook import default_progress
from everalign.storage import sha256_of
from everalign.training.options import TOKENS_PER_BATCH, RewardOptions
from everalign.training.reward_model import train_reward_model

RewardFunction = Callable[[list[Any], list[Any]], list[float]]


class Scorer(Protocol):
    """Gives answers their rewards. Callers validate them with `checked_rewards`."""

    @property
    def fingerprint(self) -> str:
        """Names everything that rewards depend on: scorers with the same fingerprint give the same rewards."""
        ...

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """Returns one finite number for each of N completions, larger for better ones.

        Args:
            prompts: N prompts, text or chat messages, one for each completion.
            completions: N answers.
        """
        ...


class RewardModel:
    """A reward model, which gives answers their rewards; the mean reward of its training answers is subtracted.

    reward = RewardModel.from_folder("runs/reward")
    reward.score(["Is the sea salty?"], ["Yes."])

    Args:
        model: the classifier.
        tokenizer: its tokenizer.
        facts: mean reward, length limit and template of its training.
        tokens_per_batch: tokens computed at once, padding included; fewer save memory and change no result.

    Attributes:
        fingerprint: sha256 over weights, mean, length limit and template.
        cut: number of answers that were too long with their prompts, and scored without their ends.
    """

    def __init__(
        self, model: RewardNetwork, tokenizer: Any, facts: RewardFacts, tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> None:
        self._model, self._tokenizer, self._facts = model.eval(), tokenizer, facts
        self._tokens_per_batch, self.cut = tokens_per_batch, 0
        content = f"{model_fingerprint(model)} {facts.mean!r} {facts.max_length} {facts.template}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def train(
        cls, model: str, pairs: Any, output: str | os.PathLike[str], *, test: Any = None, **arguments: Any
    ) -> "RewardModel":
        """Trains a reward model on preferences, writes its folder, and loads it.

            reward = RewardModel.train("tiny", "pairs.csv", "runs/reward", test="pairs.test.csv", learning_rate=1e-3)
            reward.score(["Is the sea salty?"], ["Yes."])

        Args:
            model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`.
            pairs: what `load_preferences` returns, or takes: a path, a list of dictionaries, a DataFrame, ...
            output: the reward model's folder; must be empty or not exist yet.
            test: held-out pairs, for the report.
            arguments: those of `train_reward_model`, which also returns the report, or single options of
                `RewardOptions`, such as `epochs=2` and `lora_rank=16`.

        Raises:
            InputError: pairs, options or model cannot be used.
        """
        arguments = RewardOptions.gather(arguments)
        arguments.setdefault("progress", default_progress())
        rows = pairs if isinstance(pairs, PreferenceSet) else load_preferences(pairs)
        if test is not None:
            arguments["test"] = test if isinstance(test, PreferenceSet) else load_preferences(test)
        return cls.from_folder(train_reward_model(model, rows, output, **arguments).path)

    def __repr__(self) -> str:
        return f"RewardModel(base_model={self._facts.base_model!r}, max_length={self._facts.max_length})"

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], tokens_per_batch: int = TOKENS_PER_BATCH) -> "RewardModel":
        """Loads a reward model's folder, onto the GPU if there is one; errors as in `load_reward_model`."""
        if tokens_per_batch < 1:
            raise InputError(f"tokens per batch: must be at least 1, found {tokens_per_batch}")
        prepare_process()
        return cls(*load_reward_model(Path(folder)), tokens_per_batch)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """Returns the centred rewards of N completions; none depends on the others, but for rounding.

        Raises:
            InputError: an answer cannot be rendered by the chat template.
            EveralignError: a reward is NaN or infinite.
        """
        rows, cut = tokenize_answers(prompts, completions, self._tokenizer, self._facts.max_length)
        self.cut += cut
        rewards = sequence_rewards(self._model, rows, self._tokens_per_batch)
        return [reward - self._facts.mean for reward in rewards.double().tolist()]

    def cut_note(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[str]:
        """Returns a line on how many of N answers are scored without a part of them or of their prompts, if any is."""
        _, cut = tokenize_answers(prompts, completions, self._tokenizer, self._facts.max_length)
        if not cut:
            return []
        return [
            f"{cut} of {len(completions)} answers are cut, with their prompts, to the {self._facts.max_length} tokens "
            "that the reward model reads: train one with more --max-length"
        ]


@dataclass(frozen=True, eq=False)
class CallableScorer:
    """A Python function `f(prompts, completions) -> rewards` over lists.

    A prompt is passed as text or as a list of messages, as the row has it.

    Args:
        function: the function.
        fingerprint: its name; change it with the function.
    """

    function: RewardFunction
    fingerprint: str

    @classmethod
    def from_name(cls, name: str) -> "CallableScorer":
        """Imports `module:function`, also from the working directory.

        The fingerprint is the name with the sha256 of the function's file, so that an edited function is another one.

        Raises:
            InputError: there is no such module or function, or it is not callable.
        """
        module_name, _, function_name = name.partition(":")
        if not module_name or not function_name:
            raise InputError(f"{name}: must be module:function, such as mypackage.scoring:helpfulness")
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except ImportError as error:
            raise InputError(f"{name}: cannot import the module {module_name}: {error}") from error
        except AttributeError as error:
            raise InputError(f"{name}: {error}") from error
        if not callable(function):
            raise InputError(f"{name}: is not a function but {type(function).__name__}")
        try:
            path = inspect.getsourcefile(inspect.unwrap(function))
        except TypeError:
            path = None  # a C extension
        return cls(function, f"{name} {sha256_of(Path(path)) if path and Path(path).is_file() else ''}")

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """Returns what the function returns, unchecked.

        Raises:
            EveralignError: the function raised an exception.
        """
        given = [prompt if isinstance(prompt, str) else [dict(message) for message in prompt] for prompt in prompts]
        try:
            return self.function(given, [completion_column(completion) for completion in completions])
        except Exception as error:
            raise EveralignError(f"the function raised {type(error).__name__}: {error}") from error


def make_scorer(name: str, tokens_per_batch: int | None = None, judge: JudgeOptions | None = None) -> Scorer:
    """Returns the scorer of a name.

    Args:
        name: a reward model's folder, `module:function`, or a judge as `URL#MODEL`.
        tokens_per_batch: for a reward model; its default when None.
        judge: for a judge; its defaults when None.

    Raises:
        InputError: there is no such scorer, or it would ignore one of the options.
    """
    if "://" in name:
        if tokens_per_batch is not None:
            raise InputError("tokens per batch: a judge would ignore it; leave it out")
        return JudgeScorer.from_name(name, judge)
    if judge is not None and judge.given:
        raise InputError(f"{judge.given[0]}: {name} would ignore it; only a judge (URL#MODEL) has it, so leave it out")
    if Path(name).exists() or ":" not in name:
        return RewardModel.from_folder(name, TOKENS_PER_BATCH if tokens_per_batch is None else tokens_per_batch)
    if tokens_per_batch is not None:
        raise InputError(f"tokens per batch: the function {name} would ignore it; leave it out")
    return CallableScorer.from_name(name)
