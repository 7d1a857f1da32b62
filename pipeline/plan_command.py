"""`python -m pipeline plan`: what a run would do and lacks, and what it would give and cost."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Column, Table

from pipeline.options import console, errors, say

if TYPE_CHECKING:
    from pipeline.dataset.estimate import Range
    from pipeline.dataset.forecast import Counted
    from pipeline.dataset.job import Job

_ALIVE, _FACE, _CLEAN, _PHOTO_BYTES, _SAMPLE_BYTES = (0.5, 0.87), 0.12, (0.4, 0.6), (3e5, 6.5e5), (1.8e6, 2.2e6)
"""Priors: shares of the rows before, and bytes; `_show_prior` says whence."""


def show(job: "Job", out: str, sample: int | None, seed: int, cost_per_hour: float | None, as_json: bool) -> None:
    """Print the plan; with `sample`, run so many rows for real and print the forecast."""
    from pipeline.dataset.forecast import counted, forecast
    from pipeline.dataset.out.output import Output
    from pipeline.dataset.plan import make_plan
    from pipeline.dataset.source.seeds import Draw
    from pipeline.shared.files import to_path

    output = Output(to_path(out))
    if not sample:  # a forecast is of SHARDS, whatever OUT holds
        job.refuse_as_out(output.root)
        output.refuse_training_run()
        output.refuse_other_plan(job.plan)
    elif job.plan.refusal:  # as `dataset` does: fetch what is missing, where that is allowed, or refuse
        job = replace(job, plan=make_plan(job.plan.config, job.plan.runtime))
    if not as_json:
        _show_steps(job)
    draw = Draw(sample, seed) if sample else None
    counts = counted(job, output, errors, draw)
    if not as_json:
        reasons = ", ".join(
            f"{reason} {rows:,}" for reason, rows in sorted(counts.dropped.items(), key=lambda one: -one[1])
        )
        say(
            f"Parts: {len(job.parts):,}; rows: {counts.rows:,}, of which {counts.candidates:,} pass the metadata filter"
            f"{f' (dropped: {reasons})' if reasons else ''}\n{counts.captions}\n"
            f"Shards: {counts.shards:,} of up to {job.plan.config.source.rows_per_shard:,} candidate rows; "
            f"{counts.done:,} done, {counts.shards - counts.done:,} left\nPlan: {job.plan.digest[:16]}"
        )
        for note in job.notes:
            say(note)
    result = forecast(job, output.root, counts, draw, errors) if draw and counts.candidates else None
    prior = None if draw else _prior(job, counts)
    if as_json:
        cost = {"cost": result["wall_hours"] * cost_per_hour} if result and cost_per_hour is not None else {}
        document = {
            "parts": len(job.parts),
            **{name: getattr(counts, name) for name in ("rows", "candidates", "dropped", "shards", "done")},
            "captions": counts.captions.captions,
            "notes": job.notes,
            "plan_digest": job.plan.digest,
            "is_ready": not job.plan.refusal,
            "refusal": job.plan.refusal,
            "prior_not_measured": prior,
            "forecast": result and {**result, **cost, "level": 0.9},
        }
        typer.echo(json.dumps(document, indent=2, default=asdict))
        return
    if result:
        _show_forecast(result, len(job.parts), cost_per_hour)
    elif draw:
        say("\nForecast: no row passes the metadata filter, so nothing would be fetched or kept.\n")
    elif prior:
        _show_prior(prior)
    if job.plan.lacks:
        say(f"\nMissing on this machine:\n\n{job.plan.shopping_list}")
    ready = "ready." if counts.candidates else "ready, but no row passes the metadata filter."
    say(f"Verdict: {f'NOT READY. {job.plan.refusal}' if job.plan.refusal else ready}")


def _show_steps(job: "Job") -> None:
    steps = Table("step", "runs", "drops for", title="Steps", title_justify="left", box=box.ASCII)
    for step in (one for one in job.plan.steps if one.stage().name in job.plan.identity["stages"]):  # those that work
        steps.add_row(step.stage().name, step.at, ", ".join(step.stage().drops))
    console.print(steps)
    if job.plan.config.executor.name == "local":
        console.print("Executor: local, in this process")
    else:
        pool = job.plan.pool
        console.print(f"Executor: ray, models: {pool.workers} x {pool.cpus:g} CPU, {pool.gpus:g} GPU")
    names = (Column(name, overflow="fold") for name in ("task", "model", "licence", "sha256"))
    models = Table(*names, title="Models", title_justify="left", box=box.ASCII)
    for card in job.plan.cards:
        models.add_row(card.task, card.name, card.licence, card.sha256[:16] or "no weights")
    console.print(models)


def _prior(job: "Job", counts: "Counted") -> dict[str, list[float]] | None:
    """[low, high] by what others report of LAION; None where the parts are no metadata of the web."""
    if job.plan.runtime.sample_port or any(part.kind != "metadata" for part in job.parts) or not counts.candidates:
        return None
    alive = [counts.candidates * share for share in _ALIVE]
    kept = [rows * _FACE * clean for rows, clean in zip(alive, _CLEAN, strict=True)]
    return {
        "kept": kept,
        "bytes_fetched": [rows * size for rows, size in zip(alive, _PHOTO_BYTES, strict=True)],
        "bytes_on_disk": [rows * size for rows, size in zip(kept, _SAMPLE_BYTES, strict=True)],
    }


def _show_prior(prior: dict[str, list[float]]) -> None:
    kept, fetched, disk = (
        " to ".join(written(float(f"{value:.2g}")) for value in values)
        for values, written in zip(prior.values(), (_number, _bytes, _bytes), strict=True)
    )
    say(
        "Prior, not measured, an order of magnitude (`--sample 500` measures):\n"
        f"  {kept} images kept, {fetched} fetched, {disk} on disk.\n"
        "  Of LAION's links 50 to 87 % are alive (img2dataset #400, #439, #456); 12 % of its\n"
        "  photos show a face (LAION-Face), 40 to 60 % of these a single clean one\n"
        "  (FaceCaption-15M). Only 1.2 % of its faces are in photos of 1,024 px (FaceID-6M)."
    )


def _show_forecast(of: dict[str, Any], parts: int, cost_per_hour: float | None) -> None:
    counts = of["counted"]
    origin = f"{parts:,} parts" if parts > 1 else "1 part"
    say(f"\nForecast for {origin}: {counts.rows:,} rows, {counts.candidates:,} pass the metadata filter (counted)")
    if of["is_exact"]:
        say(f"Run for real: all of these, and {of['kept_of_run']:,} were kept. Nothing was written to OUT.")
    else:
        say(
            f"Run for real: {of['run']:,} of these, drawn from all parts (--seed {of['seed']}); "
            f"{of['kept_of_run']:,} were kept.\nAll else is extrapolated. Nothing was written to OUT."
        )
    table = Table("", "estimate", "90 % range", box=box.ASCII)
    table.columns[1].justify = table.columns[2].justify = "right"
    hours = of["wall_hours"]
    number, unit = (of["gpus"], "GPU") if of["gpus"] else (of["cores"], "core")
    rows: list[tuple[str, Range, Callable[[float], str]]] = [
        ("images kept", of["kept"], _number),
        ("bytes fetched", of["bytes_fetched"], _bytes),
        ("bytes on disk", of["bytes_on_disk"], _bytes),
        ("wall time", hours, _time),
        (f"{unit} hours ({number} {unit}{'s'[: number > 1]} held)", hours * number, _hours),
    ]
    if cost_per_hour is not None:
        rows.append((f"cost at {cost_per_hour:g} an hour", hours * cost_per_hour, "{:,.2f}".format))
    for name, values, written in rows:
        exact = values.low == values.high
        table.add_row(
            name, written(values.estimate), "exact" if exact else f"{written(values.low)} to {written(values.high)}"
        )
    console.print(table)
    say("Time is of this machine and network, under the load of now; a start counts once.")
    if not (of["kept_of_run"] or of["is_exact"]):
        say("No row that was run was kept: the upper end on disk assumes 2.2 MB an image.")
    if given_up := of["given_up"]:
        say(f"Fetched are whole files; 4 to 64 kB come for each of {_number(given_up)} that start too small.")
    say("")
    for label, loss in zip(("Costs most:", "Then:", "Then:"), of["reasons"], strict=False):
        say(f"{label:11} {loss.cause}, {100 * loss.share:.1f} % of the rows that get so far")
    ending = [loss for loss in of["thresholds"] if loss.rows]
    say(f"Each threshold of filter.* alone ends, by these rows and the metadata{':' if ending else ', no row.'}")
    for loss in ending:
        say(f"  {loss.cause}: about {_number(loss.rows)} rows")
    say("")


def _number(value: float) -> str:
    """With three digits that matter, where there are more."""
    return f"{float(f'{value:.3g}') if value >= 1000 else round(value):,.0f}"


def _bytes(value: float) -> str:
    return decimal(round(value))


def _hours(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _time(hours: float) -> str:
    if hours < 1.5:
        return f"{60 * hours:.0f} min" if hours > 1 / 40 else f"{3600 * hours:.0f} s"
    return f"{hours:,.1f} h" if hours < 72 else f"{hours / 24:,.1f} days"
