"""Finished shards as undecoded samples: as many as their manifests say, none without a json."""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.shared import tars
from pipeline.shared.files import AnyPath
from pipeline.shared.tars import Span, Wish
from schemas.errors import CorruptShardError
from schemas.shard import Manifest


class Shard(NamedTuple):
    """A finished shard."""

    folder: str
    """The dataset's folder, as it was given."""
    tar: AnyPath
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.shard

    @property
    def kept(self) -> int:
        """Samples in it."""
        return self.manifest.kept


class Raw(NamedTuple):
    """The files of one sample, undecoded."""

    shard: Shard
    key: str
    files: dict[str, bytes | Span]
    """Suffix -> content."""

    def content(self, suffix: str) -> bytes:
        """One file.

        Raises:
            CorruptShardError: when the sample lacks it; names shard and key.
        """
        if suffix not in self.files:
            raise self.corrupt(suffix, "is missing")
        content = self.files[suffix]
        return content if isinstance(content, bytes) else content.read()

    def corrupt(self, suffix: str, reason: str) -> CorruptShardError:
        """The error of a damaged file."""
        return CorruptShardError(f"{self.shard.tar}: {self.key}.{suffix} {reason}")


def samples(shard: Shard, start: int, stop: int, wish: Wish) -> Iterator[Raw]:
    """Samples [start, stop) of a shard; a range that ends with the shard must be followed by nothing.

    Raises:
        CorruptShardError: when the tar cannot be read so far, a sample has no json or a file twice, or there are more
            or fewer samples than the manifest says; names the shard, and the key where known.
    """
    count = start
    for key, files in tars.samples(shard.tar, start, None if stop == shard.kept else stop, wish):
        if count == stop:
            raise CorruptShardError(f"{shard.tar}: holds more samples than the {shard.kept} that its manifest says")
        raw = Raw(shard, key, files)
        if "json" not in files:
            raise raw.corrupt("json", "is missing")
        yield raw
        count += 1
    if count != stop:
        raise CorruptShardError(f"{shard.tar}: ends after {count} samples, its manifest says {shard.kept}")
