"""Counters in Prometheus's text format, by ``prometheus-client`` (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from zarrcache.errors import ConfigError
from zarrcache.ops.activity import Monitor
from zarrcache.stats import Stats

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["METRICS", "exposition"]

#: What each counter of `Stats` is, by the name of its metric.
METRICS = {
    "hits": "Densities served from disk",
    "misses": "Densities that had to be fetched",
    "bypasses": "Densities read from the origin that were not stored",
    "byte_hits": "Objects and blocks served from disk",
    "byte_misses": "Objects and blocks that had to be fetched",
    "purges": "Bad entries dropped, and bad entries received and rejected",
    "cache_errors": "Cache errors that became misses or pass-through",
    "requests": "Requests sent to the origin",
    "retries": "Requests that repeat a failed one",
    "fetched_bytes": "Bytes from the origin",
    "served_bytes": "Bytes served from disk",
    "lower_hits": "Misses served by the lower layer",
    "peer_hits": "Misses served by another node",
    "peer_bytes": "Bytes of entries received from other nodes",
    "sent_bytes": "Bytes of entries sent to other nodes",
    "unencoded": "Densities stored as float32 because the encoding cannot hold them",
}


def exposition(monitor: Monitor) -> bytes:
    """All metrics of a cache in Prometheus's text format."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as exc:
        raise ConfigError(
            f"Metrics need prometheus-client ({exc}). Install it: pip install 'zarrcache[metrics]'"
        ) from exc
    registry = CollectorRegistry()
    registry.register(_Collector(monitor))
    return generate_latest(registry)


class _Collector:
    """Gives a registry the present values, a series per run.

    A sum over runs would fall when a run ends, which Prometheus takes for a restart.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        activity = self._monitor.read()
        labels = ["directory", "pid"]
        for name in (field.name for field in fields(Stats)):
            if name not in METRICS:
                continue
            family = CounterMetricFamily(f"zarrcache_{name}", METRICS[name], labels=labels)
            for board in activity.boards:
                family.add_metric(
                    [activity.directory, str(board.pids[0])], getattr(board.stats, name)
                )
            yield family
        ahead = GaugeMetricFamily(
            "zarrcache_ahead_bytes", "Bytes on disk that the look-ahead keeps ready", labels=labels
        )
        processes = GaugeMetricFamily("zarrcache_processes", "Processes of a run", labels=labels)
        for board in activity.boards:
            where = [activity.directory, str(board.pids[0])]
            ahead.add_metric(where, board.stats.ahead_bytes)
            processes.add_metric(where, len(board.pids))
        yield ahead
        yield processes
        gauges = {
            "volume_bytes": ("Bytes on disk of both tiers", activity.volume_bytes),
            "limit_bytes": ("Bytes on disk that are allowed", activity.limit_bytes),
        }
        for name, (what, value) in gauges.items():
            if value is not None:
                gauge = GaugeMetricFamily(f"zarrcache_{name}", what, labels=labels[:1])
                gauge.add_metric([activity.directory], value)
                yield gauge
