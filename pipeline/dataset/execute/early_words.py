"""What is likely wrong with a run, in words while it goes on rather than after a wasted day.

Of ordinary LAION a third of the links is dead, a fifth for the network, and 90 % and more of what is fetched is
dropped; what is looked for here lies far from that.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.dataset.out.ledger import why_nothing
from stages.fetch.answer import SECOND_CHANCE

_ROWS = 1_000
"""Fetched rows that are judged together: of an ordinary thousand, tens are kept."""
_FAILING = 0.75
"""Share of them that the network fails: three times the ordinary."""
_NAMES, _NAME_S = 200, 1.0
"""Names, and their mean time. A resolver that works takes 0.01 to 0.3 s; 64 are looked up at a time, so that at a
second each some 60 rows are fetched per second, whatever the line could do."""
_INPUT_ROWS, _PASSING = 100_000, 0.001
"""Input rows, and the share that their metadata must let live: of LAION's, 3 % claim 1,024 px."""


class EarlyWords:
    def __init__(self) -> None:
        self._fetched = self._failures = self._names = 0
        self._names_s = 0.0

    def of(self, now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Kind -> sentences, of what is wrong, again and again."""
        unfit = now["stages"]["metadata"]["dropped"]
        fetched, failures, begun = now["stages"]["download"]["rows_in"], now["network_failures"], now["begun_rows"]
        dropped = sum((Counter(stage["dropped"]) for stage in now["stages"].values()), Counter[str]())
        new, failed = fetched - self._fetched, failures - self._failures
        if not 0 <= new < _ROWS:  # less than none: a shard was begun again
            self._fetched, self._failures = fetched, failures
        if new >= _ROWS and failed > _FAILING * new:
            main = max(SECOND_CHANCE, key=lambda reason: dropped[reason])
            yield (
                "network",
                f"{failed:,} of the last {new:,} fetches failed for the network or a server, most as {main}: see "
                "whether this machine reaches the web, and its resolver answers. Once that is mended, --retry "
                "transient fetches them again.",
            )
        if now["names"] - self._names >= _NAMES:
            mean = (now["name_seconds"] - self._names_s) / (now["names"] - self._names)
            self._names, self._names_s = now["names"], now["name_seconds"]
            if mean > _NAME_S:
                yield (
                    "resolver",
                    f"The resolver takes {mean:.1f} s per name, and holds up the fetching: give this machine one that "
                    "is near and remembers, such as unbound.",
                )
        if not now["kept"] and fetched >= _ROWS:
            yield "nothing_kept", why_nothing(f"the first {fetched:,} rows that were fetched", dropped - Counter(unfit))
        if begun >= _INPUT_ROWS and begun - sum(unfit.values()) < _PASSING * begun:
            yield "nothing_kept", why_nothing(f"the first {begun:,} rows", unfit)
        if begun >= _ROWS and not now["captions"]:
            yield (
                "captions",
                f"None of the first {begun:,} rows has a caption: where there are some, name their column, such as by "
                "--set source.columns.text=title.",
            )
