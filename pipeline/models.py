"""`python -m pipeline models list | fetch | check`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.dataset.config import load_config
from schemas.errors import ExitCode
from stages.models.backends import backends
from stages.models.weights import WeightState, fetch, known, known_weights, states

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
    settings = load_config(config, sets or []).models
    _show(states(known_weights(settings).values(), settings))


@app.command("check")
def check_weights(names: Names = None, config: ConfigFile = None, sets: Sets = None) -> None:
    """Read the weights that are there and compare their sha256."""
    settings = load_config(config, sets or []).models
    weights = [known(name, settings) for name in names or ()] or known_weights(settings).values()
    rows = states(weights, settings, hashes=True)
    _show(rows)
    if any("wrong" in row.state for row in rows) or (names and any(row.path is None for row in rows)):
        raise typer.Exit(ExitCode.USER_ERROR)


@app.command("fetch")
def fetch_weights(
    names: Names = None, config: ConfigFile = None, sets: Sets = None, profile: ProfileName = None
) -> None:
    """Download weights into the cache; those of the hub go on where they were interrupted."""
    settings = load_config(config, sets or [], profile=profile)
    needed = [weight for cls in backends(settings) for weight in cls.weights(settings.models)]
    wanted = {weight.name: weight for weight in needed if weight.name not in settings.models.paths}
    for weight in [known(name, settings.models) for name in names or ()] or wanted.values():
        console.print(f"{weight.name}: {fetch(weight)}", highlight=False, soft_wrap=True)


def _show(rows: list[WeightState]) -> None:
    table = Table("name", "does", "licence", "commercial use", "state", "where")
    for row in rows:
        weight = row.weight
        allowed = "yes" if weight.commercial else "no"
        where = str(row.path or weight.source)
        table.add_row(weight.name, ", ".join(weight.tasks), weight.licence, allowed, row.state, where)
    console.print(table)
