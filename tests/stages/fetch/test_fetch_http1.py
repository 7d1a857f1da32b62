import gzip
import random
import zlib
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.drops import DropReason
from stages.base import Dropped
from stages.fetch import address
from stages.fetch.http import http1


def head(*lines):
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode("latin-1")


def refused(work, *args):
    with pytest.raises(Dropped) as caught:
        list(work(*args) or ())
    return caught.value.reason == DropReason.HTTP_ERROR


@contextmanager
def http_errors():
    """What is read within may be no HTTP; nothing else may come of it."""
    try:
        yield
    except Dropped as dropped:
        if dropped.reason != DropReason.HTTP_ERROR:
            raise


def chunked(pieces, extension=b""):
    return b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces) + b"0\r\n\r\n"


def split(data, cuts):
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


# Requests and heads


def test_a_request_asks_for_the_file_as_it_is():
    url = address.parse("http://a.test:8080/x%2F.jpg?q=1")
    assert http1.request(url, "bot/1 (me@example.org)") == (
        b"GET /x%2F.jpg?q=1 HTTP/1.1\r\nHost: a.test:8080\r\nUser-Agent: bot/1 (me@example.org)\r\n"
        b"Accept: */*\r\nAccept-Encoding: identity\r\n\r\n"
    )


def test_a_head_is_read():
    parsed = http1.parse_head(
        head("x-robots-tag: noai", "Content-LENGTH:  12 ", "X-Robots-Tag: nofollow", "Retry-After: 5", "Other: x")
    )
    assert parsed == (200, ["noai", "nofollow"], "5", None, 12, False, "", True)


@pytest.mark.parametrize(
    ("lines", "length", "is_chunked", "keep"),
    [
        (["Content-Length: 5"], 5, False, True),
        (["Content-Length: 5", "Connection: Close"], 5, False, False),
        (["Content-Length: 5, 5"], 5, False, True),
        ([], None, False, False),
        (["Transfer-Encoding: chunked"], None, True, True),
        (["Transfer-Encoding: identity", "Content-Length: 5"], 5, False, True),
        (["Transfer-Encoding: Chunked", "Content-Length: 5"], None, True, False),
    ],
)
def test_where_a_body_ends(lines, length, is_chunked, keep):
    parsed = http1.parse_head(head(*lines))
    assert (parsed.length, parsed.chunked, parsed.keep) == (length, is_chunked, keep)


def test_a_wish_on_a_folded_line_counts():
    assert http1.parse_head(head("X-Robots-Tag: nofollow,", "  noai")).robots_tags == ["nofollow, noai"]


def test_a_name_at_the_end_of_another_name_is_another_name():
    assert http1.parse_head(head("Not-Content-Length: 5", "Link: <x>; content-length: 7")).length is None


@pytest.mark.parametrize(
    "block",
    [
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 099 Odd\r\n\r\n",
        b"HTTP/1.9 200 OK\r\n\r\n",
        b"HTTP/1.1200 OK\r\n\r\n",
        head("Content-Length: 5", "Content-Length: 6"),
        head("Content-Length: 5, 6"),
        head("Content-Length: -5"),
        head("Content-Length: 0x5"),
        head("Content-Length: 5 5"),
        head("Content-Length: \xb2"),
        head("Content-Length: " + "9" * 30),
        head("Transfer-Encoding: gzip, chunked"),
        head("Transfer-Encoding: chunked, chunked"),
        head(*(f"X{n}: 1" for n in range(300))),
    ],
)
def test_heads_without_sense(block):
    assert refused(http1.parse_head, block)


@pytest.mark.parametrize("data", [b"\0", b"220 smtp", b"HTTP/2", b"SSH-2.0", b"http/1.1 200 OK\r\n\r\n"])
def test_what_is_no_http_is_noticed_at_its_first_bytes(data):
    assert refused(http1.find_end, data)


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\n\r\n"])
def test_the_end_of_a_head_is_found_wherever_it_is_cut(end):
    data = b"HTTP/1.1 200 OK\r\nX: 1" + end
    seen = 0
    for size in range(len(data)):
        assert http1.find_end(data[:size], seen) is None
        seen = size
    assert http1.find_end(data + b"body\n\n", seen) == len(data)


