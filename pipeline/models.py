"""`python -m pipeline models list | fetch | check`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

from pipeline.dataset.config import load_config
from schemas.errors import ExitCode
from stages.models.weights import Row, check, fetch, listing
from stages.settings import ModelSettings

app = typer.Typer(invoke_without_command=True, help="Weights: where they are, under which licence, how to get them.")
console = Console()

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with the keys that --set takes.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One config key, such as models.pack=antelopev2.")]
ProfileName = Annotated[str | None, typer.Option("--profile", help="insightface or permissive.")]
Names = Annotated[list[str] | None, typer.Argument(help="Names of `models list`; default: what the profile needs.")]


@app.callback()
def default(context: typer.Context) -> None:
    """List when no other word is given."""
    if context.invoked_subcommand is None:
        list_weights()


@app.command("list")
def list_weights(config: ConfigFile = None, sets: Sets = None) -> None:
    """Show all known weights, their licences, and where they were found."""
    _show(listing(_settings(config, sets, None)))


@app.command("check")
def check_weights(names: Names = None, config: ConfigFile = None, sets: Sets = None) -> None:
    """Read the weights that are there and compare their sha256."""
    rows = check(_settings(config, sets, None), names or ())
    _show(rows)
    if any("wrong" in row.state for row in rows) or (names and any(row.path is None for row in rows)):
        raise typer.Exit(ExitCode.USER_ERROR)


@app.command("fetch")
def fetch_weights(
    names: Names = None, config: ConfigFile = None, sets: Sets = None, profile: ProfileName = None
) -> None:
    """Download weights into the cache; an interrupted download goes on where it stopped."""
    settings = _settings(config, sets, profile)
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), console=console) as bars:
        tasks: dict[str, int] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total or None)
            bars.update(tasks[name], completed=done, total=total or None)  # type: ignore[arg-type]

        for name in names or needed(settings):
            console.print(f"{name}: {fetch(name, progress=advance)}", highlight=False, soft_wrap=True)


def needed(settings: ModelSettings) -> list[str]:
    """Names of the known weights that these settings use; a pack given as a folder is not among them."""
    names = []
    if "scrfd" in settings.detector or settings.face_embedder == "arcface":
        names += [] if Path(settings.pack).expanduser().is_dir() else [settings.pack]
    names += ["yunet"] if settings.detector == "yunet" else []
    names += [settings.parser] if settings.segmenter == "facexlib" else []
    names += [settings.image_embedder] if settings.image_embedder in ("clip-vit-h", "dinov2") else []
    return names


def _settings(config: Path | None, sets: list[str] | None, profile: str | None) -> ModelSettings:
    return load_config(config, sets or [], profile=profile).models


def _show(rows: list[Row]) -> None:
    table = Table("name", "does", "licence", "commercial use", "state", "where")
    for row in rows:
        weight = row.weight
        allowed = "yes" if weight.commercial else "no"
        where = str(row.path or weight.source)
        table.add_row(weight.name, ", ".join(weight.tasks), weight.licence, allowed, row.state, where)
    console.print(table)
