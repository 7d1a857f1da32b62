"""Content codings that nobody asked for: undone in bounded pieces, or left alone."""

import gzip
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.drops import Dropped, DropReason
from stages.fetch.http.inflate import LARGE_PIECE, Inflated


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def split(data, cuts):
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


PACKERS = {
    "gzip": gzip.compress,
    "X-GZip": gzip.compress,
    "gzip of members": lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:]),
    "gzip, filled up": lambda data: gzip.compress(data) + bytes(20),
    "deflate": zlib.compress,
    "deflate without its header": raw_deflate,
}


@pytest.mark.parametrize("packer", PACKERS)
@given(data=st.binary(max_size=2000), cuts=st.lists(st.integers(0, 3000), max_size=8))
def test_what_was_packed_comes_out_however_it_is_cut(packer, data, cuts):
    unpacker = Inflated(is_gzip="gzip" in packer.lower())
    pieces = split(PACKERS[packer](data), cuts)
    assert b"".join(part for piece in pieces for part in unpacker.feed(piece)) == data
    assert unpacker.is_done


def test_a_bomb_unfolds_in_pieces():
    sizes = [len(part) for part in Inflated(is_gzip=True).feed(gzip.compress(bytes(20_000_000)))]
    assert sum(sizes) == 20_000_000
    assert max(sizes) <= LARGE_PIECE


@pytest.mark.parametrize("is_gzip", [True, False])
@given(data=st.binary(max_size=200))
def test_any_bytes_end_well_or_as_no_http(is_gzip, data):
    unpacker = Inflated(is_gzip)
    reason = DropReason.HTTP_ERROR
    try:
        list(unpacker.feed(data))
    except Dropped as dropped:
        reason = dropped.reason
    assert reason == DropReason.HTTP_ERROR
