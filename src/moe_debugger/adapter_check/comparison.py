"""Where the adapter's word and the experiment differ, and which mistake that looks like."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .claims import Claims
from .replay import Measurement

__all__ = ["compare_ids", "compare_weights"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# A shifted copy fits nearly everywhere; what does not are experts that were not silenced, and the ends.
_FITS = 0.95
_MAX_SHIFT = 8


def compare_ids(claims: Claims, measured: Measurement, expert_ids: Sequence[int], row_length: int) -> list[str]:
    """Return what is wrong with the ids; `row_length` tokens are one text, 0 where that is not known."""
    said = claims.used[:, expert_ids]
    # An expert that adds nothing, by its weight or by its output, cannot be seen.
    is_unseen = said & (np.abs(claims.weights[:, expert_ids]) <= measured.least_weight)
    differs = (said != measured.used) & ~is_unseen
    if not differs.any():
        return []
    token = int(differs.any(axis=1).argmax())
    where = f"token {token}" + (f" (text {token // row_length}, position {token % row_length})" if row_length else "")
    num_tokens = int(differs.any(axis=1).sum())
    text = (
        f"the experts of {num_tokens} of {len(said)} tokens are wrong. {where[0].upper()}{where[1:]}: the adapter said "
        f"{_experts(said[token], expert_ids)}, the oracle saw {_experts(measured.used[token], expert_ids)} move the "
        f"output. {_id_hint(said, measured.used, differs)}"
    )
    return [text]


def _experts(row: Bools, expert_ids: Sequence[int]) -> str:
    ids = [str(expert_ids[int(column)]) for column in np.flatnonzero(row)]
    return f"expert{'' if len(ids) == 1 else 's'} {', '.join(ids)}" if ids else "no expert"


def _id_hint(said: Bools, used: Bools, differs: Bools) -> str:
    for shift in (*range(1, _MAX_SHIFT + 1), *range(-1, -_MAX_SHIFT - 1, -1)):
        if said.shape[1] > abs(shift) and _fits(np.roll(said, shift, axis=1), used):
            # A roll around the end is the same shift from the other side, so the order of the loop decides.
            return f"Every id is {abs(shift)} too {'low' if shift > 0 else 'high'}: count experts from 0"
        if len(said) > abs(shift) and _fits(np.roll(said, shift, axis=0), used):
            return f"The rows are shifted by {-shift}: row i must be token i of the forward, padded ones included"
    if not (used & differs).any():
        return (
            "All that moved was said, and more: a slot that reached no expert (capacity, padding) must be -1, or False "
            "in the routing map; what the router meant to choose belongs into intended_expert_ids"
        )
    if not (said & differs).any():
        return "All that was said moved, and more did: is top_k too small, or a part of the routes left out?"
    return (
        "These are not the ids that the experts get: is the choice made elsewhere (from biased or grouped scores, "
        "say), or are experts numbered differently in expert_output_weights?"
    )


def _fits(said: Bools, used: Bools) -> bool:
    return bool((said == used).all(axis=1).mean() >= _FITS and used.any())


def compare_weights(
    claims: Claims, measured: Measurement, expert_ids: Sequence[int], tolerance: float, scale: float
) -> tuple[float, list[str]]:
    """Return the largest relative error of the weights (NaN where none was measured), and what is wrong with them.

    Args:
        scale: what the block multiplies the sum of the experts' outputs by afterwards.
    """
    if measured.failure:
        return float("nan"), [measured.failure]
    said = claims.weights[:, expert_ids]
    compared = claims.used[:, expert_ids] & measured.used & np.isfinite(measured.weights)
    if not compared.any():
        return float("nan"), []
    rest = measured.unexplained[compared]
    if float(rest.max()) > 8 * tolerance:
        return float("nan"), [
            f"{float(rest.max()):.1%} of a contribution is no multiple of what expert_output gives: is it what the "
            "layer multiplies by the weight and adds, for the hidden states that the layer was called with?"
        ]
    # Changed weights say nothing of what comes after: there, the scale is in both.
    weights = measured.weights / (scale if measured.proof == "expert_output" else 1.0)
    lost = np.where(np.isfinite(measured.least_weight), measured.least_weight, 0)
    error = np.maximum(np.abs(weights - said) - lost, 0) / np.maximum(np.abs(weights), np.abs(said))
    worst = float(error[compared].max())
    if worst <= tolerance:
        return worst, []
    token, column = np.unravel_index(np.where(compared, error, -1).argmax(), error.shape)
    num_wrong = int((error[compared] > tolerance).sum())
    return worst, [
        f"{num_wrong} of {int(compared.sum())} weights are wrong. Token {token}, expert {expert_ids[int(column)]}: the "
        f"adapter said {said[token, column]:.6g}, the oracle measured {weights[token, column]:.6g} (rounding: "
        f"{tolerance:.0e}). {_weight_hint(weights, said, compared, tolerance)}"
    ]


def _weight_hint(weights: Floats, said: Floats, compared: Bools, tolerance: float) -> str:
    ratio = np.where(compared & (said != 0), weights / np.where(said == 0, 1, said), np.nan)
    known = ratio[np.isfinite(ratio)]
    if len(known) and np.ptp(known) <= 4 * tolerance * np.abs(known).max():
        return (
            f"Every weight is off by the factor {float(np.median(known)):.4g}: if the block multiplies the sum "
            "afterwards, describe it as block_scale; else read the weights after they are scaled"
        )
    several = np.isfinite(ratio).sum(axis=1) > 1
    if several.any():
        spread = np.nanmax(ratio[several], axis=1) - np.nanmin(ratio[several], axis=1)
        if float(np.max(spread / np.abs(np.nanmax(ratio[several], axis=1)))) <= 4 * tolerance:
            return (
                "Within each token they are off by one factor: read the weights after (or before) they are normalised "
                "over the token's experts"
            )
    return "These are not the weights that the experts' outputs are multiplied by: read them where the layer uses them"
