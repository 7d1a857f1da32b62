"""The download stage: the bytes of an image, from the web or from an existing download."""

import pkgutil
from hashlib import sha256
from typing import Any, ClassVar

import pyarrow as pa

from schemas.drops import DropReason
from stages.base import DROP, to_table
from stages.fetch import ENGINES, tar
from stages.fetch.base import Engine, Outcome
from stages.settings import Settings


class Download:
    """Fetches each row's image file; a row with an image_ref is read from the tar that it names instead.

    May be called from several threads at once. Width and height are written only for rows that are dropped as
    SMALL_IMAGE, whose bodies were not read to their end.
    """

    name: ClassVar[str] = "download"
    reads: ClassVar[tuple[str, ...]] = ("url", "image_ref")
    writes: ClassVar[tuple[str, ...]] = ("image", "sha256", "n_bytes", "width", "height")
    drops: ClassVar[tuple[DropReason, ...]] = (
        DropReason.BAD_URL,
        DropReason.SMALL_IMAGE,
        DropReason.FORBIDDEN_ADDRESS,
        DropReason.DNS_ERROR,
        DropReason.CONNECTION_ERROR,
        DropReason.TIMEOUT,
        DropReason.NOT_FOUND,
        DropReason.ACCESS_DENIED,
        DropReason.RATE_LIMITED,
        DropReason.HTTP_ERROR,
        DropReason.SERVER_ERROR,
        DropReason.REDIRECT_LOOP,
        DropReason.TOO_MANY_BYTES,
        DropReason.EMPTY_BODY,
        DropReason.INCOMPLETE_BODY,
        DropReason.OPTED_OUT,
        DropReason.NOT_IN_TAR,
        DropReason.NOT_AN_IMAGE,
    )

    def __init__(self, settings: Settings) -> None:
        """Start the engine that `settings.download.engine` names."""
        self._settings = settings
        self._engine: Engine = pkgutil.resolve_name(ENGINES[settings.download.engine])(settings)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Fetch all rows, as many at a time as the settings allow."""
        urls, refs = table["url"].to_pylist(), table["image_ref"].to_pylist()
        stored = iter(tar.read([ref for ref in refs if ref is not None], self._settings))
        fetched = iter(self._engine.fetch([url for url, ref in zip(urls, refs, strict=True) if ref is None]))
        outcomes = [next(fetched if ref is None else stored) for ref in refs]
        return to_table([_row(outcome) for outcome in outcomes], self.writes, self.drops)

    def close(self) -> None:
        """Let go of the engine's threads and connections."""
        self._engine.close()


def _row(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, bytes):
        return {"image": outcome, "sha256": sha256(outcome).hexdigest(), "n_bytes": len(outcome)}
    return {**outcome.measured, DROP: outcome.reason}
