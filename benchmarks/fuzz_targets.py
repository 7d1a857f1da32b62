"""What fuzz.py feeds damaged bytes to: whatever reads bytes of inputs.others, and what that may raise."""

import contextlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import fuzz_inputs as inputs

from pipeline.dataset.config import load_config
from pipeline.dataset.finished import contract
from pipeline.dataset.out import forgotten, ledger
from pipeline.dataset.source import webdataset_tars
from pipeline.dataset.source.parts import Part
from pipeline.dataset.source.values import to_seeds
from pipeline.shared import tars
from schemas.drops import Dropped
from schemas.errors import ConfigError, CorruptShardError, OutputError, SourceError
from schemas.int8 import decode_int8
from schemas.shard import Manifest, decode_npy
from schemas.targets import Targets
from stages.fetch import address, answer
from stages.fetch.manners.robots import Rules
from stages.pixels import headers, images

MOST_PIXELS = 4_000_000
"""Larger pictures are legal, and legally slow."""


class Target(NamedTuple):
    """Something that reads bytes."""

    corpus: Callable[[], list[bytes]]
    """Whole inputs, to be damaged."""
    read: Callable[[bytes, Path], str]
    """Reads one, with a folder for files; says in a word what became of it."""
    allowed: tuple[type[Exception], ...]
    """What that may raise."""
    share: int
    """Inputs, relative to other targets."""
    repair: Callable[[bytes], bytes] = bytes
    """Makes checksums true again, so that damage gets past them; done to half of the inputs."""


def read_image(data: bytes, folder: Path) -> str:
    headers.sniff(data[:4096])
    headers.is_web_page(data)
    early = headers.sniff(data)
    try:
        header = headers.read_header(data)
    except Dropped:
        assert early is None
        raise
    assert early in (None, header)
    headers.check_whole(data, header)
    if header.width * header.height > MOST_PIXELS:
        return "large"
    images.PhotoCache(0).get("", lambda: data)
    return "ok"


def read_thumbnail(data: bytes, folder: Path) -> str:
    return "ok" if images.thumbnail(data, 32) else "none"


def read_metadata(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    part = Part("part", str(path), None, "metadata").probed()
    rows = 0
    for table in part.tables():
        rows += to_seeds(table, "part", rows, str(path)).num_rows
    return "ok"


def read_parquet(data: bytes, folder: Path) -> str:
    return read_metadata(data, folder / "part.parquet")


def read_text(data: bytes, folder: Path) -> str:
    return read_metadata(data, folder / ("part.jsonl" if data[:1] == b"{" else "part.csv"))


def read_ledger(data: bytes, folder: Path) -> str:
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "a-00000.parquet").write_bytes(data)
    ledger.read_ledger(folder, "a-00000", ("key", "url", "bbox", "kps", "stage"), "kept").to_pylist()
    return "ok"


def corpus_of_tars() -> list[bytes]:
    """Also imports what reads them, torch with it, before any time is taken; the other readers do without."""
    from pipeline.train.loader import shards  # noqa: F401

    return inputs.tars()


def read_tar(data: bytes, folder: Path) -> str:
    path = folder / "a-00000.tar"
    path.write_bytes(data)
    with contextlib.suppress(CorruptShardError):
        from pipeline.train.loader import shards

        for _ in shards.samples(
            shards.Shard("x", path, Manifest("a-00000", "p", "d", 3, 3, {}, [], {})), 0, 3, lambda suffix: True
        ):
            pass
    with contextlib.suppress(SourceError):
        webdataset_tars.rows_in(str(path))
        for table in webdataset_tars.tables(str(path)):
            to_seeds(table, "part", 0, str(path))
    for _ in tars.unpack(path):
        pass
    return "ok"


