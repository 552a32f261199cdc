"""What became of the slots of decisions: the one place that tells load from everything else.

Every slot is exactly one of these, so they add up to rows times k:

    load       reached a routed expert: status ROUTED (or none given) and an id in 0..E-1.
    identity   chose an identity ("zero") expert: status IDENTITY, or an id from E on.
    dropped    a full expert turned it away. skipped: the layer decided not to compute it.
    unused     the rest: slots that the router left empty.

Example: E = 4, ids [[0, 4], [2, -1]], status [[ROUTED, IDENTITY], [ROUTED, DROPPED]] is 2 load, 1 identity, 1 dropped.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["SlotClasses"]


@dataclass(frozen=True, slots=True)
class SlotClasses:
    """The slots of [n, k] ids by class.

    Attributes:
        is_load: [n, k] bool.
    """

    is_load: npt.NDArray[np.bool_]
    num_identity: int
    num_dropped: int
    num_skipped: int
    num_unused: int

    @property
    def num_load(self) -> int:
        """Slots that are load."""
        others = self.num_identity + self.num_dropped + self.num_skipped + self.num_unused
        return self.is_load.size - others

    @classmethod
    def of(
        cls, expert_ids: npt.NDArray[np.int32], slot_status: npt.NDArray[np.uint8] | None, num_experts: int
    ) -> "SlotClasses":
        """Return the classes of slots.

        Args:
            expert_ids: [n, k], -1 where there is none, from `num_experts` on for identity experts.
            slot_status: [n, k] of `SlotStatus`; None = routed wherever there is an id.
            num_experts: E, the routed experts of the layer.
        """
        low, high = (int(expert_ids.min()), int(expert_ids.max())) if expert_ids.size else (0, -1)
        if low >= 0 and high < num_experts and (slot_status is None or (slot_status == pb.SLOT_STATUS_ROUTED).all()):
            # The usual case, every slot a load, needs no look at each.
            return cls(np.ones(expert_ids.shape, np.bool_), 0, 0, 0, 0)
        if slot_status is None:
            is_load = (expert_ids >= 0) & (expert_ids < num_experts)
            num_identity = int(np.count_nonzero(expert_ids >= num_experts))
            num_unused = is_load.size - int(np.count_nonzero(is_load)) - num_identity
            return cls(is_load, num_identity, 0, 0, num_unused)
        is_routed = (slot_status == pb.SLOT_STATUS_ROUTED) | (slot_status == pb.SLOT_STATUS_UNSPECIFIED)
        is_load = is_routed & (expert_ids >= 0) & (expert_ids < num_experts)
        is_identity = (slot_status == pb.SLOT_STATUS_IDENTITY) | (is_routed & (expert_ids >= num_experts))
        num_load, num_identity = int(np.count_nonzero(is_load)), int(np.count_nonzero(is_identity))
        num_dropped = int(np.count_nonzero(slot_status == pb.SLOT_STATUS_DROPPED))
        num_skipped = int(np.count_nonzero(slot_status == pb.SLOT_STATUS_SKIPPED))
        num_unused = is_load.size - num_load - num_identity - num_dropped - num_skipped
        return cls(is_load, num_identity, num_dropped, num_skipped, num_unused)
