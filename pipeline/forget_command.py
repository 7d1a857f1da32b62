"""`python -m pipeline forget`: the words of the command, and what it says."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.dataset.finished.forget import Wanted
from pipeline.dataset.finished.forget import forget as forget_in
from pipeline.shared.files import to_path
from schemas.errors import ExitCode

_console = Console()
_errors = Console(stderr=True)


def forget(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The OUT of a run.")],
    urls: Annotated[list[str] | None, typer.Option("--url", help="The URL of an image, however it is written.")] = None,
    domains: Annotated[list[str] | None, typer.Option("--domain", help="A site, and all sites below it.")] = None,
    contents: Annotated[list[str] | None, typer.Option("--sha256", help="The sha256 of an image file.")] = None,
    lists: Annotated[
        list[Path] | None, typer.Option("--list", metavar="FILE", help="A file with a URL, site or sha256 per line.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; write nothing.")] = False,
) -> None:
    """Take samples out of DIR, blank their rows, and never fetch them again. Without options: go on where it stopped.

    Options may be given several times. People cannot be searched for by face: a site, URL or file has to be named.
    """
    wanted = Wanted(tuple(urls or ()), tuple(domains or ()), tuple(contents or ()))
    for path in lists or ():
        wanted += Wanted.listed(path)
    gone = forget_in(to_path(folder), wanted, dry_run=dry_run)
    for shard, keys in gone.rows.items() if dry_run else ():
        for key in keys:
            _console.print(f"{shard}: {key}", highlight=False, markup=False, soft_wrap=True)
    if gone.rows:
        sentence = f"{'Would forget' if dry_run else 'Forgotten'}: {gone}."
    else:
        later = "would not" if dry_run else "will not"
        sentence = f"Nothing in the dataset matches; later runs into it {later} fetch it either."
    _console.print(sentence, highlight=False, soft_wrap=True)
    for trouble in gone.damaged:
        _errors.print(f"error: {trouble}.", highlight=False, markup=False, soft_wrap=True)
    if gone.damaged:
        raise typer.Exit(ExitCode.SHARDS_FAILED)
