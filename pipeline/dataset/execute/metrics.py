"""The numbers of a run in Prometheus' text format, for node_exporter's textfile collector."""

import os
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile


def write_metrics(path: str, now: Mapping[str, Any]) -> None:
    """Renew a file by a rename, or raise an OSError. All are gauges: counts fall when a shard is begun again."""
    registry, gauges = CollectorRegistry(), dict[str, Gauge]()

    def put(name: str, value: float, **labels: str) -> None:
        if name not in gauges:
            gauges[name] = Gauge(f"faceshards_{name}", "See docs/watching.md", labels, registry=registry)
        (gauges[name].labels(**labels) if labels else gauges[name]).set(value)

    for name, value in now.items():
        if isinstance(value, int | float):
            put(name, value)
        for key, one in value.items() if isinstance(value, dict) else ():
            if name != "stages":
                put(name, one if isinstance(one, int | float) else 1, of=key)
                continue
            for fact in ("rows_in", "rows_out", "seconds"):
                put(f"stage_{fact}", one[fact], stage=key)
            for reason, rows in one["dropped"].items():
                put("dropped", rows, stage=key, reason=reason)
    write_to_textfile(os.path.expanduser(path), registry)
