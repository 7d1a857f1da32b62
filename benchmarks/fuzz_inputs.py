"""Whole inputs for fuzz.py, small and of every kind, and how they are damaged."""

import io
import json
import random
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save

from pipeline.dataset.out import forgotten
from schemas.columns import LEDGER_SCHEMA
from schemas.int8 import encode_int8, quantise
from schemas.shard import Manifest, encode_npy
from stages.pixels import headers, images

SIDE = (96, 80)
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
    return [*kinds, saved("AVIF")] if "AVIF" in headers.OPENERS else kinds


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
    record = {
        "key": "k",
        "crops": {"portrait": {"absent": "no"}, "half": {}, "full": {"size": [96, 80]}},
        "targets": {},
    }
    return {
        "arcface.npy": encode_npy(np.full(512, 512**-0.5, np.float32)),
        "dino.npy": encode_npy(np.zeros((257, 2), np.float16)),
        "dino_mirror.safetensors": encode_int8(quantise(np.ones((257, 2), np.float16))),
        "face.jpg": face,
        "full.jpg": saved("JPEG"),
        "json": json.dumps(record).encode(),
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
    known = forgotten.Forgotten("salt").adding(urls=["http://x.example/a"], domains=["gone.example"])
    return [forgotten._text(known)]


def targets() -> list[bytes]:
    cut = {"resized": [64, 64], "offset": [0, 0], "size": [64, 64]}
    record = {"base": "b", "kind": "sd15", "vae_sha256": "v", "text_sha256": "t", "resolution": 64}
    return [json.dumps({**record, "latents": {"full": cut}}).encode()]


def tomls() -> list[bytes]:
    return [
        b'[filter]\nmin_image_px = 1024\nmin_face_px = 128.5\n\n[models]\npack = "buffalo_l"\npaths = {yunet = "/x"}\n',
        b'profile = "embedded"\n[crop]\nsize = 512\nface_share = {half = 0.5}\n[metadata]\nnsfw_tags = ["NSFW", "X"]\n',
    ]


def arrays() -> list[bytes]:
    return [encode_npy(np.ones((257, 4), np.float16)), encode_npy(np.ones(512, np.float32)), encode_npy(np.ones(1))]


def int8_features() -> list[bytes]:
    tokens = np.linspace(-3, 3, 257 * 70).reshape(257, 70).astype(np.float16)
    return [encode_int8(quantise(tokens)), encode_int8(quantise(tokens[:3, :5]))]


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


# ---- damage


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in; sometimes all in the head, where most is decided."""
    buffer = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        reach = max(1, min(len(buffer), rng.choice((32, 200, 10**9))))
        offset, length = rng.randrange(reach), rng.choice((1, 2, 4, 16, 200))
        match rng.randrange(7):
            case 0 | 1:
                buffer[offset : offset + 1] = bytes([rng.randrange(256)])
            case 2:
                buffer[offset : offset + 1] = bytes(
                    [(buffer[offset] if offset < len(buffer) else 0) ^ 1 << rng.randrange(8)]
                )
            case 3:
                odd = rng.choice(ODD)
                buffer[offset : offset + len(odd)] = odd
            case 4:
                del buffer[offset : offset + length]
            case 5:
                buffer[offset:offset] = buffer[offset : offset + length] * rng.choice((1, 1, 3, 50))
            case 6:
                buffer[offset:offset] = rng.randbytes(length)
    return bytes(buffer[: rng.randrange(len(buffer) + 1)] if rng.random() < 0.1 else buffer)


def png_repaired(data: bytes) -> bytes:
    """With the checksum that each chunk ought to have."""
    buffer, offset = bytearray(data), 8
    while offset + 12 <= len(buffer):
        end = offset + 8 + int.from_bytes(buffer[offset : offset + 4])
        if end + 4 > len(buffer):
            break
        buffer[end : end + 4] = zlib.crc32(buffer[offset + 4 : end]).to_bytes(4)
        offset = end + 4
    return bytes(buffer)


def tar_repaired(data: bytes) -> bytes:
    """With the checksum that each block ought to have that looks like a header."""
    buffer = bytearray(data)
    for offset in range(0, len(buffer) - 511, 512):
        if buffer[offset + 257 : offset + 262] == b"ustar":
            header = buffer[offset : offset + 512]
            header[148:156] = b" " * 8
            buffer[offset + 148 : offset + 156] = b"%06o\0 " % sum(header)
    return bytes(buffer)
