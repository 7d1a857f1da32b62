"""Samples per second and core that the loader reads: `python benchmarks/train_loader.py [SAMPLES]`. Target: >= 500.

Writes shards of samples with all their files in real sizes (random features, noisy pictures) into a temporary folder,
reads them once to warm the page cache, then counts the CPU time of this process, with no workers, per delivered sample.
The first lines are what the target is about: ID, CLIP hidden states and precomputed latents, no JPEG decoded; in
float16 and in int8 (pack.hidden), three times in turn. 4 MB per sample in all; TMPDIR chooses the disk.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.numpy import save
from webdataset import TarWriter, WebDataset

from pipeline.train.loader import Batch, Dataset, ShardLoader, open_dataset
from pipeline.train.settings import TrainConfig
from schemas.int8 import encode_int8, quantise
from schemas.shard import Manifest, encode_npy

SHARD = 200
CROPS = {"portrait": (1024, 1024, 90), "half": (1024, 1024, 95), "full": (1536, 1024, 95)}
LATENTS = {"portrait": (64, 64), "half": (64, 64), "full": (48, 80)}


def picture(width: int, height: int, quality: int) -> bytes:
    """A JPEG of soft shapes and some grain: 150 to 500 kB, as photos have."""
    rng = np.random.default_rng(width + quality)
    soft = cv2.resize(rng.integers(0, 256, (16, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 4, (height, width, 1))
    pixels = np.clip(soft + grain, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def described() -> bytes:
    """The json of a sample."""
    crops = {crop: {"box": [0, 0, *size], "size": size, "face_share": 0.5} for crop, (*size, _) in CROPS.items()}
    cuts = {
        crop: {"resized": [8 * w, 8 * h], "offset": [0, 0], "size": [8 * w, 8 * h]} for crop, (h, w) in LATENTS.items()
    }
    targets = {"base": "sd15", "kind": "sd15", "vae_sha256": "", "text_sha256": "", "resolution": 512, "latents": cuts}
    kps = [[400, 400], [600, 400], [500, 500], [420, 600], [580, 600]]
    told = {"text": "a photo of a person", "bbox": [300, 200, 700, 800], "kps": kps, "crops": crops, "targets": targets}
    return json.dumps(told).encode()


def files(rng: np.random.Generator, hidden: str) -> dict[str, bytes]:
    """All files of a sample; pictures are the same in all."""
    tokens = rng.normal(size=(257, 1280)).astype(np.float16)
    found = {
        "arcface.npy": encode_npy(rng.normal(size=512).astype(np.float32)),
        "clip.npy": encode_npy(rng.normal(size=1024).astype(np.float16)),
        "face.jpg": FACE,
        "json": JSON,
        "mask.png": bytes(1000),
        "text.npy": encode_npy(rng.normal(size=(77, 768)).astype(np.float16)),
    }
    if hidden == "int8":
        found["clip_hidden.safetensors"] = encode_int8(quantise(tokens))
    else:
        found["clip_hidden.npy"] = encode_npy(tokens)
    for crop, size in LATENTS.items():
        found[f"latents.{crop}.npy"] = encode_npy(rng.normal(size=(8, *size)).astype(np.float16))
    return dict(sorted((found | {f"{crop}.jpg": data for crop, data in PICTURES.items()}).items()))


JSON = described()
FACE = picture(224, 224, 95)
PICTURES = {crop: picture(*told) for crop, told in CROPS.items()}


def write(out: Path, samples: int, hidden: str = "fp16") -> None:
    """Finished shards and the features of an empty picture."""
    rng = np.random.default_rng(0)
    (out / "shards").mkdir(parents=True)
    for start in range(0, samples, SHARD):
        name, kept = f"part-{start // SHARD:05d}", min(SHARD, samples - start)
        path = out / "shards" / f"{name}.tar"
        with TarWriter(str(path), user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for number in range(kept):
                tar.write({"__key__": f"part-{start + number:09d}", **files(rng, hidden)})
        told = {path.name: {"bytes": path.stat().st_size, "sha256": ""}}
        manifest = Manifest(name, "insightface", "plan", kept, kept, {}, [], told)
        path.with_suffix(".json").write_text(manifest.to_json())
    empty = save({"clip_hidden": np.zeros((257, 1280), np.float16)})
    (out / "unconditional.safetensors").write_bytes(empty)
    fingerprint = {"bytes": len(empty), "sha256": hashlib.sha256(empty).hexdigest()}
    (out / "dataset.json").write_text(json.dumps({"files": {"unconditional.safetensors": fingerprint}}))


def loader(dataset: Dataset, reads: tuple[str, ...], **data: Any) -> ShardLoader:
    """A loader in this process, unless told otherwise."""
    told = {"verify": "size", "workers": 0, "shuffle": 200, "batch_size": 8, **data}
    return ShardLoader(dataset, reads, TrainConfig.model_validate({"data": told}))


def megabytes(batch: Batch) -> float:
    """Of its tensors."""
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    for features in batch.condition.values():
        tensors += [features] if isinstance(features, torch.Tensor) else features
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def measure(name: str, read: ShardLoader, samples: int, clock: Callable[[], float]) -> float:
    """Read `samples` samples after as many that are not counted; print and return samples per second of the clock."""
    batches = iter(read)
    for _ in ("warm", "counted"):
        seen, size, largest, start = 0, 0.0, 0.0, clock()
        while seen < samples:
            batch = next(batches)
            seen, size, largest = seen + len(batch), size + megabytes(batch), max(largest, megabytes(batch))
    seconds = clock() - start
    batches.close()  # type: ignore[attr-defined]
    print(f"{name:58s} {seen / seconds:8,.0f} samples/s {size / seconds:8,.0f} MB/s, batch {largest:.1f} MB")
    return seen / seconds


def against_webdataset(out: Path, samples: int, rounds: int) -> tuple[list[float], list[float]]:
    """CPU milliseconds per sample, ours and webdataset's, in turn after one round that does not count."""
    torch.set_num_threads(1)
    write(out, samples)
    dataset = open_dataset([str(out)], TrainConfig().data.model_copy(update={"verify": "size"}))
    tars = sorted(map(str, (out / "shards").glob("*.tar")))
    names = ("arcface.npy", "clip_hidden.npy", "latents.portrait.npy", "json")
    ours, peers = [], []
    for _ in range(rounds):
        read = loader(dataset, ("arcface", "hidden"), text="captions")
        ours.append(1000 / measure("ours", read, samples, time.process_time))
        theirs = WebDataset(tars, shardshuffle=False).decode().to_tuple(*names).shuffle(min(200, samples)).batched(8)
        for _ in ("warm", "counted"):
            start = time.process_time()
            for *arrays, _ in theirs:
                [torch.from_numpy(np.stack(column)) for column in arrays]
            spent = time.process_time() - start
        peers.append(1000 * spent / samples)
    return ours, peers


