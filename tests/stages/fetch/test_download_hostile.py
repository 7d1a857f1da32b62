"""The hostile web in small: every behaviour of tests/hostile.py through the real stage. benchmarks/bench_hostile.py
does the same with 100,000 rows."""

from collections import Counter

import hostile
import pyarrow as pa
import pytest

from stages.base import DROP
from stages.download import Download
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings


@pytest.fixture
def stage():
    base = {"allow_loopback": True, "timeout_s": hostile.TIMEOUT_S, "max_bytes": hostile.MAX_BYTES, "max_redirects": 3}
    download = Download(Settings(download=DownloadSettings(**base, concurrency=512)), Runtime())
    yield download
    download.close()


def fetch(stage, urls):
    table = pa.table({"url": pa.array(urls, pa.string()), "image_ref": pa.nulls(len(urls), pa.string())})
    return stage(table)[DROP].to_pylist()


@pytest.mark.parametrize("per_behaviour", [2, pytest.param(8, marks=pytest.mark.long)])
def test_every_row_meets_its_verdict(stage, names, per_behaviour):
    with hostile.elsewhere() as (ports, requests):
        rows = list(hostile.rows(per_behaviour, ports))
        # what was refused comes once more when that is known; all that takes a whole deadline comes before, at once
        again = [row for row in rows[len(rows) // 2 :] if hostile.BEHAVIOURS[row[0]].says_no]
        first = rows[: len(rows) // 2]
        first += [row for row in rows[len(rows) // 2 :] if not hostile.BEHAVIOURS[row[0]].says_no]
        rows = first + again
        reasons = [reason for part in (first, again) for reason in fetch(stage, [url for _, url in part])]
    wrong = Counter(
        (name, reason)
        for (name, _), reason in zip(rows, reasons, strict=True)
        if reason != hostile.BEHAVIOURS[name].verdict
    )
    assert not wrong
    assert len(reasons) == len(rows) >= 80 * per_behaviour
    assert set(names.tried) == {"127.0.0.1"}
    asked = hostile.refused(requests)
    assert set(asked.values()) == {1}, "asked again after a refusal"
    assert not [path for _, path in asked if path.startswith("/robots-no/")]
