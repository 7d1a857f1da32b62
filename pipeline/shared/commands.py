"""What all commands of a command line have in common."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from schemas.errors import OutputError, UserError, first_line

_OURS = ("pipeline", "schemas", "stages")
_TRAINING = {
    "train": "`python -m pipeline.train --from-shards DIR --variant NAME`",
    **{name: f"`python -m pipeline.train {name} RUN`" for name in ("export", "evaluate")},
}
"""Commands that are looked for beside `dataset`."""
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with the keys that --set takes.")]
_UsageError: Any = typer.BadParameter.__mro__[1]
"""Of click, or of the copy of it that newer releases of typer hold."""

if not os.environ.get("COLUMNS", "80").strip("0"):  # of a terminal that knows no width: rich would print nothing
    del os.environ["COLUMNS"]


class Interrupted(BaseException):
    """A KeyboardInterrupt of a command: from that, typer would make an exit without a word."""


class Commands(TyperGroup):
    """Commands that refuse an option whose value is empty, as of a shell variable that is not set.

    They name a package that was removed or replaced since faceshards was installed, and say where
    the commands of training are.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in _TRAINING and args[0] not in self.commands:
            raise UserError(f"{args[0]} is a command of its own: {_TRAINING[args[0]]}.")
        name, command, words = super().resolve_command(ctx, args)
        options = [one for one in (command.params if command else ()) if one.param_type_name == "option"]
        for option in [opt for one in options if not getattr(one, "is_flag", False) for opt in one.opts]:
            if f"{option}=" in words or (option, "") in pairwise(words):
                raise UserError(f"{option} is empty: give it a value, or leave it out.")
        return name, command, words

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error
        except _UsageError as error:
            if not error.message.startswith("Got unexpected extra argument"):
                raise
            takes_shards = any(one.name == "shards" for one in error.ctx.command.params)
            raise UserError(
                f"{error.message}: a path with blanks wants quotes, and --set is one word, such as "
                f"filter.min_face_px=160.{' Sources are given by --shards.' if takes_shards else ''}"
            ) from error
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            if not package or package in _OURS:
                raise
            raise UserError(
                f"{package} cannot be imported here ({first_line(error)}): install faceshards into this environment "
                "again, by `make setup` or `pip install .`; its pyproject.toml names which releases it needs."
            ) from error


def application(**options: Any) -> typer.Typer:
    return typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, **options)


def local_path(word: str) -> Path:
    """The path on this machine that a word of a command line names.

    Raises:
        OutputError: when it is empty, as of a shell variable that is not set, or a URL, of which `Path` would make the
            folder `s3:` below the current one.
    """
    if not word:
        raise OutputError("The name of a folder is empty: give one, or `.` for the current folder.")
    word = re.sub(r"^file:(//|(?=/))", "", word)
    if "://" in word:
        raise OutputError(f"{word} is a URL: what is given here has to lie on this machine.")
    return Path(os.path.expanduser(word))