def main() -> None:
    """Print a line per variant's columns."""
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 800
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print({name: f"{len(data) / 1e3:.0f} kB" for name, data in {**PICTURES, "face": FACE}.items()})
    with tempfile.TemporaryDirectory() as folder:
        datasets = {}
        for hidden in ("fp16", "int8"):
            out = Path(folder, hidden)
            write(out, samples, hidden)
            datasets[hidden] = open_dataset([str(out)], TrainConfig().data.model_copy(update={"verify": "size"}))
            size = sum(tar.stat().st_size for tar in out.glob("shards/*.tar"))
            print(f"{hidden}: {size / samples / 1e3:,.0f} kB per sample")
        dataset, cpu = datasets["fp16"], time.process_time
        for _ in range(3):
            for hidden, one in datasets.items():
                read = loader(one, ("arcface", "hidden"), text="captions")
                measure(f"CPU: ID + CLIP hidden in {hidden} + latents", read, samples, cpu)
        measure("CPU: ID + CLIP hidden + latents + text", loader(dataset, ("arcface", "hidden")), samples, cpu)
        measure("CPU: ID + latents", loader(dataset, ("arcface",), text="captions"), samples, cpu)
        images = loader(dataset, ("arcface", "hidden"), text="captions", latents="images")
        measure("CPU: ID + CLIP hidden + images", images, samples // 4, cpu)
        for workers in (1, 2):
            read = loader(dataset, ("arcface", "hidden"), workers=workers)
            measure(f"wall: ID + CLIP hidden + latents + text, {workers} workers", read, samples, time.perf_counter)


if __name__ == "__main__":
    main()
