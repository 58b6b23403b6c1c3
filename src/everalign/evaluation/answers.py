"""What a policy answers to held-out prompts, and what the answers are worth.

`write_answers` writes greedy answers, many at a time, and keeps them. The rest says what can be said of them:
similarity to references, rewards, win rates, distance from the base model, log-likelihoods of known answers.
Intervals are 95% bootstrap intervals over prompts; they say nothing of other seeds or other tasks.

Longer answers win more often, whoever judges. The length-controlled win rate is what a logistic regression of the
outcome on the difference in length predicts where there is none (Dubois et al. 2024, "Length-controlled AlpacaEval").
AlpacaEval 2 also fits how hard each instruction is, over many models; with two models there is nothing to fit it by,
and it is left out here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from everalign.data.chat_tokens import ChatFormat
from everalign.data.messages import Completion, Prompt, completion_text
from everalign.data.tokenization import TokenizedRow, truncate
from everalign.errors import InputError
from everalign.evaluation.judge import JudgeScorer, UnreadableReplyError
from everalign.evaluation.preference import mean_kl
from everalign.evaluation.scorers import Scorer
from everalign.evaluation.scoring import checked_rewards, compare_answers
from everalign.evaluation.statistics import Interval, bootstrap, bootstrap_mean
from everalign.evaluation.text_metrics import BleuCounts, compat_bleu, compat_rouge_l, rouge_l
from everalign.memory import LowRankUpdate
from everalign.modeling.policy import Policy
from everalign.modeling.sampling import check_prompts, greedy_answers
from everalign.options import SamplingOptions
from everalign.storage import Journal
from everalign.training.reference import sequence_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Args:
        text: without its end mark.
        ended: whether it ended within the limit of tokens.
    """

    text: str
    ended: bool


@dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out prompt, with what is known to be a good and a worse answer to it.

    Args:
        prompt: text, or chat messages.
        reference: a good answer; None where none is known.
        rejected: a worse answer; None where none is known.
    """

    prompt: Prompt
    reference: Completion | None = None
    rejected: Completion | None = None


@dataclass(frozen=True)
class ResponseLogProbs:
    """Log-likelihood per token, in nats, of given answers under a policy.

    Args:
        values: of each of N answers.
        tokens: number of tokens of each answer, its end mark included.
    """

    values: tuple[float, ...]
    tokens: tuple[int, ...]

    def change_since(self, before: "ResponseLogProbs") -> Interval:
        """What learning has changed of the mean log-likelihood per token since the same answers were scored before."""
        return bootstrap_mean([now - then for now, then in zip(self.values, before.values, strict=True)])

    def perplexity(self) -> Interval:
        """The policy's perplexity: exp of the negative log-likelihood per token, over all tokens."""
        tokens = torch.tensor(self.tokens, dtype=torch.float64).numpy()
        total = torch.tensor(self.values, dtype=torch.float64).numpy() * tokens
        found = bootstrap(len(tokens), lambda weights: -(weights @ total) / (weights @ tokens))
        return Interval(*(math.exp(min(value, 700.0)) for value in found))


