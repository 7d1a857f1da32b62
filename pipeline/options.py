"""The options that commands of `python -m pipeline` share, and how these print."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from pipeline.shared.commands import local_path

console = Console(markup=False, emoji=False)
errors = Console(markup=False, emoji=False, stderr=True)

Folder = Annotated[str, typer.Argument(metavar="DIR", help="The OUT of a run.")]
NewFolder = Annotated[
    Path,
    typer.Option("--out", parser=local_path, metavar="FOLDER", help="A new folder for the files and the list."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="A config key, such as filter.min_face_px=160; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Profile = Annotated[
    str | None, typer.Option(help="embedded, insightface or permissive. (Default: insightface; embedded for `sample`.)")
]
ProfileName = Annotated[str | None, typer.Option("--profile", help="embedded, insightface or permissive.")]


def say(text: RenderableType, to: Console = console) -> None:
    """A table, or lines as they are, however long."""
    to.print(text, highlight=False, soft_wrap=True)
