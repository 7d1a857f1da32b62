"""The kept samples of some datasets as `group` sees them: vectors, hashes, ledger rows, and where their files lie.

No picture stays in memory: vectors and ledger rows lie in scratch files; of a photo some 100 bytes are held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from tarfile import BLOCKSIZE
from tempfile import TemporaryFile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.execute.make_shard import windowed
from pipeline.dataset.finished.group.near_copies import SIDE, Looks, details, hashes
from pipeline.dataset.out.forgotten import load
from pipeline.dataset.out.ledger import read_ledger
from pipeline.dataset.out.takedowns import Takedowns
from pipeline.shared.files import AnyPath, read_range
from pipeline.shared.tars import NATIVE, corrupt_errors, members, read
from schemas.arrays import Floats, Image, Integers
from schemas.columns import KEPT, LEDGER, LEDGER_SCHEMA
from schemas.errors import CorruptShardError, OutputError
from schemas.shard import decode_npy
from stages.pixels.images import decode_jpeg

_WIDTH = 512
_RECORD = np.dtype([("vector", np.float32, (_WIDTH,)), ("face", np.int8, (SIDE, SIDE))])
"""What of a photo lies on disk, before its descriptor."""
_PICTURES = ("full.jpg", "half.jpg", "portrait.jpg", "face.jpg")
"""The first of these that there is stands for the photo."""
_AHEAD = 64

Describe = Callable[[Image], Floats]
"""The (D,) descriptor of unit length of a (H, W, 3) RGB photo."""


@dataclass(frozen=True)
class Photos:
    """N kept samples, in the order of the datasets."""

    vectors: Floats
    """(N, 512) of unit length, on disk."""
    looks: Looks
    """But for hashes on disk."""
    spans: Integers
    """(N, 4): number in `tars`, number in its batch of `ledgers`, first byte and end of its files in the tar."""
    tars: list[AnyPath]
    ledgers: pa.RecordBatchFileReader
    """A batch of LEDGER columns per tar, on disk."""

    def __len__(self) -> int:
        return len(self.spans)

    def rows(self, numbers: Integers) -> pa.Table:
        """The ledger rows of some photos, in this order."""
        tars = self.spans[numbers, 0]
        order = np.argsort(tars, kind="stable")
        batches = [
            self.ledgers.get_batch(int(tar)).take(pa.array(self.spans[numbers[order[tars[order] == tar]], 1]))
            for tar in np.unique(tars)
        ]
        table = pa.Table.from_batches(batches, LEDGER_SCHEMA).combine_chunks()
        return table.take(pa.array(np.argsort(order)))

    def worth(self) -> Floats:
        """(N,) the size of the face, pixels: of copies the largest stays."""
        sizes = [self.ledgers.get_batch(tar)["face_px"].to_numpy(False) for tar in range(len(self.tars))]
        starts = np.cumsum([0, *map(len, sizes)])
        return np.concatenate(sizes)[starts[self.spans[:, 0]] + self.spans[:, 1]]

    def files(self, number: int) -> tuple[AnyPath, bytes]:
        """The tar of a photo, and the bytes of its members in it."""
        number, _, start, stop = self.spans[number].tolist()
        with corrupt_errors(self.tars[number]):
            return self.tars[number], read_range(self.tars[number], start, stop)


def read_photos(shards: Iterable[tuple[AnyPath, str]], describe: Describe | None = None) -> Photos:
    """Read the kept samples of some finished shards of datasets, but for what these are to forget.

    What is held on disk has no name: nothing is left of it, whoever is killed.

    Raises:
        OutputError: when there are none.
        CorruptShardError: names a file that is damaged, or contradicts another.
    """
    tars: list[AnyPath] = []
    spans, hashed = [np.zeros((0, 4), np.int64)], [np.zeros((0, 2), np.uint64)]
    with TemporaryFile() as numeric, TemporaryFile() as rows, ThreadPoolExecutor() as pool:
        with pa.ipc.new_file(rows, LEDGER_SCHEMA) as ledgers:
            for folder, shard in shards:
                ledger = read_ledger(folder, shard, LEDGER)
                reasons = Takedowns(load(folder)).reasons(ledger)
                stays = pc.and_(pc.equal(ledger["verdict"], KEPT), pc.is_null(reasons))
                ledger = ledger.filter(stays).cast(LEDGER_SCHEMA).combine_chunks()
                if not ledger.num_rows:
                    continue
                tar = folder / "shards" / f"{shard}.tar"
                numbers = {key: number for number, key in enumerate(ledger["key"].to_pylist())}
                begun = (
                    (key, span, pool.submit(_measured, tar, key, files, describe))
                    for key, span, files in _samples(tar)
                    if key in numbers
                )
                own: list[tuple[int, ...]] = []
                codes: list[tuple[np.uint64, ...]] = []
                for key, span, measured in windowed(begun, lambda one: one, _AHEAD):
                    code, record = measured.result()
                    numeric.write(record)
                    codes.append(code)
                    own.append((len(tars), numbers.pop(key), *span))
                if numbers:
                    raise CorruptShardError(f"{tar}: it lacks {min(numbers)}, which its ledger keeps")
                spans.append(np.array(own, np.int64))
                hashed.append(np.array(codes, np.uint64))
                ledgers.write_batch(ledger.to_batches()[0])
                tars.append(tar)
        if not tars:
            raise OutputError("No photo was kept in what is to be grouped: there is nothing to group.")
        rows.flush()
        numeric.flush()
        width = numeric.tell() // sum(map(len, spans)) - _RECORD.itemsize
        columns = np.memmap(numeric, [*_RECORD.descr, ("descriptor", np.float32, (width // 4,))], "r")
        return Photos(
            columns["vector"],
            Looks(np.concatenate(hashed), columns["face"], columns["descriptor"]),
            np.concatenate(spans),
            tars,
            pa.ipc.open_file(pa.memory_map(f"/proc/self/fd/{rows.fileno()}")),
        )


def _samples(tar: AnyPath) -> Iterator[tuple[str, tuple[int, int], dict[str, bytes]]]:
    """Key, first byte and end, and those files that are looked at, of each sample of a tar."""
    with corrupt_errors(tar), tar.open("rb") as stream:
        for key, group in groupby(members(stream), lambda info: info.name.partition(".")[0]):
            every = list(group)
            suffixes = (info.name.partition(".")[2] for info in every)
            infos = {NATIVE.get(suffix, suffix): info for suffix, info in zip(suffixes, every, strict=True)}
            picture = next((suffix for suffix in _PICTURES if suffix in infos), "")
            wanted = {"arcface.npy", "face.jpg", picture} & infos.keys()
            files = {suffix: read(stream, infos[suffix].offset_data, infos[suffix].size) for suffix in wanted}
            stop = every[-1].offset_data + every[-1].size
            yield key, (every[0].offset, stop + -stop % BLOCKSIZE), files


def _measured(
    tar: AnyPath, key: str, files: Mapping[str, bytes], describe: Describe | None
) -> tuple[tuple[np.uint64, ...], bytes]:
    """The hashes of a sample, and the bytes of its ID vector, details and descriptor."""
    try:
        vector = decode_npy(files["arcface.npy"])
        if vector.shape != (_WIDTH,) or vector.dtype != np.float32 or not np.isfinite(vector).all():
            raise ValueError("arcface.npy is no ID vector")
        picture = next(suffix for suffix in _PICTURES if suffix in files)
        grey = (cv2.IMREAD_REDUCED_GRAYSCALE_8 if picture != "face.jpg" else cv2.IMREAD_GRAYSCALE, cv2.IMREAD_GRAYSCALE)
        photo, face = (
            cv2.imdecode(np.frombuffer(files[suffix], np.uint8), mode)
            for suffix, mode in zip((picture, "face.jpg"), grey, strict=True)
        )
        if photo is None or face is None:
            raise ValueError(f"{picture} or face.jpg cannot be decoded")
        descriptor = describe(decode_jpeg(files[picture])).tobytes() if describe else b""
        return hashes(photo), vector.tobytes() + details(face).tobytes() + descriptor
    except (KeyError, ValueError, StopIteration, cv2.error, CorruptShardError) as error:
        raise CorruptShardError(f"{tar}: {key}: {error}") from error
