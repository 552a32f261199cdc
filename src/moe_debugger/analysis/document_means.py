"""Means over tokens, with intervals from whole documents: tokens of one document are not independent.

Example: values [1, 0, 1, 1] in documents [0, 0, 1, 1] have mean 0.75; with two documents there is no interval.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.intervals import MIN_BLOCKS, Interval, effective_number, student_quantile

__all__ = ["UNKNOWN_INTERVAL", "DocumentMean", "document_mean", "ratio_interval"]

_NAN = float("nan")
_Floats = npt.NDArray[np.float64]
UNKNOWN_INTERVAL = Interval(_NAN, _NAN)


@dataclass(frozen=True, slots=True)
class DocumentMean:
    """A mean over tokens.

    Attributes:
        value: NaN where there is no token.
        interval: two-sided 95 % from documents; NaN with fewer than 4 documents' worth (Kish's effective number).
        num_tokens: sample size; num_documents: how many documents they come from.
    """

    value: float
    interval: Interval
    num_tokens: int
    num_documents: int


def document_mean(values: npt.NDArray[np.float64], document: npt.NDArray[np.int64]) -> DocumentMean:
    """Return the mean of `values` in 0..1 with its interval, that of `ratio_interval` mostly.

    Where documents do not differ at all (a rate of 0 or of 1, mostly) their spread says nothing; then the interval is
    Wilson's with each document as a single observation, which is right however dependent its tokens are.

    Args:
        values: [n] float64, each in 0..1.
        document: [n] int64, 0...
    """
    if not len(values):
        return DocumentMean(_NAN, UNKNOWN_INTERVAL, 0, 0)
    sizes = np.bincount(document).astype(np.float64)
    sums = np.bincount(document, weights=values)[sizes > 0].astype(np.float64)
    sizes = sizes[sizes > 0]
    mean, interval = float(values.mean()), ratio_interval(sums, sizes, highest=1.0)
    if math.isnan(interval.lower) and effective_number(sizes) >= MIN_BLOCKS:
        interval = _wilson(mean, effective_number(sizes))
    return DocumentMean(mean, interval, len(values), len(sizes))


def ratio_interval(sums: _Floats, sizes: _Floats, *, highest: float = math.inf) -> Interval:
    """Return the 95 % interval of the mean ``sums.sum() / sizes.sum()`` of values of at least 0, from documents.

    A ratio over documents (Cochran 1977, eq. 6.13), with Student's quantile.

    Args:
        sums: [d] float64, sum of the values of each document (or of groups of whole documents).
        sizes: [d] float64 above 0, how many values that is.
        highest: what a value can be at most.

    Returns:
        NaN with fewer than 4 documents' worth (Kish's effective number), or where they do not differ at all.
    """
    num, kish = len(sizes), effective_number(sizes)
    if kish < MIN_BLOCKS:
        return UNKNOWN_INTERVAL
    mean = float(sums.sum() / sizes.sum())
    spread = float(np.square(sums - mean * sizes).sum())
    if spread <= 1e-18 * sizes.sum() ** 2:
        return UNKNOWN_INTERVAL
    width = student_quantile(kish - 1) * math.sqrt(num / (num - 1) * spread) / float(sizes.sum())
    return Interval(max(mean - width, 0.0), min(mean + width, highest))


def _wilson(rate: float, num: float) -> Interval:
    z = 1.959963984540054
    centre = (rate + z * z / (2 * num)) / (1 + z * z / num)
    width = z / (1 + z * z / num) * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return Interval(max(centre - width, 0.0), min(centre + width, 1.0))
