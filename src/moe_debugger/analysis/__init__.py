"""Metrics, findings and the foldable state behind them: the same in a notebook, an analyzer and a replay."""

from moe_debugger.analysis.alignment import AlignedLayer, Alignment, Unmatched, align
from moe_debugger.analysis.analyze import Analysis, analyze, finish, fold_decisions
from moe_debugger.analysis.assignment import Assignment, best_assignment
from moe_debugger.analysis.coactivation import Coactivation, expert_coactivation
from moe_debugger.analysis.collapse_chart import ChartSettings
from moe_debugger.analysis.drift import Drift, LayerDrift, jensen_shannon_bits, routing_drift
from moe_debugger.analysis.drops import CapacityDrops, PositionDrops, capacity_drops, expert_capacity
from moe_debugger.analysis.duplicates import (
    NearDuplicates,
    SimilarPair,
    TogetherPair,
    always_together,
    duplicate_weights,
    near_duplicate_experts,
)
from moe_debugger.analysis.early_warning import (
    PAGE_RUN_LENGTH,
    LayerSeries,
    LayerWarning,
    WarningReport,
    WarningStatus,
    collapse_warnings,
    warning_findings,
)
from moe_debugger.analysis.expert_pairs import ExpertPair
from moe_debugger.analysis.expert_similarity import ExpertSimilarity, aligned_similarity, linear_cka, output_similarity
from moe_debugger.analysis.findings import (
    EvidenceRow,
    Finding,
    FindingKind,
    Severity,
    Thresholds,
    finding_from_proto,
    finding_to_proto,
    findings_to_proto,
)
from moe_debugger.analysis.locality import Locality, NgramLocality, SegmentLocality, routing_locality
from moe_debugger.analysis.metrics import LayerMetrics, layer_metrics
from moe_debugger.analysis.mismatch import LayerMismatch, MarginBucket, Mismatch, routing_mismatch
from moe_debugger.analysis.permutation import LayerPermutation, PermutationResult, permutation_test
from moe_debugger.analysis.plugins import Detector, DetectorOutcome, DetectorView, LayerView, run_detectors
from moe_debugger.analysis.row_set import RowSet
from moe_debugger.analysis.rules import CaptureHealth
from moe_debugger.analysis.saturation import LayerSaturation, router_saturation
from moe_debugger.analysis.small_samples import BalancedBand, Band, balanced_band, balanced_rank_imbalance
from moe_debugger.analysis.specialisation import (
    DomainSpecialisation,
    VocabularySpecialisation,
    domain_specialisation,
    vocabulary_specialisation,
)
from moe_debugger.analysis.state import LayerShape, LayerState, RoutingState, merge_all
from moe_debugger.analysis.step_metrics import StepBalance, step_balance
from moe_debugger.analysis.transitions import Transitions, layer_transitions

__all__ = [
    "PAGE_RUN_LENGTH",
    "AlignedLayer",
    "Alignment",
    "Analysis",
    "Assignment",
    "BalancedBand",
    "Band",
    "CapacityDrops",
    "CaptureHealth",
    "ChartSettings",
    "Coactivation",
    "Detector",
    "DetectorOutcome",
    "DetectorView",
    "DomainSpecialisation",
    "Drift",
    "EvidenceRow",
    "ExpertPair",
    "ExpertSimilarity",
    "Finding",
    "FindingKind",
    "LayerDrift",
    "LayerMetrics",
    "LayerMismatch",
    "LayerPermutation",
    "LayerSaturation",
    "LayerSeries",
    "LayerShape",
    "LayerState",
    "LayerView",
    "LayerWarning",
    "Locality",
    "MarginBucket",
    "Mismatch",
    "NearDuplicates",
    "NgramLocality",
    "PermutationResult",
    "PositionDrops",
    "RoutingState",
    "RowSet",
    "SegmentLocality",
    "Severity",
    "SimilarPair",
    "StepBalance",
    "Thresholds",
    "TogetherPair",
    "Transitions",
    "Unmatched",
    "VocabularySpecialisation",
    "WarningReport",
    "WarningStatus",
    "align",
    "aligned_similarity",
    "always_together",
    "analyze",
    "balanced_band",
    "balanced_rank_imbalance",
    "best_assignment",
    "capacity_drops",
    "collapse_warnings",
    "domain_specialisation",
    "duplicate_weights",
    "expert_capacity",
    "expert_coactivation",
    "finding_from_proto",
    "finding_to_proto",
    "findings_to_proto",
    "finish",
    "fold_decisions",
    "jensen_shannon_bits",
    "layer_metrics",
    "layer_transitions",
    "linear_cka",
    "merge_all",
    "near_duplicate_experts",
    "output_similarity",
    "permutation_test",
    "router_saturation",
    "routing_drift",
    "routing_locality",
    "routing_mismatch",
    "run_detectors",
    "step_balance",
    "vocabulary_specialisation",
    "warning_findings",
]
