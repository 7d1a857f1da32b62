"""`export-json`: a dataset as single files and one JSON list, the form that the published IP-Adapter scripts read."""

import io
import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.dataset.out.ledger import read_manifests
from pipeline.shared.files import AnyPath, Draft, fsync_names, writing
from pipeline.shared.tars import Sample, samples, unpack
from schemas.errors import CorruptShardError, LostError, OutputError, RemoteError
from schemas.shard import decode_npy

LIST = "data.json"
Crop = Literal["portrait", "half", "full"]
IdFormat = Literal["npy", "pt-numpy"]
"""What `id_embed_file` is: for numpy.load, or for torch.load."""


def export_json(
    out: AnyPath, folder: Path, crop: Crop = "full", id_format: IdFormat = "npy", *, absolute: bool = False
) -> tuple[int, int]:
    """Write images/, faces/, ids/ and at last data.json for all finished shards of OUT, one sample in memory at a time.

    An entry of the list has image_file, text, id_embed_file ((512,) float32 of unit length), face_image_file (the
    aligned 224 x 224 face) and id_embed_norm (raw embedding = unit one x norm). Returns how many samples the list
    has, and how many have no crop at all and were left out. `crop` becomes `image_file`; a sample without it gives the
    largest crop that it has. Paths are relative to the list's folder unless `absolute`.

    Raises:
        OutputError: when OUT is no dataset or has no embeddings, or `folder` is not empty or cannot be written.
        LostError: when `folder` cannot be written any more.
        CorruptShardError: when a tar is not as long as its manifest says, or a sample lacks a file; names both.
    """
    manifests = read_manifests(out)
    if not manifests:
        raise OutputError(f"{out} holds no finished shard yet: let `dataset` finish one.")
    tars = [out / "shards" / f"{manifest.shard}.tar" for manifest in manifests]
    for tar, manifest in zip(tars, manifests, strict=True):
        claimed = manifest.files.get(tar.name, {}).get("bytes")
        if not tar.is_file() or tar.stat().st_size != claimed:
            raise CorruptShardError(f"{tar.name}: it has not the {claimed} bytes that {manifest.shard}.json says")
    first = next((tar for tar, manifest in zip(tars, manifests, strict=True) if manifest.kept), None)
    for _, files in samples(first, 0, 1, lambda suffix: False) if first else ():
        if "arcface.npy" not in files:
            raise OutputError("The samples hold no ID vectors: make the dataset again with --set pack.embeddings=true.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty: give a new folder.")
        for name in ("images", "faces", "ids"):
            (folder / name).mkdir()
    listed = left_out = 0
    root = f"{folder.resolve()}/" if absolute else ""
    with _lost_errors(folder), closing(Draft(folder / LIST)) as draft:
        draft.stream.write(b"[")  # one JSON array, an entry a line, which is never held as a whole
        for tar in tars:
            for sample in unpack(tar):
                try:
                    entry = _export(sample, folder, crop, id_format)
                except (KeyError, ValueError, TypeError, RecursionError, CorruptShardError) as error:
                    raise CorruptShardError(f"{tar.name}: {sample.key} is no whole sample ({error})") from error
                if entry is None:
                    left_out += 1
                    continue
                entry |= {field: f"{root}{path}" for field, path in entry.items() if field.endswith("_file")}
                draft.stream.write(b",\n" if listed else b"\n")
                draft.stream.write(json.dumps(entry, ensure_ascii=False).encode(errors="replace"))
                listed += 1
        draft.stream.write(b"\n]\n")
        draft.fsync()
        draft.publish()
        fsync_names(folder)
    return listed, left_out


@contextmanager
def _lost_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except RemoteError:  # of the dataset
        raise
    except OSError as error:
        raise LostError(
            f"{folder} cannot be written any more ({error.strerror or error}): remove it, and give the same call again."
        ) from error


def _export(sample: Sample, folder: Path, crop: Crop, id_format: IdFormat) -> dict[str, Any] | None:
    """Write the files of a sample; its entry in the list with paths below the folder, or None where it has no crop."""
    content = json.loads(sample.files["json"])
    areas = {one: math.prod(content["crops"][one]["size"]) for one in get_args(Crop) if f"{one}.jpg" in sample.files}
    if not areas:
        return None
    shown = crop if crop in areas else max(areas, key=areas.__getitem__)
    suffix, vector = "npy", sample.files["arcface.npy"]
    if id_format == "pt-numpy":
        import torch  # takes seconds, so only where it is needed

        buffer = io.BytesIO()
        torch.save(decode_npy(vector).copy(), buffer)
        suffix, vector = "bin", buffer.getvalue()
    files = {
        "image_file": (f"images/{sample.key}.jpg", sample.files[f"{shown}.jpg"]),
        "id_embed_file": (f"ids/{sample.key}.{suffix}", vector),
        "face_image_file": (f"faces/{sample.key}.jpg", sample.files["face.jpg"]),
    }
    for name, data in files.values():
        (folder / name).write_bytes(data)
    paths = {field: name for field, (name, _) in files.items()}
    return {**paths, "text": content["text"], "id_embed_norm": content["embedding_norm"]}
