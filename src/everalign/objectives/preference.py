"""Learning from pairs: the implicit margin, and the DPO and FPO losses of it.

Sources: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7 (margin and DPO);
Li et al. 2026, "LifeAlign", arXiv 2509.17183 (FPO, the focal form of DPO).

Every function takes and returns one value a pair, un-reduced, and computes in fp32 whatever the inputs'
type (in fp64 if they are fp64). Log-probabilities are in nats. `check_finite=False` leaves the search for NaN and
infinite values to the caller: on a GPU it would wait for everything that is still being computed.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from everalign.objectives.segments import finite_rows, full_precision, positive, same_shapes


def implicit_margin(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    check_finite: bool = True,
) -> Tensor:
    """How much more than the reference the policy prefers the chosen response, as a logit.

    margin = beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]        (DPO, eq. 7)

    Args:
        policy_chosen: `(B,)` log-probabilities of whole chosen responses, in nats, summed over their tokens.
        policy_rejected: `(B,)` the same for the rejected responses.
        reference_chosen: `(B,)` the same under the reference policy.
        reference_rejected: `(B,)` the same under the reference policy.
        beta: strength of the pull towards the reference, above 0.
        check_finite: refuse margins that are NaN or infinite.

    Returns:
        `(B,)` margins; positive where the policy ranks the pair more as wished than the reference does.

    Raises:
        ValueError: a margin is NaN or infinite (names the rows), shapes differ, or `beta` is not above 0.
    """
    positive(beta, "beta")
    same_shapes(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    chosen = full_precision(policy_chosen) - full_precision(reference_chosen)
    rejected = full_precision(policy_rejected) - full_precision(reference_rejected)
    margin = beta * (chosen - rejected)
    return finite_rows(margin, "margin") if check_finite else margin


def dpo_loss(margin: Tensor, check_finite: bool = True) -> Tensor:
    """DPO: `-log sigmoid(margin)`, `(B,)` -> `(B,)` in nats (DPO, eq. 7).

    Raises:
        ValueError: a margin is NaN or infinite; names the rows.
    """
    return -logsigmoid(full_precision(finite_rows(margin, "margin") if check_finite else margin))


def fpo_loss(margin: Tensor, gamma: float, check_finite: bool = True) -> Tensor:
    """FPO: `-(1 - sigmoid(margin))^gamma * log sigmoid(margin)`, `(B,)` -> `(B,)` in nats (LifeAlign).

    `gamma = 0` is DPO exactly. The gradient flows through the weight too, so that with s = sigmoid(margin)

        dL/dmargin = (1 - s)^gamma * [gamma * s * log s - (1 - s)]

    For gamma = 2 that is 0.597 of DPO's gradient at margin 0, up to 1.225 of it for badly ranked pairs
    (margin about -2.15), and next to nothing for well ranked ones (1e-4 at margin 5).

    Raises:
        ValueError: a margin is NaN or infinite (names the rows), or `gamma` is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number of at least 0, not {gamma}")
    # 1 - sigmoid(r) = sigmoid(-r), whose logarithm neither overflows nor cancels at either end.
    margin = full_precision(margin)
    weight = (gamma * logsigmoid(-margin)).exp()
    return weight * dpo_loss(margin, check_finite)
