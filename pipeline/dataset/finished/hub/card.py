"""OUT/README.md and OUT/croissant.json: what a finished dataset is, for people, `datasets`, the hub, and mlcroissant.

The card's front matter is what makes `load_dataset(OUT)` work: without it, `datasets` takes the ledgers for the data.
"""

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.dataset.finished.hub.about import About
from pipeline.dataset.finished.hub.croissant import BIASES, CONTENTS, croissant
from pipeline.dataset.out.ledger import Funnel
from pipeline.dataset.source.laion import OLD_LAION
from pipeline.shared.files import AnyPath, write
from schemas.errors import OutputError
from schemas.shard import CARD, CROISSANT, Manifest

_YOURS = "<!-- What stands below this line is yours: it stays when the card is written anew. -->"
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
"""By the digits of n, from three on."""
_SECTIONS = ("metadata", "filter", "segment", "crop")
_ASKED = {"Affiliation": "text", "Purpose": "text", "I have read what this dataset must not be used for": "checkbox"}

_TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=False,  # noqa: S701  # it is Markdown; what strangers wrote is not in it
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def front_matter(about: About) -> str:
    """The card's metadata for `datasets` and the hub, YAML."""
    configs = {"default": about.light}
    if len(about.light) < len(about.features):
        configs["everything"] = about.features
    files = [{"split": "train", "path": "shards/*.tar"}]
    data: dict[str, Any] = {
        "pretty_name": about.name,
        "license": "other",
        "license_name": "of-the-sources",
        "task_categories": ["text-to-image", "image-to-image"],
        "tags": ["webdataset", "mlcroissant", "faces", "ip-adapter", "faceshards"],
        "size_categories": [_SIZES[max(0, len(str(about.funnel.kept)) - 3)]],
        "extra_gated_prompt": "This dataset shows people's faces. Say who you are and what you need it for.",
        "extra_gated_fields": _ASKED,
    }
    if about.features:
        data |= {
            "configs": [{"config_name": name, "data_files": files} for name in configs],
            "dataset_info": [{"config_name": name, "features": listed} for name, listed in configs.items()],
        }
    data = json.loads(json.dumps(data))  # what occurs twice in one object would be written as a reference
    return str(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120))


def write_card(out: AnyPath, counted: Funnel, manifests: list[Manifest]) -> About:
    """Write OUT/croissant.json and OUT/README.md of the finished shards. What the user added to the card stays.

    A README.md that is none of ours is left alone.

    Raises:
        OutputError: when OUT cannot be written.
        CorruptShardError: names the file that is damaged.
    """
    about = About.of(out, counted, manifests)
    try:
        write(out / CROISSANT, croissant(about).encode())
        before = (out / CARD).read_bytes().decode("utf-8", "replace") if (out / CARD).exists() else _YOURS
        _, ours, yours = before.partition(_YOURS)
        if ours:
            write(out / CARD, card(about, yours).encode())
    except OSError as error:
        raise OutputError(f"{out / CARD} cannot be written: {error.strerror or error}.") from error
    return about


def card(about: About, yours: str = "") -> str:
    """The text of the card, at whose end stands what is the user's."""
    settings = (about.dataset.get("plan") or {}).get("settings", {})
    thresholds = {f"{name}.{key}": value for name in _SECTIONS for key, value in settings.get(name, {}).items()}
    text = _TEMPLATE.get_template("card.md.jinja").render(
        about=about,
        front_matter=front_matter(about),
        contents=CONTENTS,
        thresholds=thresholds,
        json=json.dumps,
        old_laion=OLD_LAION,
        biases=BIASES,
    )
    return f"{text}\n{_YOURS}{yours or chr(10)}"
