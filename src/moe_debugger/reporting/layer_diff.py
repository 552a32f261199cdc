"""What the comparison says of one layer."""

from moe_debugger.reporting.content import Model

__all__ = ["ExpertChange", "LayerDiff", "MarginRate"]


class MarginRate(Model):
    """Mismatch of tokens with a margin in [lower, upper); None = no bound. `is_known` is False of unknown margins."""

    lower: float | None
    upper: float | None
    is_known: bool
    num_tokens: int
    router_rate: float | None
    slot_rate: float | None


class ExpertChange(Model):
    """An expert's share of the load in both recordings."""

    expert_id: int
    share_a: float | None
    share_b: float | None


class LayerDiff(Model):
    """One layer; None = not applicable. The metrics are those of docs/metrics.md, "Comparing two sets of rows".

    Attributes:
        js_bits: divergence of the loads, noise included; drift_bits: without it (across_bits - noise_floor_bits).
        p_value_adjusted: of the layer's loads, adjusted for all layers.
        num_tokens: matched tokens; overlap: share of their experts that both chose, with its 95 % interval.
        overlap_bound: upper bound of the overlap that holds over all layers.
        router_rate: share of tokens with another set of experts.
        changes: the experts whose share changed most; a description, not a test.
        renamed: by expert of the first recording its id in the second, where experts look renumbered.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_assignments_a: int
    num_assignments_b: int
    num_documents_a: int
    num_documents_b: int
    effective_experts_a: float | None
    effective_experts_b: float | None
    js_bits: float | None
    across_bits: float | None
    noise_floor_bits: float | None
    drift_bits: float | None
    p_value: float | None
    p_value_adjusted: float | None
    num_tokens: int
    overlap: float | None
    overlap_lower: float | None
    overlap_upper: float | None
    overlap_bound: float | None
    chance_overlap: float | None
    router_rate: float | None
    slot_rate: float | None
    by_margin: list[MarginRate]
    changes: list[ExpertChange]
    is_load_different: bool
    is_choice_different: bool
    renamed: dict[int, int] | None
    overlap_renamed: float | None
