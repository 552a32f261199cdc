"""Metrics, findings and the foldable state behind them: the same in a notebook, an analyzer and a replay."""

from moe_debugger.analysis.state import LayerShape, LayerState, RoutingState, merge_all

__all__ = ["LayerShape", "LayerState", "RoutingState", "merge_all"]
