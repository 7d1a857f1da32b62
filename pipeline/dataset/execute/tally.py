"""What a run has done so far, counted from its events: rows by stage and reason, seconds, shards, hosts."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.dataset.execute.make_shard import Advanced, Event, Finished, Started
from schemas.columns import KEPT
from stages import STAGES
from stages.fetch.answer import SECOND_CHANCE
from stages.fetch.engine import RESOLVER, FetchTimes

_MOST_HOSTS = 2_000
"""Hosts that are remembered; of twice as many, those that spent the least time in all are let go."""
_SHOWN_HOSTS, _FEWEST_FETCHES, _SLOW_S = 5, 10, 1.0
"""How many hosts are listed, after how many fetches of one their mean says anything, and when people hear of it."""


class Tally:
    """Counts a run; the rows of a shard that fails, or is begun again, are taken off."""

    def __init__(self, total_rows: int | None) -> None:
        self.making: dict[str, Counter[tuple[str, str]]] = {}
        """Shard in the making -> (stage, verdict) -> its finished rows."""
        self.shards = {"made": 0, "failed": 0, "before": 0}
        self.rows_before = 0
        self.begun = time.monotonic()
        self.total_rows = total_rows
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._begun_rows = self._captions = 0
        self._microseconds: Counter[str] = Counter()
        self._fetches = FetchTimes()

    @property
    def rows(self) -> int:
        """Finished rows."""
        return self._outcomes.total()

    def take(self, event: Event) -> None:
        if isinstance(event, Advanced):
            self.making[event.shard].update(event.outcomes)
            self._outcomes.update(event.outcomes)
            self._microseconds.update(event.microseconds)
            self._fetches.fetches.update(event.fetches.fetches)
            self._fetches.microseconds.update(event.fetches.microseconds)
            if len(self._fetches.fetches) > 2 * _MOST_HOSTS:
                longest = Counter(dict(self._fetches.microseconds.most_common(_MOST_HOSTS)))
                self._fetches = FetchTimes(Counter({h: self._fetches.fetches[h] for h in longest}), longest)
            return
        done = self.making.pop(event.shard, Counter())
        if isinstance(event, Finished) and event.manifest is not None:
            self.shards["made"] += 1
            return
        self._outcomes.subtract(done)
        if isinstance(event, Started):
            self.making[event.shard] = Counter()
            self._begun_rows += event.rows
            self._captions += event.captions
        else:
            self.shards["failed"] += 1

    def snapshot(self) -> dict[str, Any]:
        """All of it, JSON-able; see docs/watching.md."""
        means = {
            host: round(self._fetches.microseconds[host] / 1e6 / count, 3)
            for host, count in self._fetches.fetches.items()
            if count >= _FEWEST_FETCHES and host != RESOLVER
        }
        return {**self.counts(), "slowest_hosts": dict(sorted(means.items(), key=lambda one: -one[1])[:_SHOWN_HOSTS])}

    def counts(self) -> dict[str, Any]:
        """The same without hosts, of which there are thousands: for every event."""
        seconds, rows, kept = max(time.monotonic() - self.begun, 1e-3), self.rows, 0
        stages: dict[str, dict[str, Any]] = {name: {"dropped": {}} for name in STAGES}
        for (name, verdict), count in self._outcomes.most_common():
            if verdict == KEPT:
                kept += count
            elif count:
                stages[name]["dropped"][verdict] = count
        left = rows
        for name, stage in stages.items():
            spent = round(self._microseconds[name] / 1e6, 3)
            stage.update(rows_in=left, rows_out=left - sum(stage["dropped"].values()), seconds=spent)
            left = stage["rows_out"]
        left = 0 if self.total_rows is None else max(0, self.total_rows - self.rows_before - rows)
        names = self._fetches.fetches[RESOLVER]
        return {
            "seconds": round(seconds, 3),
            "input_rows": self.total_rows,
            "rows_before": self.rows_before,
            "begun_rows": self._begun_rows,
            "captions": self._captions,
            "rows": rows,
            "kept": kept,
            "rows_per_second": round(rows / seconds, 3),
            "seconds_left": None if self.total_rows is None or not rows else round(left * seconds / rows),
            "network_failures": sum(stages["download"]["dropped"].get(reason, 0) for reason in SECOND_CHANCE),
            "shards": {**self.shards, "making": len(self.making)},
            "stages": stages,
            "names": names,
            "name_seconds": round(self._fetches.microseconds[RESOLVER] / 1e6, 3),
        }


def details(now: Mapping[str, Any]) -> list[str]:
    """A snapshot for people: shards and failures, the stages that take rows or time, hosts that are slow."""
    shards, failed, stages = now["shards"], now["network_failures"], now["stages"]
    share = f"{100 * failed / max(1, now['rows']):.1f} %"
    network = f"; rows that the network failed: {failed:,} ({share})" if failed else ""
    lines = [f"shards: {shards['made']:,} made, {shards['before']:,} done before, {shards['failed']:,} failed{network}"]
    least = max(0.5, sum(stage["seconds"] for stage in stages.values()) / 50)
    words = [
        f"{name} {stage['rows_out']:,}" + (f" ({stage['seconds']:,.0f} s)" if stage["seconds"] > least else "")
        for name, stage in stages.items()
        if stage["dropped"] or stage["seconds"] > least
    ]
    hosts = [f"{host} {mean:.1f} s" for host, mean in now["slowest_hosts"].items() if mean >= _SLOW_S]
    lines += [f"rows left after {', '.join(words)}"] if words else []
    return [*lines, f"slow hosts: {', '.join(hosts)} per fetch"] if hosts else lines
