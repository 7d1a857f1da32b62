"""`python -m pipeline models list | check | fetch`: what a machine needs before a run, offline ones too."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.options import AsJson, ProfileName, Sets, say
from pipeline.shared.commands import ConfigFile, application
from schemas.errors import ExitCode, WeightsError, first_line

if TYPE_CHECKING:
    from pipeline.dataset.config import Config
    from stages.models.papers import Weight

app = application(invoke_without_command=True, help="Weights: where they are, under which licence, how to get them.")
Names = Annotated[list[str] | None, typer.Argument(help="Names of `models list`.")]


@app.callback()
def models(context: typer.Context) -> None:
    """List when no other word is given."""
    if context.invoked_subcommand is None:
        list_models()


def _chosen(config: ConfigFile, sets: Sets, profile: ProfileName) -> "tuple[Config, bool]":
    """The config, and whether it was chosen: then its weights are meant, else all."""
    from pipeline.dataset.config import load_config

    return load_config(config, sets or [], profile=profile), bool(config or sets or profile)


@app.command("list", epilog="Example: python -m pipeline models list --profile insightface")
def list_models(
    names: Names = None,
    config: ConfigFile = None,
    sets: Sets = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Show weights and bases: file URLs, sizes, sha256, licences, and where each file is or belongs.

    All that are known; with --profile, --config or --set those that such a run needs.
    """
    from pipeline.dataset.needed_weights import document, known_models, named, needed, text_of

    settings, only = _chosen(config, sets, profile)
    weights = needed(settings) if only else known_models(settings.models).values()
    listed = document(named(names, settings.models) if names else weights, settings, only=only)
    typer.echo(json.dumps(listed, indent=2)) if as_json else say(text_of(listed, only=only or bool(names)))


@app.command("check", epilog="Example: python -m pipeline models check --profile insightface")
def check_models(
    names: Names = None,
    config: ConfigFile = None,
    sets: Sets = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Compare sha256, load each model, and tell what computes it, its time per image, and that batch = single.

    All that are on this machine; with --profile, --config or --set all that
    such a run needs. Exit code 2 when one that is named or needed is missing,
    and when any is damaged or cannot be loaded.
    """
    from pipeline.dataset.check_models import checks
    from pipeline.dataset.needed_weights import known_models, named, state_of

    settings, only = _chosen(config, sets, profile)
    here = [one for one in known_models(settings.models).values() if state_of(one, settings.models).path]
    done = []
    for check in checks(settings, named(names, settings.models) if names else None if only else here):
        done.append(check._asdict())
        if not as_json:
            say(str(check))
    if as_json:
        typer.echo(json.dumps(done, indent=2))
    elif not done:
        say("No weights are on this machine: `python -m pipeline models list` says what to fetch.")
    if any(check["problem"] for check in done):
        raise typer.Exit(ExitCode.USER_ERROR)


@app.command("fetch", epilog="Example: python -m pipeline models fetch --profile insightface")
def fetch_models(
    names: Names = None, config: ConfigFile = None, sets: Sets = None, profile: ProfileName = None
) -> None:
    """Download weights and bases into the cache: those that are named, or all that a run of the profile needs.

    Files of the hub go on where they were interrupted. `photo`, by which runs
    tell photos from art, is made here: of the whole CLIP (3.9 GB to fetch, 5 GB
    of memory), which is removed again unless it is named or was there before.
    """
    from pipeline.dataset.needed_weights import named, needed
    from stages.models.weights import fetch, not_allowed

    settings, _ = _chosen(config, sets, profile)
    wanted = [weight for weight in needed(settings) if weight.name not in settings.models.paths]
    wanted = named(names, settings.models) if names else wanted
    if refusal := not_allowed(wanted, settings.models):
        raise WeightsError(refusal)
    for weight in wanted:
        say(f"{weight.name}: {_photo(weight, settings, wanted) if weight.made_of else fetch(weight)}")


def _photo(weight: "Weight", settings: "Config", wanted: "Sequence[Weight]") -> Path:
    """The head of `photo`, made if it is not there or not of the weights that are; what it is made of is fetched."""
    from pipeline.dataset.needed_weights import state_of
    from pipeline.shared.atomic import write_atomically
    from stages.models.photo_or_art import photo_head

    there, whole = state_of(weight, settings.models, hashes=True), weight.made_of
    if there.is_ready or whole is None:
        return there.target
    was_there = whole in wanted or state_of(whole, settings.models).path
    target, content = photo_head(settings.models.model_copy(update={"allow_download": True}))
    try:
        write_atomically(target, content)
    except OSError as error:
        raise WeightsError(
            f"Cannot write {target} ({first_line(error)}): make its folder writable, and fetch photo again."
        ) from error
    if not was_there:
        shutil.rmtree(state_of(whole, settings.models).target)
    return target
