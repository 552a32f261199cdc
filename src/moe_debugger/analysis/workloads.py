"""The kinds of text that a layer's tokens came from, by the labels of a sample of requests.

A workload is a label with requests of its own, so that what two workloads show is not one text under two names: a
request has one label, that of its first labelled token (by position). Rows without a label take no part.

A request is kept where its hash is among the R smallest. Its label is that of a minimum, its tokens are a sum, so the
sample is the same for any split and order of the rows. Up to R requests all are there.

Example: request 1 has the labels a, b, a, request 2 has b, b: one request with 3 tokens is of workload a, one of b.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._row_runs import run_starts

__all__ = ["MIN_WORKLOAD_REQUESTS", "MIN_WORKLOAD_TOKENS", "SAMPLE_REQUESTS", "WorkloadSample"]

# 1024 requests hold 25 of a label that 2.5 % of them have, and take 32 kB a layer.
SAMPLE_REQUESTS = 1024
# Fewer requests are single texts, no kind of text; fewer tokens do not show what a router does with it.
MIN_WORKLOAD_REQUESTS = 5
MIN_WORKLOAD_TOKENS = 250

_U64 = npt.NDArray[np.uint64]


@dataclass(slots=True)
class WorkloadSample:
    """Labels of sampled requests at one layer.

    Attributes:
        requests: [r] uint64 hashes of requests, ascending.
        positions: [r] uint64, position of the request's first labelled token.
        labels: [r] uint64 hash of that token's label.
        num_tokens: [r] uint64, labelled valid tokens.
    """

    requests: _U64
    positions: _U64
    labels: _U64
    num_tokens: _U64

    @classmethod
    def empty(cls) -> Self:
        """Return the sample of a layer that has seen no label."""
        return cls(*(np.zeros(0, np.uint64) for _ in range(4)))

    @property
    def num_workloads(self) -> int:
        """Labels of 5 requests at least, which have 250 labelled tokens together."""
        labels, index = np.unique(self.labels, return_inverse=True)
        requests = np.bincount(index, minlength=len(labels))
        tokens = np.bincount(index, self.num_tokens, minlength=len(labels))
        return int(((requests >= MIN_WORKLOAD_REQUESTS) & (tokens >= MIN_WORKLOAD_TOKENS)).sum())

    def fold(self, requests: _U64, positions: _U64, labels: _U64) -> None:
        """Add rows, in place.

        Args:
            requests: [n] hash of each row's request.
            positions: [n].
            labels: [n] hash of the row's label.
        """
        if not len(requests):
            return
        starts = run_starts(requests, labels)
        tokens = np.diff(starts, append=len(requests)).astype(np.uint64)
        self._add(requests[starts], np.minimum.reduceat(positions, starts), labels[starts], tokens)

    def _add(self, requests: _U64, positions: _U64, labels: _U64, num_tokens: _U64) -> None:
        if not len(requests):
            return
        requests, positions, labels, num_tokens = (
            np.concatenate(pair)
            for pair in (
                (self.requests, requests),
                (self.positions, positions),
                (self.labels, labels),
                (self.num_tokens, num_tokens),
            )
        )
        # Two labels at one position (the rows contradict each other) are in order, so that ties have one order, too.
        order = np.lexsort((labels, positions, requests))
        starts = run_starts(requests[order])
        firsts = order[starts][:SAMPLE_REQUESTS]
        self.requests, self.positions, self.labels = requests[firsts], positions[firsts], labels[firsts]
        self.num_tokens = np.add.reduceat(num_tokens[order], starts)[:SAMPLE_REQUESTS]

    def merge(self, other: "WorkloadSample") -> "WorkloadSample":
        """Return the sample of both sets of rows."""
        merged = WorkloadSample(self.requests, self.positions, self.labels, self.num_tokens)
        merged._add(other.requests, other.positions, other.labels, other.num_tokens)
        return merged