def test_a_head_has_a_longest_length():
    most = http1.MOST_HEAD
    assert http1.find_end(b"HTTP/1.1 200 OK\r\n" + b"x" * (most - 21) + b"\r\n\r\n") == most
    assert refused(http1.find_end, b"HTTP/1.1 200 OK\r\n" + b"x" * (most - 20) + b"\r\n\r\n")
    assert refused(http1.find_end, b"HTTP/1.1 200 OK\r\n" + b"x" * most)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_head_or_an_error(data, plausible):
    data = b"HTTP/1.1 200 OK\r\n" * plausible + data
    with http_errors():
        end = http1.find_end(data)
        if end is not None:
            assert 100 <= http1.parse_head(data[:end]).status <= 999


# Chunks


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.lists(st.integers(0), max_size=20))
def test_chunks_carry_what_was_put_into_them_however_they_are_cut(pieces, cuts):
    reader = http1.Chunks()
    got = b"".join(part for data in split(chunked(pieces, b";a=b"), cuts) for part in reader.feed(data))
    assert got == b"".join(pieces)
    assert reader.done
    assert reader.clean


def test_trailers_are_passed_over_and_what_follows_is_told():
    reader = http1.Chunks()
    assert b"".join(reader.feed(b"3\nabc\n0\nX: 1\r\nY: 2\n\nHTTP/1.1 200 OK")) == b"abc"
    assert reader.done
    assert not reader.clean


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"-1\r\n",
        b"\r\n",
        b"100000000\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\r\n\r\n",
        b"5;" + b"x" * 2000,
        b"5;" + b"x" * 2000 + b"\r\n",
        b"0\r\n" + b"X: 1\r\n" * 2000,
        b"1\r\nx\r\n" * 2000,
    ],
)
def test_chunks_without_sense(data):
    assert refused(http1.Chunks().feed, data)


def test_small_chunks_of_a_large_body_are_no_flood():
    reader = http1.Chunks()
    data = chunked([b"x" * 200] * 5000)
    assert (
        sum(len(part) for start in range(0, len(data), 999) for part in reader.feed(data[start : start + 999])) == 10**6
    )


@given(st.binary(max_size=200))
def test_any_bytes_are_chunks_or_an_error(data):
    reader = http1.Chunks()
    with http_errors():
        assert sum(map(len, reader.feed(data))) <= len(data)


# Codings


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "pack"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)],
)
@given(data=st.binary(max_size=2000), cuts=st.lists(st.integers(0), max_size=9))
def test_what_was_packed_is_unpacked(coding, pack, data, cuts):
    reader = http1.Inflated(coding)
    assert b"".join(part for piece in split(pack(data), cuts) for part in reader.feed(piece)) == data
    assert reader.done


def test_a_bomb_unfolds_in_small_pieces_only_as_far_as_somebody_asks():
    bomb = gzip.compress(bytes(200 << 20), 1)
    pieces = http1.Inflated("gzip").feed(bomb)
    assert max(len(next(pieces)) for _ in range(10)) <= http1.LARGE_PIECE


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "nonsense"])
def test_codings_that_were_not_asked_for(coding):
    assert refused(http1.Inflated, coding)


@pytest.mark.parametrize("value", ["identity", "none", "UTF-8", ""])
def test_servers_that_name_a_coding_for_none(value):
    assert http1.parse_head(head(f"Content-Encoding: {value}")).coding == ""


@given(st.binary(min_size=1, max_size=500), st.sampled_from(["gzip", "deflate"]))
def test_any_bytes_are_packed_or_an_error(data, coding):
    with http_errors():
        list(http1.Inflated(coding).feed(data))


def test_a_stream_that_stops_is_not_done():
    reader = http1.Inflated("gzip")
    list(reader.feed(gzip.compress(random.Random(0).randbytes(999))[:-1]))
    assert not reader.done