def read_sample(data: bytes, folder: Path) -> str:
    """One file of a sample is damaged: which one, its bytes tell."""
    files = dict(sample_files())
    suffix = sorted(files)[sum(data) % len(files)]
    files[suffix] = inputs.mutated(files[suffix], random.Random(data))
    return "wrong" if list(contract.sample_problems(tars.Sample("k", files), None)) else "ok"


@cache
def sample_files() -> dict[str, bytes]:
    return inputs.sample()


def read_features(data: bytes, folder: Path) -> str:
    path = folder / "unconditional.safetensors"
    path.write_bytes(data)
    return "wrong" if list(contract.unconditional_problems(path)) else "ok"


def read_list(data: bytes, folder: Path) -> str:
    (folder / forgotten.FORGOTTEN).write_bytes(data)
    forgotten.load(folder)
    return "ok"


def read_toml(data: bytes, folder: Path) -> str:
    path = folder / "config.toml"
    path.write_bytes(data)
    pair = data.decode("latin-1").partition("\n")[2].partition("\n")[0]
    load_config(path, [pair] if "=" in pair else [], shards="sample")
    return "ok"


def read_robots(data: bytes, folder: Path) -> str:
    rules = Rules(data, "faceshards")
    return "allowed" if rules.allow(address.parse("http://a.test/private/a.jpg?x=1")) else "disallowed"


def read_tags(data: bytes, folder: Path) -> str:
    return str(answer.opted_out([data.decode("latin-1")], "faceshards/0.1"))


def read_url(data: bytes, folder: Path) -> str:
    text = data.decode("utf-8", "replace")
    forgotten.Forgotten("salt", frozenset("x"), frozenset("y")).concerns_url(text)
    address.parse(text)
    return "ok"


def read_object(data: bytes, folder: Path) -> str:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return "no json"
    Targets.from_object(content)
    return "ok"


def read_manifest(data: bytes, folder: Path) -> str:
    Manifest.from_json(data)
    return "ok"


def read_npy(data: bytes, folder: Path) -> str:
    decode_npy(data)
    return "ok"


def read_int8(data: bytes, folder: Path) -> str:
    decode_int8(data)
    return "ok"


TARGETS: dict[str, Target] = {
    "jpeg": Target(inputs.jpegs, read_image, (Dropped,), 16),
    "png": Target(inputs.pngs, read_image, (Dropped,), 16, inputs.png_repaired),
    "webp": Target(inputs.webps, read_image, (Dropped,), 12),
    "other image": Target(inputs.others, read_image, (Dropped,), 10),
    "thumbnail": Target(
        lambda: [*inputs.jpegs(), *inputs.pngs(), *inputs.webps(), *inputs.others()], read_thumbnail, (), 6
    ),
    "parquet": Target(inputs.parquets, read_parquet, (SourceError,), 8),
    "csv and jsonl": Target(inputs.texts_of_metadata, read_text, (SourceError,), 4),
    "ledger": Target(inputs.ledgers, read_ledger, (CorruptShardError,), 8),
    "tar": Target(corpus_of_tars, read_tar, (CorruptShardError,), 8, inputs.tar_repaired),
    "sample": Target(lambda: [bytes(range(64))], read_sample, (), 5),
    "manifest": Target(inputs.manifests, read_manifest, (CorruptShardError,), 6),
    "forgotten": Target(inputs.lists, read_list, (CorruptShardError,), 3),
    "targets": Target(inputs.targets, read_object, (CorruptShardError,), 3),
    "toml": Target(inputs.tomls, read_toml, (ConfigError, OutputError), 4),
    "npy": Target(inputs.arrays, read_npy, (CorruptShardError,), 5),
    "int8": Target(inputs.int8_features, read_int8, (CorruptShardError,), 3),
    "safetensors": Target(inputs.features, read_features, (), 3),
    "robots.txt": Target(inputs.robots_texts, read_robots, (), 4),
    "X-Robots-Tag": Target(inputs.tags, read_tags, (), 2),
    "url": Target(inputs.urls, read_url, (Dropped,), 4),
}
