"""Results of a benchmark: lines of a JSON file, appended as they are known; a Markdown table; an entry of docs/LOG.md.

python benchmarks/report.py build/gpu.jsonl          # logs the last run in a file, such as one from another machine
"""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = Path(__file__).parents[1] / "docs" / "LOG.md"

Record = Callable[[dict[str, Any]], None]


def recorder(path: Path, smoke: bool, device: str = "", **versions: str) -> Record:
    """What prints and appends results; the first of a run says on which machine it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def record(result: dict[str, Any]) -> None:
        line = json.dumps({"at": round(time.monotonic() - begun, 1), **result})
        print(line, flush=True)
        with path.open("a") as stream:
            stream.write(line + "\n")

    device = device or f"{len(os.sched_getaffinity(0))} cores"
    record({"part": "machine", "device": device, "python": platform.python_version(), **versions, "smoke": smoke})
    return record


def table(path: Path) -> str:
    """The file's last run: a column per value where all results have the same, else a line of them."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    begin = max(index for index, result in enumerate(results) if result["part"] == "machine")
    machine, *rest = [{key: value for key, value in result.items() if key != "at"} for result in results[begin:]]
    facts = [machine["device"], *(f"{name} {machine[name]}" for name in ("python", "torch") if name in machine)]
    lines = [", ".join(facts) + ", tiny models: numbers mean nothing" * machine["smoke"], ""]
    if rest and all(list(result) == list(rest[0]) for result in rest):
        rows = [list(map(_words, rest[0])), *(list(map(_short, result.values())) for result in rest)]
    else:
        rows = [["part", "result"]]
        for result in rest:
            values = {key: value for key, value in result.items() if key != "part" and value is not None}
            words = "; ".join(f"{_words(key)} {_short(value)}" for key, value in values.items())
            rows.append([result["part"], words])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([*lines, head, "|" + "---|" * len(rows[0]), *body])


def log(path: Path, command: str) -> None:
    """Put the file's last run on top of docs/LOG.md."""
    preamble, newest, rest = LOG.read_text().partition("\n## ")
    title = f"{datetime.datetime.now(datetime.UTC).date()}: `{command}`"
    LOG.write_text(f"{preamble}\n## {title}\n\n{table(path)}\n{newest}{rest}")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    log(Path(sys.argv[1]), f"benchmarks: {Path(sys.argv[1]).stem}")
