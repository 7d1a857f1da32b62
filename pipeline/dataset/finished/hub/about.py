"""What is known of a finished dataset: what its card and its Croissant say."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.dataset.finished.hub.features import Feature, features, peek
from pipeline.dataset.out.ledger import Funnel, read_dataset
from pipeline.shared.files import AnyPath, times
from schemas.names import shard_origin
from schemas.shard import EMBEDDINGS, Manifest

_VIEWED_BYTES = 2_000_000
"""Larger rows are not shown by the hub's viewer."""
_HEAVY = re.compile(r"(clip_hidden|dino|latents\.|text\.)")
_LAION = re.compile(r"laion|^part-\d{5}-[0-9a-f-]{36}-c000", re.IGNORECASE)
_RE_LAION = re.compile(r"re-?laion", re.IGNORECASE)


@dataclass(frozen=True)
class About:
    """What card and Croissant say of a dataset."""

    funnel: Funnel
    manifests: list[Manifest]
    dataset: dict[str, Any]
    """dataset.json."""
    features: list[Feature]
    row_bytes: int
    """Of the largest sample that was looked at."""
    made: tuple[datetime, datetime]
    """When its first and its last shard were done."""

    @staticmethod
    def of(out: AnyPath, counted: Funnel, manifests: list[Manifest]) -> "About":
        """Read dataset.json and some samples.

        Raises:
            CorruptShardError: names the file that cannot be read.
        """
        samples = list(peek(out, manifests))
        written = times(out / "shards")
        done = [datetime.fromtimestamp(written.get(f"{one.shard}.json", 0), UTC) for one in manifests]
        return About(
            funnel=counted,
            manifests=manifests,
            dataset=read_dataset(out),
            features=features(samples),
            row_bytes=max((sum(map(len, sample.files.values())) for sample in samples), default=0),
            made=(min(done), max(done)) if done else (datetime.now(UTC),) * 2,
        )

    @property
    def sources(self) -> list[str]:
        """Where the rows come from, as far as it is known."""
        return self.dataset.get("sources") or self.parts

    @property
    def name(self) -> str:
        """The folder's own name would say nothing: it is `out`."""
        names = [one.removeprefix("made:").rpartition("/")[2] for one in self.sources[:3]]
        return f"Faces from {', '.join(names) or 'nowhere'}"

    @property
    def profile(self) -> str:
        return self.manifests[0].profile if self.manifests else ""

    @property
    def parts(self) -> list[str]:
        return sorted({shard_origin(one.shard)[0] for one in self.manifests})

    @property
    def is_old_laion(self) -> bool:
        """Whether the lists are LAION's, and nothing says that they are of Re-LAION."""
        files_are = any(map(_LAION.search, self.parts))
        return any((files_are or _LAION.search(one)) and not _RE_LAION.search(one) for one in self.sources)

    @property
    def light(self) -> list[Feature]:
        """The features without the large ones, where the hub could not show rows with them."""
        too_large = self.row_bytes > _VIEWED_BYTES
        return [one for one in self.features if not (too_large and _HEAVY.match(one["name"]))]

    @property
    def models(self) -> list[dict[str, str]]:
        return self.manifests[0].models if self.manifests else []

    @property
    def is_biometric(self) -> bool:
        return any(one["name"] in EMBEDDINGS for one in self.features)

    @property
    def tar_bytes(self) -> int:
        return sum(one.files.get(f"{one.shard}.tar", {}).get("bytes", 0) for one in self.manifests)