def write_answers(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    journal: Journal,
    name: str,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Writes the greedy answer to every prompt with the adapters that are on now, or takes it from the journal.

    Args:
        policy: what answers.
        tokenizer: the model's.
        prompts: N prompts.
        journal: keeps the answers after every batch; a killed call continues there.
        name: identifies the policy in the journal: its weights, and how it is computed.
        max_new_tokens: longest answer.
        max_prompt_tokens: longer prompts are an error.
        progress: called with the prompts done and their number.

    Raises:
        InputError: a prompt is too long or cannot be rendered, before any is answered.
    """
    options = SamplingOptions(completions=1, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens)
    check_prompts(tokenizer, prompts, options)
    form = ChatFormat(tokenizer)
    facts = [json.dumps([name, max_new_tokens, ids]) for ids in form.encode_prompts(prompts)]
    keys = [hashlib.sha256(one.encode()).hexdigest() for one in facts]
    found = journal.read(keys)
    missing = list({key: i for i, key in enumerate(keys) if key not in found}.items())
    # Prompts of one length are padded least.
    missing.sort(key=lambda item: len(str(prompts[item[1]])))
    for start in range(0, len(missing), PROMPTS_AT_ONCE):
        batch = missing[start : start + PROMPTS_AT_ONCE]
        written = greedy_answers(policy, tokenizer, [prompts[i] for _, i in batch], options)
        fresh = {key: [text, ended] for (key, _), (text, ended) in zip(batch, written, strict=True)}
        journal.put(fresh)
        found |= fresh
        progress(len(keys) - len(missing) + start + len(batch), len(keys))
    return [Answer(*found[key]) for key in keys]


def response_log_probs(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    responses: Sequence[Completion],
    *,
    max_length: int,
    tokens_per_batch: int,
) -> ResponseLogProbs:
    """Scores given answers under the policy as it is; long ones are cut to `max_length`."""
    rows = _rows(tokenizer, prompts, responses, max_length)
    lengths = [len(row.responses[0]) for row in rows]
    sums = sequence_logprobs(policy, rows, tokens_per_batch)
    return ResponseLogProbs(tuple(s.item() / n for s, n in zip(sums, lengths, strict=True)), tuple(lengths))


def kl_to_base(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    *,
    max_length: int,
) -> Interval:
    """Returns how far the policy is from its base model on its own greedy answers, nats per token.

    The estimator: at each position of an answer KL(policy ‖ base) of the two next-token distributions, exactly; its
    mean over the answer's positions; the mean of these over prompts. Greedy answers are no samples of the policy, so it
    is drift along the answers that users get, not the KL of whole sequences.
    """
    found = [kl for kl in answer_kls(policy, tokenizer, prompts, answers, max_length=max_length) if kl is not None]
    if not found:
        raise InputError("the policy has written nothing to any prompt: there is no answer to measure its KL on")
    return bootstrap_mean(found)


def answer_kls(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    *,
    max_length: int,
) -> list[float | None]:
    """Returns for each answer the mean of `kl_to_base` over its positions; None for an empty one."""
    given = [(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True) if answer.text]
    rows = _rows(tokenizer, [prompt for prompt, _ in given], [text for _, text in given], max_length)
    base: dict[str, LowRankUpdate] = {}
    with policy.as_snapshot(base):  # once for all
        measured = iter([mean_kl(policy, base, [row]) for row in rows])
    return [next(measured) if answer.text else None for answer in answers]


def _rows(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], responses: Sequence[Completion], max_length: int
) -> list[TokenizedRow]:
    encoded = ChatFormat(tokenizer).encode(prompts, [(one,) for one in responses], lambda i: f"prompt {i + 1}")
    rows = []
    for number, (prompt, answers) in enumerate(encoded):
        short, kept = truncate(prompt, answers, max_length, tokenizer.bos_token_id)
        rows.append(TokenizedRow(str(number), short, kept, (1.0,)))
    return rows


def text_similarity(answers: Sequence[str], references: Sequence[str], *, compat: bool = False) -> dict[str, Interval]:
    """Returns `bleu` and `rouge_l`, or `compat_bleu` and `compat_rouge_l`, in %; see `text_metrics`.

    Raises:
        InputError: a package is missing, or the numbers differ.
    """
    if compat:
        pairs = list(zip(answers, references, strict=True))
        return {
            "compat_bleu": bootstrap_mean([compat_bleu(*pair) for pair in pairs]),
            "compat_rouge_l": bootstrap_mean([compat_rouge_l(*pair) for pair in pairs]),
        }
    counts = BleuCounts.of(answers, references)
    return {
        "bleu": bootstrap(len(answers), counts.scores),
        "rouge_l": bootstrap_mean(rouge_l(answers, references)),
    }


def reference_texts(prompts: Sequence[HeldOutPrompt]) -> list[str] | None:
    """Returns the references as text; None if a prompt has none."""
    texts = [None if one.reference is None else completion_text(one.reference) for one in prompts]
    return None if any(text is None for text in texts) else [text for text in texts if text is not None]


Array = NDArray[np.float64]

# Ridge penalties on intercept and slope: without them the fit to outcomes that never differ runs to infinity.
_RIDGE = np.array([0.01, 0.1])
_STEPS = 60
_LARGEST_STEP = 2.0
_ENOUGH = 1e-10


@dataclass(frozen=True)
class WinRate:
    """How often one model's answers beat another's.

    Args:
        win_rate: share of prompts won; ties, which include equal answers and verdicts that change with the order in
            which a judge reads the answers, count half.
        length_controlled: the same for answers of equal length.
        prompts: number of prompts with a verdict.
        ties: how many of them were ties.
        failed: number of prompts whose verdict the judge did not give in a form that could be read; left out.
    """

    win_rate: Interval
    length_controlled: Interval
    prompts: int
    ties: int
    failed: int


def win_rate(
    scorer: Scorer, prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[str], *, seed: int = 0
) -> WinRate:
    """Compares N answers with N others by a reward model, a function, or an LLM judge that reads both orders.

    Raises:
        InputError: there are no prompts, or no verdict could be read.
        EveralignError: the scorer failed. What a judge with a cache has said until then is kept.
    """
    if not prompts:
        raise InputError("a win rate needs at least one prompt")

    def compare(numbers: Sequence[int]) -> list[float]:
        first, second = ([texts[i] for i in numbers] for texts in (others, answers))
        return [float(verdict) for verdict in compare_answers(scorer, [prompts[i] for i in numbers], first, second)]

    found = readable(scorer, len(prompts), compare)
    verdicts = [(number, verdict) for number, verdict in enumerate(found) if verdict is not None]
    if not verdicts:
        raise InputError(
            f"none of {len(prompts)} verdicts could be read: take a judge that follows instructions better"
        )
    outcomes = np.array([(1 + verdict) / 2 for _, verdict in verdicts])
    lengths = np.array([len(answers[number]) - len(others[number]) for number, _ in verdicts], dtype=np.float64)
    count = len(outcomes)
    return WinRate(
        bootstrap(count, lambda weights: weights @ outcomes / count, seed=seed),
        bootstrap(count, lambda weights: length_controlled(outcomes, lengths, weights), seed=seed),
        count,
        int((outcomes == 0.5).sum()),
        len(prompts) - count,
    )


def judged_scores(scorer: Scorer, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
    """Returns the reward of each of N answers, None where a judge's score could not be read; errors as in `score`."""

    def score(numbers: Sequence[int]) -> list[float]:
        found = scorer.score([prompts[i] for i in numbers], [answers[i] for i in numbers])
        return checked_rewards(found, [(i + 1, 0) for i in numbers])

    return readable(scorer, len(prompts), score)


def readable(scorer: Scorer, count: int, ask: Callable[[Sequence[int]], list[float]]) -> list[float | None]:
    """Asks for all of `count` rows at once; if a judge's reply cannot be read, row by row, and None for such a row.

    What the judge has replied is in its cache by then.
    """
    everything = range(count)
    try:
        return list[float | None](ask(everything))
    except UnreadableReplyError:
        if not isinstance(scorer, JudgeScorer) or scorer.cache is None:
            raise
    found: list[float | None] = []
    for number in everything:
        try:
            found += ask([number])
        except UnreadableReplyError:
            found.append(None)
    return found


def length_controlled(outcomes: Array, lengths: Array, weights: Array | None = None) -> Array:
    """Returns the win rate at equal length: σ(a) of the logistic regression σ(a + b · tanh(d / s)) of the outcomes.

    d is the difference in length and s its standard deviation, as in AlpacaEval 2.

    Args:
        outcomes: (N,) 1 for a win, ½ for a tie, 0 for a loss.
        lengths: (N,) length of the answer less that of the other.
        weights: (B, N) how often row n counts in fit b; each once, in a single fit, when None.

    Returns:
        (B,) win rates.
    """
    weights = np.ones((1, len(outcomes))) if weights is None else weights
    spread = lengths.std()
    scaled = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    features = np.stack([np.ones_like(scaled), scaled], axis=1)
    found = np.zeros((len(weights), 2))
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-found @ features.T))
        gradient = (weights * (outcomes - chance)) @ features - _RIDGE * found
        curvature = np.einsum("bn,ni,nj->bij", weights * chance * (1 - chance), features, features) + np.diag(_RIDGE)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        found += np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        if np.abs(step).max() < _ENOUGH:
            break
    return 1 / (1 + np.exp(-found[:, 0]))
