"""Live deltas over core NATS: lossy on purpose, since each names the flush that it leads to."""

from nats.aio.client import Client

from moe_analyzer.aggregate import SessionWrites
from moe_debugger.v1 import control_pb2 as control
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.subjects import live_subject

__all__ = ["live_delta", "publish_live", "publish_news"]


def live_delta(session_id: str, partition: int, writes: SessionWrites) -> control.LiveDelta:
    """Return what a flush changed."""
    return control.LiveDelta(
        format_version=format_version(),
        session_id=session_id,
        partition=partition,
        flush=writes.flush,
        layers=[
            control.LayerDelta(
                layer_index=index, num_tokens=layer.num_tokens, expert_counts=layer.counts.astype("<u4").tobytes()
            )
            for index, layer in writes.delta.layers.items()
            if layer.num_tokens
        ],
        overview_changed=writes.overview_changed,
        last_step=writes.delta.last_step or 0,
    )


async def publish_live(client: Client, partition: int, tenant: str, session_id: str, writes: SessionWrites) -> None:
    """Tell those who watch; while NATS is away nobody is told, and they ask for a snapshot later."""
    if client.is_connected:
        delta = live_delta(session_id, partition, writes)
        await client.publish(live_subject(tenant, session_id), delta.SerializeToString())


async def publish_news(client: Client, tenant: str, session_id: str) -> None:
    """Tell those who watch that more than counts changed, outside any flush: they ask for a snapshot."""
    if client.is_connected:
        # Flush 0 is older than any: nothing is counted, and no hole is seen.
        news = control.LiveDelta(format_version=format_version(), session_id=session_id, overview_changed=True)
        await client.publish(live_subject(tenant, session_id), news.SerializeToString())
