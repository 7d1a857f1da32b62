"""The results of a run as a Markdown table."""

import json
from pathlib import Path


def table(path: Path) -> str:
    """A line per result of the file's last run."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    begin = max(index for index, result in enumerate(results) if result["part"] == "machine")
    machine, *rest = results[begin:]
    lines = [f"{machine['device']}, torch {machine['torch']}{', tiny models: numbers mean nothing' * machine['smoke']}"]
    lines += ["", "| part | result |", "|---|---|"]
    for result in rest:
        values = {key: value for key, value in result.items() if key not in ("at", "part") and value is not None}
        words = "; ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in values.items())
        lines.append(f"| {result['part']} | {words} |")
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
