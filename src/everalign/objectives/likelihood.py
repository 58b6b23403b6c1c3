"""Learning from good answers alone: the negative log-likelihood that supervised fine-tuning minimises."""

from torch import Tensor

from everalign.objectives.checks import finite_rows, full_precision, positive


def token_nll(sequence_logprobs: Tensor, normaliser: float | Tensor, check_finite: bool = True) -> Tensor:
    """Each response's share of the mean negative log-likelihood per token, `(B,)` -> `(B,)`, in nats.

    With `normaliser` the number of response tokens in the whole optimiser step, the sum of all the step's
    shares is its mean NLL per token, however the step was cut into micro-batches: every token counts the
    same, and eight accumulated batches teach what one batch of their rows does.

    Args:
        sequence_logprobs: `(B,)` log-probabilities of whole responses, in nats, summed over their tokens.
        normaliser: number of response tokens to divide by, above 0.
        check_finite: look at the values; without it nothing waits for a GPU to compute them.

    Raises:
        ValueError: a log-probability is NaN or infinite (names the rows), or `normaliser` is not above 0.
    """
    if check_finite:
        positive(float(normaliser), "normaliser")
        finite_rows(sequence_logprobs, "log-probability")
    return -full_precision(sequence_logprobs) / normaliser
