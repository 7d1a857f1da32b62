"""Feeds damaged bytes to everything that reads bytes of others: no crash, no hang, no traceback, no word on stderr.

python benchmarks/fuzz.py [--inputs 120000] [--seed 0] [--target NAME]      all targets, in processes of 1,000 inputs
python benchmarks/fuzz.py --target png --only 4711                          one input again, with its traceback

Input n of a target depends on its name and n alone: a finding names both. What a target may raise is declared there;
anything else is a finding, and so is an input that takes over 2 s of processor time, or a process that dies.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save

from pipeline import contract, forgotten, ledger, unpack
from pipeline.config import load_config
from pipeline.loader import tars as loader_tars
from pipeline.sources import formats
from pipeline.sources.values import to_seeds
from schemas.columns import LEDGER_SCHEMA
from schemas.drops import DropReason
from schemas.errors import ConfigError, CorruptShardError, OutputError, SourceError
from schemas.shard import Manifest, decode_npy, encode_npy
from schemas.targets import Targets
from stages import decoding, images
from stages.base import Dropped
from stages.fetch import address, robots, robots_txt

SECONDS = 2.0
HOPELESS = 60
"""Seconds of wall clock after which an input is given up."""
BLOCK = 1000
SIDE = (96, 80)
MOST_PIXELS = 4_000_000
"""Larger pictures are legal, and legally slow."""
ODD = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80\0\0\0",
    b"\0\0\0\1",
    b"%00",
    b"\n",
    b'"',
)


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


# ---- corpora


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 60, (SIDE[1], SIDE[0], 3)) + np.arange(SIDE[0])[None, :, None] * 2
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def saved(format: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def jpegs() -> list[bytes]:
    return [
        saved("JPEG", quality=85, exif=exif(6)),
        saved("JPEG", quality=60, progressive=True),
        saved("JPEG", "L"),
        saved("JPEG", "CMYK"),
        saved("JPEG", quality=90, restart_marker_blocks=4),
    ]


def pngs() -> list[bytes]:
    modes = [saved("PNG", mode) for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")]
    return [*modes, saved("PNG", exif=exif(3)), saved("PNG", save_all=True, append_images=[picture()])]


def webps() -> list[bytes]:
    return [
        saved("WEBP", quality=60),
        saved("WEBP", lossless=True),
        saved("WEBP", "RGBA", exif=exif(5)),
        saved("WEBP", save_all=True, append_images=[picture()]),
    ]


def others() -> list[bytes]:
    kinds = [saved("GIF"), saved("BMP"), saved("BMP", "P"), saved("TIFF"), saved("TIFF", compression="tiff_lzw")]
    kinds += [saved("TIFF", compression="jpeg"), saved("TIFF", "CMYK"), saved("TIFF", "1", compression="group4")]
    return [*kinds, saved("AVIF")] if "AVIF" in images.OPENERS else kinds


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def metadata() -> pa.Table:
    rows = 50
    return pa.table(
        {
            "URL": [f"https://photos.example/{n}.jpg" for n in range(rows)],
            "TEXT": [f"caption {n}" if n % 5 else None for n in range(rows)],
            "WIDTH": pa.array(range(1000, 1000 + rows), pa.int32()),
            "HEIGHT": [1000.0 + n if n % 3 else None for n in range(rows)],
            "NSFW": ["UNLIKELY"] * rows,
            "punsafe": pa.array([n / rows for n in range(rows)], pa.float32()),
        }
    )


def parquets() -> list[bytes]:
    table = metadata()
    return [parquet(table), parquet(table, compression="zstd", row_group_size=9), parquet(table, compression="none")]


def texts_of_metadata() -> list[bytes]:
    rows = metadata().to_pylist()
    names = list(rows[0])
    csv = "\n".join([",".join(names), *(",".join(f'"{row[name]}"' for name in names) for row in rows)])
    return [csv.encode(), "\n".join(map(json.dumps, rows)).encode()]


def ledgers() -> list[bytes]:
    row = {"key": "a-000000000", "part": "a", "row": 0, "url": "http://x.example/a", "verdict": "kept", "stage": "pack"}
    table = pa.Table.from_pylist([row, {**row, "row": 1, "bbox": [0.0, 1.0, 2.0, 3.0]}] * 20, schema=LEDGER_SCHEMA)
    return [parquet(table, compression="zstd"), parquet(table)]


def sample() -> dict[str, bytes]:
    face = images.encode_jpeg(np.asarray(picture().resize((224, 224))), 80)
    told = {"key": "k", "crops": {"portrait": {"absent": "no"}, "half": {}, "full": {"size": [96, 80]}}, "targets": {}}
    return {
        "arcface.npy": encode_npy(np.full(512, 512**-0.5, np.float32)),
        "dino.npy": encode_npy(np.zeros((257, 2), np.float16)),
        "face.jpg": face,
        "full.jpg": saved("JPEG"),
        "json": json.dumps(told).encode(),
        "mask.png": images.encode_png(np.zeros((224, 224), np.uint8)),
    }


def tars() -> list[bytes]:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for key in ("a-000000000", "a-000000001", "a-" + "0" * 120):
            for suffix, data in [
                ("json", b'{"text": "x"}'),
                ("face.jpg", b"\xff\xd8" * 40),
                ("clip.npy", b"\x93NUMPY"),
            ]:
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [sink.getvalue()]


def manifests() -> list[bytes]:
    files = {"a-00000.tar": {"bytes": 10, "sha256": "ab" * 32}}
    models = [{"name": "lbp", "task": "face_embedder", "sha256": "", "licence": "MIT"}]
    return [Manifest("a-00000", "embedded", "cd" * 32, 3, 1, {"no_face": 2}, models, files).to_json().encode()]


def lists() -> list[bytes]:
    known = forgotten.Forgotten("salt").and_urls(["http://x.example/a"]).and_domains(["gone.example"])
    return [forgotten._text(known)]


def targets() -> list[bytes]:
    cut = {"resized": [64, 64], "offset": [0, 0], "size": [64, 64]}
    told = {"base": "b", "kind": "sd15", "vae_sha256": "v", "text_sha256": "t", "resolution": 64}
    return [json.dumps({**told, "latents": {"full": cut}}).encode()]


def tomls() -> list[bytes]:
    return [
        b'[filter]\nmin_image_px = 1024\nmin_face_px = 128.5\n\n[models]\npack = "buffalo_l"\npaths = {yunet = "/x"}\n',
        b'profile = "embedded"\n[crop]\nsize = 512\nface_share = {half = 0.5}\n[metadata]\nnsfw_tags = ["NSFW", "X"]\n',
    ]


def arrays() -> list[bytes]:
    return [encode_npy(np.ones((257, 4), np.float16)), encode_npy(np.ones(512, np.float32)), encode_npy(np.ones(1))]


def robots_texts() -> list[bytes]:
    return [
        b"User-agent: *\nDisallow: /private/*.jpg$\nAllow: /\nCrawl-delay: 3\n\nUser-agent: faceshards\nDisallow: /%7",
        b"\xef\xbb\xbfuser-agent:*\r\ndisallow:\r\nSitemap: http://x/\r\n" + b"Disallow: /a*b*c*d$\n" * 20,
    ]


def tags() -> list[bytes]:
    return [b"noai, noimageai", b"otherbot: noindex, faceshards: none", b"unavailable_after: 25 Jun 2010 15:00:00 PST"]


def urls() -> list[bytes]:
    return [
        b"https://user:pw@b\xc3\xbccher.example:8080/a%20b/../c.jpg?x=1&y=%C3%A4+z#top",
        b"http://[2001:db8::1]:80/a",
        b"http://0x7f.1/latest/meta-data",
    ]


def features() -> list[bytes]:
    return [save({"dino": np.zeros((257, 2), np.float16)}), save({"clip_hidden": np.zeros((4, 4), np.float16)})]


# ---- readers


def read_image(data: bytes, folder: Path) -> str:
    images.sniff(data[:4096])
    images.is_web_page(data)
    header = images.read_header(data)
    images.check_whole(data, header)
    if header.width * header.height > MOST_PIXELS:
        return "large"
    images._decode_apart(data)
    return "ok"


def read_thumbnail(data: bytes, folder: Path) -> str:
    return "ok" if images.thumbnail(data, 32) else "none"


def read_metadata(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    formats.rows_in(str(path))
    rows = 0
    for table in formats.tables(str(path)):
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


def read_tar(data: bytes, folder: Path) -> str:
    path = folder / "a-00000.tar"
    path.write_bytes(data)
    for _ in unpack.salvage(path):
        pass
    with contextlib.suppress(CorruptShardError):
        for _ in loader_tars.samples(loader_tars.Shard("x", "a-00000", str(path), 3), 0, 3, lambda suffix: True):
            pass
    for _ in unpack.unpack(path):
        pass
    return "ok"


def read_sample(data: bytes, folder: Path) -> str:
    """One file of a sample is damaged: which one, its bytes tell."""
    files = dict(sample_files())
    suffix = sorted(files)[sum(data) % len(files)]
    files[suffix] = mutated(files[suffix], random.Random(data))
    return "wrong" if list(contract.sample_problems(unpack.Sample("k", files), None)) else "ok"


@cache
def sample_files() -> dict[str, bytes]:
    return sample()


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
    rules = robots_txt.parse(data, "faceshards")
    return "allowed" if rules.allow("/private/a.jpg?x=1") else "disallowed"


def read_tags(data: bytes, folder: Path) -> str:
    return str(robots.opted_out([data.decode("latin-1")], "faceshards/0.1"))


def read_url(data: bytes, folder: Path) -> str:
    text = data.decode("utf-8", "replace")
    forgotten.Forgotten("salt", frozenset("x"), frozenset("y")).concerns_url(text)
    address.parse(text)
    return "ok"


def read_object(data: bytes, folder: Path) -> str:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return "no json"
    Targets.from_object(told)
    return "ok"


def read_manifest(data: bytes, folder: Path) -> str:
    Manifest.from_json(data)
    return "ok"


def read_npy(data: bytes, folder: Path) -> str:
    decode_npy(data)
    return "ok"


def png_repaired(data: bytes) -> bytes:
    """With the checksum that each chunk ought to have."""
    found, place = bytearray(data), 8
    while place + 12 <= len(found):
        end = place + 8 + int.from_bytes(found[place : place + 4])
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(found)


def tar_repaired(data: bytes) -> bytes:
    """With the checksum that each block ought to have that looks like a header."""
    found = bytearray(data)
    for place in range(0, len(found) - 511, 512):
        if found[place + 257 : place + 262] == b"ustar":
            header = found[place : place + 512]
            header[148:156] = b" " * 8
            found[place + 148 : place + 156] = b"%06o\0 " % sum(header)
    return bytes(found)


TARGETS: dict[str, Target] = {
    "jpeg": Target(jpegs, read_image, (Dropped,), 16),
    "png": Target(pngs, read_image, (Dropped,), 16, png_repaired),
    "webp": Target(webps, read_image, (Dropped,), 12),
    "other image": Target(others, read_image, (Dropped,), 10),
    "thumbnail": Target(lambda: [*jpegs(), *pngs(), *webps(), *others()], read_thumbnail, (), 6),
    "parquet": Target(parquets, read_parquet, (SourceError,), 8),
    "csv and jsonl": Target(texts_of_metadata, read_text, (SourceError,), 4),
    "ledger": Target(ledgers, read_ledger, (CorruptShardError,), 8),
    "tar": Target(tars, read_tar, (CorruptShardError,), 8, tar_repaired),
    "sample": Target(lambda: [os.urandom(0) + bytes(range(64))], read_sample, (), 5),
    "manifest": Target(manifests, read_manifest, (CorruptShardError,), 6),
    "forgotten": Target(lists, read_list, (CorruptShardError,), 3),
    "targets": Target(targets, read_object, (CorruptShardError,), 3),
    "toml": Target(tomls, read_toml, (ConfigError, OutputError), 4),
    "npy": Target(arrays, read_npy, (CorruptShardError,), 5),
    "safetensors": Target(features, read_features, (), 3),
    "robots.txt": Target(robots_texts, read_robots, (), 4),
    "X-Robots-Tag": Target(tags, read_tags, (), 2),
    "url": Target(urls, read_url, (Dropped,), 4),
}


# ---- inputs


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in; sometimes all in the head, where most is decided."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        reach = max(1, min(len(found), rng.choice((32, 200, 10**9))))
        place, length = rng.randrange(reach), rng.choice((1, 2, 4, 16, 200))
        match rng.randrange(7):
            case 0 | 1:
                found[place : place + 1] = bytes([rng.randrange(256)])
            case 2:
                found[place : place + 1] = bytes([(found[place] if place < len(found) else 0) ^ 1 << rng.randrange(8)])
            case 3:
                odd = rng.choice(ODD)
                found[place : place + len(odd)] = odd
            case 4:
                del found[place : place + length]
            case 5:
                found[place:place] = found[place : place + length] * rng.choice((1, 1, 3, 50))
            case 6:
                found[place:place] = rng.randbytes(length)
    return bytes(found[: rng.randrange(len(found) + 1)] if rng.random() < 0.1 else found)


@cache
def corpus(name: str) -> list[bytes]:
    return TARGETS[name].corpus()


def input_of(name: str, number: int) -> bytes:
    """Input `number` of a target."""
    rng = random.Random(f"{name} {number}")
    damaged = mutated(rng.choice(corpus(name)), rng)
    return TARGETS[name].repair(damaged) if rng.random() < 0.5 else damaged


# ---- running


def spent_s() -> float:
    """Processor time of this process and of the one that decodes."""
    child = decoding._decoder()._child
    found = time.process_time()
    if child is not None:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child._process.pid}/stat").read_text().rpartition(")")[2].split()
            found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def tried(name: str, number: int, folder: Path) -> tuple[str, str]:
    """What became of an input, in a word; and the finding, if it is one."""
    target, data = TARGETS[name], input_of(name, number)
    started = spent_s()
    try:
        outcome = target.read(data, folder)
    except target.allowed as error:
        outcome = str(error.reason) if isinstance(error, Dropped) else type(error).__name__
    except Exception:  # the point of it all
        return "finding", f"{name} {number}: {traceback.format_exc()}"
    if spent_s() - started > SECONDS:
        return "finding", f"{name} {number}: took {spent_s() - started:.1f} s"
    return outcome, ""


def block(name: str, start: int, count: int) -> Iterator[dict[str, object]]:
    """Inputs of one target in this process."""
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, start + count):
            signal.alarm(HOPELESS)
            outcome, finding = tried(name, number, Path(folder))
            outcomes[outcome] += 1
            if outcome == DropReason.DECODER_CRASH:
                yield {"crash": f"{name} {number}"}
            if finding:
                yield {"finding": finding}
    signal.alarm(0)
    yield {"outcomes": outcomes}


def shares(inputs: int, only: str | None) -> dict[str, int]:
    """Target -> its number of inputs."""
    chosen = {name: target for name, target in TARGETS.items() if only in (None, name)}
    total = sum(target.share for target in chosen.values())
    return {name: -(-inputs * target.share // total) for name, target in chosen.items()}


def run(inputs: int, seed: int, only: str | None) -> int:
    """All targets, each block in a process of its own; the number of findings."""
    findings, crashes, done = 0, 0, 0
    for name, count in shares(inputs, only).items():
        outcomes: collections.Counter[str] = collections.Counter()
        began = time.monotonic()
        for start in range(seed, seed + count, BLOCK):
            words = [sys.executable, __file__, "--block", name, str(start), str(min(BLOCK, seed + count - start))]
            process = subprocess.run(words, capture_output=True, text=True, check=False, errors="replace")
            lines = [json.loads(line) for line in process.stdout.splitlines()]
            told = [line["finding"] for line in lines if "finding" in line]
            if process.returncode or process.stderr:
                told.append(f"{name} {start}..: exit {process.returncode}, stderr: {process.stderr[-2000:]}")
            for line in lines:
                outcomes.update(line.get("outcomes", {}))
                if "crash" in line:
                    crashes += 1
                    print(f"contained crash of a decoder: {line['crash']}", flush=True)
            for finding in told:
                findings += 1
                print(f"FINDING {finding}", flush=True)
        done += outcomes.total()
        common = ", ".join(f"{outcome} {n}" for outcome, n in outcomes.most_common(8))
        print(f"{name}: {outcomes.total():,} inputs in {time.monotonic() - began:.0f} s: {common}", flush=True)
    print(f"{done:,} inputs from {seed} on, {findings} findings, {crashes} contained crashes of a decoder", flush=True)
    return findings


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=120_000)
    arguments.add_argument("--seed", type=int, default=0, help="number of the first input of each target")
    arguments.add_argument("--target", choices=TARGETS)
    arguments.add_argument("--only", type=int, help="try this one input of --target")
    arguments.add_argument("--block", nargs=3, help=argparse.SUPPRESS)
    told = arguments.parse_args()
    if told.block:
        name, start, count = told.block
        for line in block(name, int(start), int(count)):
            print(json.dumps(line), flush=True)
    elif told.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(*tried(told.target, told.only, Path(folder)))
    else:
        sys.exit(min(run(told.inputs, told.seed, told.target), 1))


if __name__ == "__main__":
    main()
