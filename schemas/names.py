"""Names: SHARDS ranges, sample keys, shard names. No name ever holds a dot (webdataset splits there)."""

import os
import re
from collections.abc import Iterable

from schemas.digest import sha256
from schemas.errors import SourceError

SAMPLE = "sample"
"""The bundled part."""

_RANGE = re.compile(r"((?:web:|made:)?)laion-part-(\d+)(?:\.\.(\d+))?")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_FURTHER = re.compile(r"(.+)-r(\d+)_\d+")
_MANIFEST = re.compile(r"([A-Za-z0-9_-]+-(?:r\d+_)?\d{5,})\.json")
_TAR_CHARS = 100
"""Of a name in a tar of webdataset, of which the row takes 10 and `.clip_hidden.npy` 16; with all options 37."""
_MOST_CHARS, _SHORTENED = 74, 44
"""Of a part's name, and what is left of a longer one, before a digest."""
_MOST_PARTS = 1_000_000
ROW_DIGITS = 9
_SHARD_DIGITS = 5


def split_spec(spec: str) -> list[str]:
    r"""Split SHARDS at commas, and expand each inclusive range `laion-part-A..B`, in the given order.

    `\,` is a comma of a path; a local path that exists as SHARDS has it is one word.

    Raises:
        SourceError: when SHARDS is empty, a kind stands before nothing, or a range runs backwards.
    """
    is_path = os.path.exists(os.path.expanduser(split_kind(spec.strip())[1]))
    split = [spec] if is_path else re.split(r"(?<!\\),", spec)
    words: list[str] = []
    for word in filter(None, (one.strip().replace("\\,", ",") for one in split)):
        if not split_kind(word)[1]:
            raise SourceError(f"{word!r} stands before nothing: write {word}pictures/, without a blank or comma.")
        match = _RANGE.fullmatch(word)
        first, last = (int(match[2]), int(match[3] or match[2])) if match else (0, 0)
        if last < first:
            raise SourceError(f"The range {word!r} runs backwards: write laion-part-{last}..{first}.")
        if last - first >= _MOST_PARTS:  # before they are counted up in memory
            raise SourceError(f"The range {word!r} names {last - first + 1:,} parts: no metadata has so many files.")
        words += [f"{match[1]}laion-part-{number}" for number in range(first, last + 1)] if match else [word]
    if not words:
        raise SourceError(
            "SHARDS is empty: give `sample`, `laion-part-0..99`, or a path, glob or URL of metadata files."
        )
    return words


def part_number(word: str) -> int | None:
    """The N of `laion-part-N`, or None when the word is something else (a path, say)."""
    match = _RANGE.fullmatch(word)
    return int(match[2]) if match and match[3] is None else None


def split_kind(word: str) -> tuple[str, str]:
    """The kind that stands before a word of SHARDS with its colon, or nothing, and the word: `made:`, `pictures/`."""
    match = re.fullmatch(r"((?:web:|made:)?)(.*)", word, re.DOTALL)
    assert match is not None, "both may be empty"
    return match[1], match[2]


def part_name(path: str) -> str:
    """A part's name from its file's path or URL: the stem, with all but letters, digits, `_` and `-` replaced.

    A long one is cut, and a digest of it put behind.
    """
    stem = path.rstrip("/").rsplit("/", 1)[-1].split("?", 1)[0]
    stem = re.sub(r"(\.(parquet|csv|jsonl|json|tsv|tar|gz|snappy|zst))+$", "", stem, flags=re.IGNORECASE)
    name = _UNSAFE.sub("-", stem).strip("-") or "part"
    if len(name) > _MOST_CHARS:
        name = f"{name[:_SHORTENED]}-{sha256(stem.encode(errors='backslashreplace'))[:8]}"
    return name


def fitting_name(part: str, suffixes: Iterable[str]) -> str:
    """A part's name, cut like a long one where a tar could not hold the names of samples' files with these suffixes."""
    is_long = max(len(f"{sample_key(part, 0)}.{suffix}") for suffix in suffixes) > _TAR_CHARS
    return part_names(part)[1] if is_long else part


def part_names(path: str) -> tuple[str, str]:
    """A part's name from its file's path or URL, and the one that it has where a tar could not hold it."""
    part = part_name(path)
    return part, f"{part[:_SHORTENED]}-{sha256(part.encode())[:8]}"


def sample_key(part: str, row: int) -> str:
    """The key of a row: `<part>-<row>`, zero-padded so that keys sort as rows do."""
    return f"{part}-{row:0{ROW_DIGITS}d}"


def shard_name(part: str, number: int, round: int = 0) -> str:
    """The name of a part's shard without suffix: `<part>-<NNNNN>`, in a further round `<part>-r<round>_<NNNNN>`."""
    further = f"r{round}_" if round else ""
    return f"{part}-{further}{number:0{_SHARD_DIGITS}d}"


def finished_shards(files: Iterable[str]) -> list[str]:
    """The shards whose manifests are among some files of OUT/shards, sorted; files with other names are not ours."""
    return sorted(match[1] for name in files if (match := _MANIFEST.fullmatch(name)))


def shard_origin(shard: str) -> tuple[str, int]:
    """The part of a shard, and the round that it was made in: 0, or that of a second chance.

    The names of no two parts lead to one shard name: only those of further rounds hold an underscore before the number.
    """
    match = _FURTHER.fullmatch(shard)
    return (match[1], int(match[2])) if match else (shard.rpartition("-")[0], 0)
