"""What a snapshot says of the findings that are not there: the stated rate of false alarms, and who watches what."""

from moe_debugger.analysis import Analysis
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["state_promise"]


def state_promise(snapshot: pb.SessionSnapshot, analysis: Analysis) -> None:
    """Add to `snapshot` how often `analysis` is wrong on healthy data, and where its early warning stands."""
    snapshot.false_alarms_per_1000_windows = analysis.false_alarms_per_1000_windows
    snapshot.false_alarm_note = analysis.false_alarm_note
    report = analysis.early_warning
    if report is None:
        return
    if report.in_control_run_length is not None:
        snapshot.early_warning_run_length = report.in_control_run_length
    for index, layer in sorted(report.layers.items()):
        snapshot.early_warning.add(
            layer_index=index,
            status=pb.EarlyWarningStatus.Value(f"EARLY_WARNING_STATUS_{layer.status.name}"),
            num_points=layer.num_points,
            statistic=layer.statistic,
            threshold=layer.threshold,
            baseline=layer.baseline,
            effective_experts=layer.effective_experts,
        )
