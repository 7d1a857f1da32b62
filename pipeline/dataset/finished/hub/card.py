"""OUT/README.md and OUT/croissant.json: what a finished dataset is, for people, `datasets`, the hub, and mlcroissant.

The card's front matter is what makes `load_dataset(OUT)` work: without it, `datasets` takes the ledgers for the data.
"""

from pathlib import Path
from typing import Any

from pipeline.dataset.finished.hub.about import About
from pipeline.dataset.finished.hub.croissant import BIASES, CONTENTS, croissant
from pipeline.dataset.out.ledger import Funnel
from pipeline.dataset.source.laion import OLD_LAION
from pipeline.shared.files import AnyPath, write, writing
from pipeline.shared.readme import write_readme
from schemas.shard import CARD, CROISSANT

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
"""By the digits of n, from three on."""
_SECTIONS = ("metadata", "filter", "segment", "crop")
_ASKED = {"Affiliation": "text", "Purpose": "text", "I have read what this dataset must not be used for": "checkbox"}


def front_matter(about: About) -> dict[str, Any]:
    """The card's metadata for `datasets` and the hub."""
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
    return data


def write_card(out: AnyPath, counted: Funnel) -> About:
    """Write OUT/croissant.json and OUT/README.md of the finished shards. What the user added to the card stays.

    A README.md that is none of ours is left alone.

    Raises:
        OutputError: when OUT cannot be written.
        CorruptShardError: names the file that is damaged.
    """
    about = About.of(out, counted)
    settings = about.dataset.get("plan", {}).get("settings", {})
    thresholds = {f"{name}.{key}": value for name in _SECTIONS for key, value in settings.get(name, {}).items()}
    values = {"contents": CONTENTS, "thresholds": thresholds, "old_laion": OLD_LAION, "biases": BIASES}
    with writing(out / CROISSANT):
        write(out / CROISSANT, croissant(about).encode())
    with writing(out / CARD):
        write_readme(out, Path(__file__).with_name("card.md.jinja"), front_matter(about), about=about, **values)
    return about
