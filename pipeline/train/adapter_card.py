"""README.md beside an adapter: what it is, how it is loaded, what it was trained on, and whose licences bind it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.shared.bases import BASES, TINY
from pipeline.shared.configfile import leaves
from pipeline.shared.readme import write_readme
from pipeline.train.job import EMBEDDED
from pipeline.train.run_folder import writing
from schemas.shard import CARD

_FAMILIES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}


class Results(NamedTuple):
    table: Sequence[tuple[str, str, str, str]]
    """Measure, mean, interval of 95 %, what it is to be compared with."""
    notes: Sequence[str]
    """What a reader must know, a sentence each."""


def write_adapter_card(folder: Path, name: str, sidecar: Mapping[str, Any], results: Results | None = None) -> None:
    """Write `folder`/README.md of the released files `name`.*; `results` are those of an evaluation of these files.

    The card of another adapter in the same folder is left alone.

    Raises:
        OutputError: when it cannot be written.
    """
    path, hub = folder / CARD, BASES.get(sidecar["base"])
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **({"base_model": hub.repository, "base_model_relation": "adapter"} if hub else {}),
        "license": "other",
        "license_name": "of-the-models-and-photos-behind-it",
        "tags": list(dict.fromkeys(["ip-adapter", sidecar["variant"], "faces", "faceshards"])),
    }
    is_trial = sidecar["base"] in TINY or EMBEDDED in sidecar["dataset"]["profiles"]
    values = {"name": name, "about": sidecar, "family": _FAMILIES[sidecar["kind"]], "is_trial": is_trial}
    with writing(path):
        if path.exists() and f"{name}.safetensors".encode() not in path.read_bytes():
            return
        template = Path(__file__).with_name("adapter_card.md.jinja")
        settings = dict(sorted(leaves(sidecar["recipe"]).items()))
        write_readme(folder, template, head, results=results, settings=settings, **values)
