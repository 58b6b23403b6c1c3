"""A policy small enough to list every response: two tokens and an end, at most three tokens, two prompts."""

import itertools

import torch
from torch import Tensor

PROMPTS = 2
END = 2
# The 15 responses: up to two tokens and the end, or three tokens, after which nothing else can come.
RESPONSES = [
    (*tokens, END) if count < 3 else tokens
    for count in range(4)
    for tokens in itertools.product(range(2), repeat=count)
]
LENGTHS = torch.tensor([len(response) for response in RESPONSES])
_PREFIXES = {prefix: i for i, prefix in enumerate(sorted({r[:n] for r in RESPONSES for n in range(len(r))}))}


def random_logits(seed: int, scale: float = 1.0) -> Tensor:
    """`(2, 7, 3)`: next-token logits of each prompt after each possible beginning of a response."""
    shape = (PROMPTS, len(_PREFIXES), END + 1)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def sequence_logprobs(logits: Tensor) -> Tensor:
    """`(2, 15)` log-probabilities of all responses, summed over their tokens; they sum to one for each prompt."""
    tokens = logits.log_softmax(-1)
    return torch.stack([sum(tokens[:, _PREFIXES[r[:n]], r[n]] for n in range(len(r))) for r in RESPONSES], dim=1)


def optimal_logprobs(reference: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """log pi* of the closed form pi_ref exp(r / temperature) / Z."""
    return (reference + rewards / temperature).log_softmax(-1)


def divergence(target: Tensor, found: Tensor) -> float:
    """KL(target || found) of log-probabilities over the last dimension, the largest of all prompts'."""
    return (target.exp() * (target - found)).sum(-1).max().item()


def minimise(loss, start: Tensor) -> Tensor:
    """The minimiser of `loss(parameters)`, by L-BFGS in double precision."""
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        history_size=100,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimiser.step(closure)
    return parameters.detach()


def weighted_counts(groups: Tensor, actions: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    """The exact optimum of weighted fine-tuning over all distributions: `(S,)` log-probabilities.

    Row i holds action `actions[i]` of tuple `groups[i]`, which has probability `probabilities[groups[i]]`.
    """
    mass = torch.zeros(int(actions.max()) + 1, dtype=torch.float64)
    mass.index_add_(0, actions, probabilities[groups] * weights)
    return (mass / mass.sum()).log()


def all_tuples(policy: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every tuple of `size` independent draws from `(S,)` probabilities: groups, actions, tuple probabilities."""
    tuples = torch.cartesian_prod(*[torch.arange(len(policy))] * size).reshape(-1, size)
    groups = torch.arange(len(tuples)).repeat_interleave(size)
    return groups, tuples.flatten(), policy[tuples].prod(dim=1)
