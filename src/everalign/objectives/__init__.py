"""What one batch teaches: pure, un-reduced functions of small tensors, on top of torch alone."""

from everalign.objectives.preference import (
    bradley_terry_loss,
    calibrating_temperature,
    dpo_loss,
    focalpo_loss,
    fpo_gradient_at_zero,
    fpo_loss,
    hybrid_margin,
    implicit_margin,
    pair_calibration_error,
)
from everalign.objectives.var_weights import (
    Estimator,
    VarWeights,
    cross_weights,
    global_scale,
    solve_temperature,
    var_weights,
)
from everalign.objectives.weighted import WeightStatistics, snkl_loss, token_nll, weight_statistics, weighted_nll

__all__ = [
    "Estimator",
    "VarWeights",
    "WeightStatistics",
    "bradley_terry_loss",
    "calibrating_temperature",
    "cross_weights",
    "dpo_loss",
    "focalpo_loss",
    "fpo_gradient_at_zero",
    "fpo_loss",
    "global_scale",
    "hybrid_margin",
    "implicit_margin",
    "pair_calibration_error",
    "snkl_loss",
    "solve_temperature",
    "token_nll",
    "var_weights",
    "weight_statistics",
    "weighted_nll",
]
