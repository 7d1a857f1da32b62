"""How a run goes, or went, from the files in OUT alone: whoever asks may sit at another terminal or machine."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from pipeline.dataset.execute.tally import details
from pipeline.dataset.out.ledger import LIVE, read_dataset, read_manifests, summary, why_nothing
from pipeline.shared.atomic import TEMPORARY
from pipeline.shared.files import AnyPath, RemotePath, times
from schemas.errors import OutputError
from schemas.names import shard_origin
from schemas.shard import DATASET
from stages.fetch.answer import SECOND_CHANCE

_RECENT_S = 3600.0
_NO_SNAPSHOT = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
_SILENT_S = 900.0
"""Without any news for longer, a run may be dead: executor.shard_timeout_s gives up a shard after as long."""


def status(out: AnyPath) -> dict[str, Any]:
    """Read manifests and times of files, and ledgers where rows had second chances. Nothing is locked or written.

    Times are seconds since 1970, those of the file system that holds OUT.

    Raises:
        OutputError: when OUT is no dataset, or on a site that says nothing of times.
        CorruptShardError: when a file of it is damaged.
    """
    manifests = read_manifests(out)
    dataset = read_dataset(out)
    planned: dict[str, int | None] = dataset.get("planned", {})
    counted = summary(manifests, out)
    begun, files = times(out).get(DATASET), times(out / "shards")
    if begun is None:
        raise OutputError(f"{out} does not say when its files were written: ask where its run goes on.")
    ends = {manifest.shard: files.get(f"{manifest.shard}.json", begun) for manifest in manifests}
    of_run = sorted((end, manifest.rows_in) for manifest in manifests if (end := ends[manifest.shard]) > begun)
    is_over, live = "shards" in dataset, None
    if not is_over:
        with suppress(*_NO_SNAPSHOT):  # what manifests say stands without it
            read = json.loads((out / LIVE).read_bytes())
            _live_lines(read, read["time"])
            for name in ("seconds_left", "input_rows"):
                timedelta(seconds=read[name] or 0)  # a number, where it is known
            live = read
    drafts = {
        name.removeprefix(TEMPORARY).rsplit(".", 2)[0]: written
        for name, written in sorted(files.items(), key=lambda entry: entry[1])
        if name.startswith(TEMPORARY)
    }
    planned_rows = sum(rows or 0 for rows in planned.values()) if planned and None not in planned.values() else None
    done = sum(one.rows_in for one in manifests if shard_origin(one.shard) in {(part, 0) for part in planned})
    pace = _pace(of_run, begun)
    recent = _pace(of_run, max(begun, of_run[-1][0] - _RECENT_S)) if of_run else None
    seconds_left = 0.0 if is_over else None
    if not is_over and planned_rows is not None and done >= planned_rows:
        seconds_left = (live or {}).get("seconds_left") or None  # of second chances the run alone knows
    elif not is_over and planned_rows is not None and (recent or pace):
        seconds_left = (planned_rows - done) / (recent or pace or 1)
    return {
        "is_over": is_over,
        "shards": len(manifests),
        "rows": counted["rows_in"],
        "kept": counted["kept"],
        # Reason -> rows, the most frequent first; only reasons that occur.
        "dropped": {reason: n for reason, n in sorted(counted["dropped"].items(), key=lambda one: -one[1]) if n},
        # Input rows of the parts that the last run was started for, where all parts say how many they have.
        "planned_rows": planned_rows,
        "planned_done": done,  # of these, in finished shards
        "begun": begun,
        "last_shard": max(ends.values(), default=None),
        "rows_per_second": pace,  # of the run that is, or was the last, since it began
        "recent_rows_per_second": recent,  # of the hour before its last shard
        # Shard -> when its files grew last; None where OUT is remote: a store shows whole objects only.
        "in_the_making": None if isinstance(out, RemotePath) else drafts,
        # What the run itself says of the rows that it has finished, at `time`; None when it is over: docs/watching.md.
        "live": live,
        # By the recent pace, in second chances by the run's own count; None where the pace or the total is not known,
        # and 0 for a run that is over.
        "seconds_left": seconds_left,
    }


def _pace(ends: Sequence[tuple[float, int]], since: float) -> float | None:
    """Rows per second of the shards, as (end, rows), that ended after a time, until the last of them did."""
    rows = sum(rows for end, rows in ends if end > since)
    return rows / (ends[-1][0] - since) if rows else None


def _ago(then: float, now: float) -> str:
    return f"{timedelta(seconds=max(0, round(now - then)))} ago"


def _live_lines(live: Mapping[str, Any], now: float) -> list[str]:
    """What a run says of itself; raises one of _NO_SNAPSHOT for what no run wrote."""
    lines = [f"By its own count, {_ago(live['time'], now)}: {live['rows']:,} rows, kept {live['kept']:,}"]
    lines += [f"  {line}" for line in details(live)]
    return [*lines, *(f"WARNING: {text}" for text in live["warnings"].values())]


def text_of(status: Mapping[str, Any], out: AnyPath, now: float) -> str:
    def share(rows: int) -> str:
        return f"{rows:,} ({100 * rows / max(1, status['rows']):.1f} %)"

    plural = "" if status["shards"] == 1 else "s"
    lines = [f"{out}: {status['shards']:,} shard{plural}, {status['rows']:,} rows, kept {share(status['kept'])}"]
    failed = sum(status["dropped"].get(reason, 0) for reason in SECOND_CHANCE)
    lines.append(f"Failed for the network's or a server's trouble: {share(failed)}")
    if status["dropped"]:
        lines.append("Dropped, the most frequent reasons first:")
    lines += [f"  {reason}: {share(rows)}" for reason, rows in status["dropped"].items()]
    if status["rows"] and not status["kept"]:
        lines.append(why_nothing(f"{status['rows']:,} rows", status["dropped"]))
    if status["is_over"]:
        return "\n".join([*lines, f"The run is over, {_ago(status['begun'], now)}."])
    paces = [
        (status["rows_per_second"], "since the run began"),
        (status["recent_rows_per_second"], "in the last hour of it"),
    ]
    pace = ", ".join(f"{rows:,.1f} rows/s {when}" for rows, when in paces if rows) or "no shard is done yet"
    lines.append(f"The run began {_ago(status['begun'], now)}: {pace}")
    making, live = status["in_the_making"], status["live"]
    if status["planned_rows"] is not None:
        left = (
            "" if status["seconds_left"] is None else f", about {timedelta(seconds=round(status['seconds_left']))} left"
        )
        further = ((live or {}).get("input_rows") or 0) - status["planned_rows"]
        if further > 0 and status["planned_done"] >= status["planned_rows"]:
            lines.append(f"All {status['planned_rows']:,} rows are done; {further:,} get a second chance{left}")
        else:
            lines.append(f"{status['planned_done']:,} of {status['planned_rows']:,} rows are done{left}")
    if live is not None:
        lines += _live_lines(live, now)
    news = max([status["begun"], status["last_shard"] or 0, live["time"] if live else 0, *(making or {}).values()])
    if making:
        lines.append(f"In the making: {', '.join(making)}")
    if making == {} or now - news > _SILENT_S:
        lines.append(
            f"No news for {_ago(news, now).removesuffix(' ago')}. If the run has ended, the same command goes on."
        )
    return "\n".join(lines)
