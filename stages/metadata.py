"""What the metadata alone decides: addresses, safety tags, watermarks, sizes and duplicates, before any download."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.arrays import Mask
from schemas.columns import COLUMNS
from schemas.drops import DropReason
from schemas.urls import identity
from stages.base import DROP, Stage
from stages.runtime import Runtime
from stages.settings import Settings

_PORT = r"[0-9]{0,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_HOST = r"\[[0-9a-f:.]+\]|[^\s/?#@:\[\]\\]*[\pL\pN][^\s/?#@:\[\]\\]*"
_URL = rf"(?i)^https?://(?:[^/?#@\s]*@)?(?:{_HOST})(?::(?:{_PORT}))?(?:[/?#][^\x00-\x1f]*)?$"


class Metadata(Stage):
    """Drop rows that their metadata rules out; of several reasons the first of `drops` stands.

    One instance judges one part, in row order: it remembers the URLs of the candidates so far (16 bytes each), and a
    row is a duplicate when an earlier candidate has its URL, however it is written. A null never drops a row, except a
    null URL. Rows with an `image_ref` were downloaded before, so their URL may be anything; those without an image in
    the tar ("") neither are nor make duplicates.
    """

    name = "metadata"
    reads = ("url", "image_ref", "broken", "meta_width", "meta_height", "nsfw", "punsafe", "pwatermark")
    writes = ()
    drops = (
        DropReason.BAD_METADATA,
        DropReason.BAD_URL,
        DropReason.UNSAFE,
        DropReason.WATERMARK,
        DropReason.SMALL_IMAGE,
        DropReason.DUPLICATE_URL,
    )

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings = settings
        self._tags = pa.array([tag.strip().upper() for tag in settings.metadata.nsfw_tags], pa.string())
        self._seen = SeenUrls()

    def __call__(self, table: pa.Table) -> pa.Table:
        limits, shortest = self.settings.metadata, self.settings.filter.min_image_px
        urls, tags = pc.utf8_trim_whitespace(table["url"]), pc.utf8_upper(pc.utf8_trim_whitespace(table["nsfw"]))
        is_url = pc.fill_null(pc.match_substring_regex(urls, _URL), False)
        reasons = {
            DropReason.BAD_METADATA: table["broken"],
            DropReason.BAD_URL: pc.and_(pc.is_null(table["image_ref"]), pc.invert(is_url)),
            DropReason.UNSAFE: pc.or_kleene(
                _above(table["punsafe"], limits.max_punsafe), pc.is_in(tags, value_set=self._tags)
            ),
            DropReason.WATERMARK: _above(table["pwatermark"], limits.max_pwatermark),
            # Either side decides alone, so swapped columns and a single known side are judged alike.
            DropReason.SMALL_IMAGE: pc.or_kleene(
                pc.less(table["meta_width"], shortest), pc.less(table["meta_height"], shortest)
            ),
        }
        masks = pc.make_struct(*(pc.fill_null(mask, False) for mask in reasons.values()))
        drop = pc.case_when(masks, *(reason.value for reason in reasons))
        alive = np.flatnonzero(_mask(pc.is_null(drop)))
        repeated = np.zeros(table.num_rows, dtype=bool)
        repeated[alive] = self._seen.repeats(table, alive)
        return pa.table({DROP: pc.if_else(pa.array(repeated), DropReason.DUPLICATE_URL.value, drop)})


@dataclass
class SeenUrls:
    """The URLs of a part's candidates so far, as 128-bit hashes in sorted arrays: 16 bytes per URL, at most twice."""

    _runs: list[npt.NDArray[np.bytes_]] = field(default_factory=list)

    def repeats(self, table: pa.Table, rows: npt.NDArray[np.intp]) -> Mask:
        """Which of these rows have the URL of an earlier one, of this table or of a table before; adds the others."""
        repeated = np.zeros(len(rows), dtype=bool)
        chosen = table.select(["url", "image_ref"]).take(pa.array(rows))
        known = np.flatnonzero(_mask(pc.is_valid(chosen["url"])) & ~_mask(pc.equal(chosen["image_ref"], "")))
        forms = map(identity, chosen["url"].take(pa.array(known)).to_pylist())
        digests = [hashlib.blake2b(form.encode(), digest_size=16).digest() for form in forms]
        # numpy's S16 ignores trailing NULs, which is exact here: all hashes have the same length.
        hashes, first = np.unique(np.frombuffer(b"".join(digests), dtype="S16"), return_index=True)
        fresh = np.ones(len(hashes), dtype=bool)
        for run in self._runs:
            fresh &= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] != hashes
        repeated[known] = True
        repeated[known[first[fresh]]] = False
        # Merging only runs of like length keeps few runs to look in, at a logarithmic number of sorts per URL.
        added = hashes[fresh]
        while self._runs and len(self._runs[-1]) < 2 * len(added):
            added = np.sort(np.concatenate([self._runs.pop(), added]), kind="stable")
        if len(added):
            self._runs.append(added)
        return repeated


def _above(column: pa.ChunkedArray, limit: float) -> pa.ChunkedArray:
    # The limit in the column's own precision: 0.8 as float32 is more than 0.8, and must not count as above it.
    return pc.greater(column, pa.scalar(limit, COLUMNS["punsafe"].type))


def _mask(column: Any) -> Mask:
    mask: Mask = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
    return mask
