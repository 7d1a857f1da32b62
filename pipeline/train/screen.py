"""What is said on the terminal, once for all processes of a run."""

import os

from rich.console import Console

console = Console()
_errors = Console(stderr=True)


def say(text: str) -> None:
    """A line on stderr."""
    if os.environ.get("RANK", "0") == "0":
        _errors.print(text, highlight=False, markup=False, soft_wrap=True)
