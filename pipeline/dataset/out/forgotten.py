"""What a dataset is to forget: OUT/forgotten.json, and shards that are rewritten for it.

The file holds salted hashes of URLs, sites and files, never these themselves. Every later run into the same OUT reads
it, and makes tombstones of such rows (`takedowns`).
"""

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.shared.files import AnyPath, fsync_names, rename, write
from schemas.arrays import Mask
from schemas.digest import sha256
from schemas.errors import CorruptShardError, OutputError
from schemas.names import part_names
from schemas.urls import host_of, identity

FORGOTTEN = "forgotten.json"
NEW = ".new-"
"""How the names of a rewritten shard's files begin until they replace the old ones."""

_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"[0-9.]+|.*:.*")


@dataclass(frozen=True)
class Forgotten:
    """Salted hashes of what is to be forgotten."""

    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()
    """Of the sha256 of image files."""
    files: frozenset[str] = frozenset()
    """Of the names of image files, in the forms that `given_forms` and `row_forms` have in common."""
    lists: str = ""
    """The digest of the lists of `download.removed` that all finished shards were made under, or rewritten for."""

    def __bool__(self) -> bool:
        return bool(self.urls or self.domains or self.contents or self.files)

    def adding(
        self,
        *,
        urls: Iterable[str] = (),
        domains: Iterable[str] = (),
        contents: Iterable[str] = (),
        files: Iterable[str] = (),
    ) -> "Forgotten":
        """With these URLs, these sites and all below them, and the files of these sha256 or names too."""
        return replace(
            self,
            urls=self.urls | {self._hash("url", identity(url)) for url in urls},
            domains=self.domains | {self._hash("domain", normal_domain(name)) for name in domains},
            contents=self.contents | {self._hash("content", normal_sha256(one)) for one in contents},
            files=self.files | {self._hash("file", form) for name in files for form in given_forms(name)},
        )

    def concerns_url(self, url: str | None) -> bool:
        """Whether a URL, or a site that it belongs to, is to be forgotten."""
        if url is None:
            return False
        if self.urls and self._hash("url", identity(url)) in self.urls:
            return True
        return bool(self.domains) and _concerns_host(self, host_of(url))

    def rows_in(self, table: pa.Table) -> Mask:
        """Which rows of seed or ledger columns have a URL or a file that is to be forgotten."""
        mask = self.contents_in(table)
        if self.urls or self.domains:
            mask |= np.array([self.concerns_url(url) for url in table["url"].to_pylist()], bool)
        if self.files:
            rows = zip(table["part"].to_pylist(), table["source_file"].to_pylist(), strict=True)
            forms = (row_forms(part, name) if name else () for part, name in rows)
            mask |= np.array([any(self._hash("file", one) in self.files for one in every) for every in forms], bool)
        return mask

    def contents_in(self, table: pa.Table) -> Mask:
        """Which rows have a file that is to be forgotten by its sha256."""
        if not self.contents or "sha256" not in table.column_names:
            return np.zeros(table.num_rows, bool)
        digests = table["sha256"].to_pylist()
        return np.array([one is not None and self._hash("content", one) in self.contents for one in digests], bool)

    def _hash(self, kind: str, form: str) -> str:
        return sha256(f"{self.salt}{kind}\0{form}".encode("utf-8", "surrogatepass"))


def given_forms(name: str) -> list[str]:
    """What `--file` gives, as `row_forms` may have it: with what a part made of the name of its folder, too."""
    name = name.removeprefix("./")
    folder, slash, inside = name.partition("/")
    return [name, *(f"{part}//{inside}" for part in part_names(folder) if folder and slash)]


def row_forms(part: str, source_file: str) -> tuple[str, ...]:
    """Two slashes part the name of a part from that of a file, which may begin with a folder of the same name."""
    return source_file, f"{part}/{source_file}", f"{part}//{source_file}"


@lru_cache(1 << 16)
def _concerns_host(forgotten: Forgotten, host: str) -> bool:
    """A site is concerned by what concerns a site above it; an address by itself alone."""
    names = host.split(".")
    above = [host] if _ADDRESS.fullmatch(host) else [".".join(names[start:]) for start in range(len(names))]
    return any(forgotten._hash("domain", name) in forgotten.domains for name in above)


def normal_domain(text: str) -> str:
    """A site as `host_of` gives it, from a host, with or without port, or from a URL.

    Raises:
        OutputError: when it is none, or would stand for all sites of a country or kind.
    """
    written = text.strip()
    host = host_of(written if "://" in written else f"http://{written.removeprefix('*').removeprefix('.')}")
    if not host or ("." not in host and ":" not in host and host != "localhost"):
        raise OutputError(f"{text!r} is no site: give a host such as example.org; sites below it count too.")
    return host


def normal_sha256(text: str) -> str:
    digest = text.strip().lower()
    if not _SHA256.fullmatch(digest):
        raise OutputError(f"{text!r} is no sha256: give 64 hexadecimal digits, as in a ledger.")
    return digest


def load(out: AnyPath) -> Forgotten:
    """The list of OUT; an empty one where there is none yet.

    Raises:
        CorruptShardError: when it is damaged: to go on would mean to fetch what was to be forgotten.
    """
    try:
        text = (out / FORGOTTEN).read_bytes()
    except FileNotFoundError:
        return Forgotten()
    except IsADirectoryError as error:
        raise CorruptShardError(f"{FORGOTTEN}: cannot be read: it is a folder") from error
    try:
        content = json.loads(text)
        content.setdefault("files", [])
        kinds = ("urls", "domains", "contents", "files")
        hashes = {name: frozenset(map(normal_sha256, content[name])) for name in kinds}
        forgotten = Forgotten(str(content["salt"]), lists=str(content.get("lists", "")), **hashes)
    except (ValueError, KeyError, TypeError, AttributeError, OutputError, RecursionError) as error:
        raise CorruptShardError(f"{FORGOTTEN}: cannot be read: {error}") from error
    if _text(forgotten) != text:
        raise CorruptShardError(f"{FORGOTTEN}: it was changed since it was written")
    return forgotten


def save(out: AnyPath, forgotten: Forgotten) -> None:
    write(out / FORGOTTEN, _text(forgotten))


def _text(forgotten: Forgotten) -> bytes:
    """As stable JSON text that a single changed byte contradicts."""
    fields = {name: value if isinstance(value, str) else sorted(value) for name, value in asdict(forgotten).items()}
    content: dict[str, Any] = {"version": _VERSION, **fields}
    for name in ("lists", "files"):  # which earlier releases did not know
        if not content[name]:
            del content[name]
    content["sha256"] = sha256(json.dumps(content, sort_keys=True).encode())
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def finish(out: AnyPath) -> None:
    """Give the files of rewritten shards their names, the manifest last; remove those of uncommitted ones.

    Every run into OUT, and every `forget`, begins with this.
    """
    shards = out / "shards"
    committed: list[AnyPath] = [*shards.glob(f"{NEW}*.json")]
    for name in sorted(manifest.name.removeprefix(NEW).removesuffix(".json") for manifest in committed):
        for suffix in ("tar", "parquet"):
            new = shards / f"{NEW}{name}.{suffix}"
            if new.exists():
                rename(new, shards / f"{name}.{suffix}")
        fsync_names(shards)
        rename(shards / f"{NEW}{name}.json", shards / f"{name}.json")
        fsync_names(shards)
    strays: list[AnyPath] = [*shards.glob(f"{NEW}*")]
    for stray in strays:
        stray.unlink(missing_ok=True)
