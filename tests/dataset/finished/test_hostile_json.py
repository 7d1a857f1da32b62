"""Json of samples as no `pack` writes it, in a dataset of somebody else whose hashes are right: never a traceback."""

import json
from contextlib import suppress
from io import StringIO

import fake_dataset as fake
import pytest
from rich.console import Console

from pipeline.dataset.finished.export_json import export_json
from pipeline.dataset.finished.group.grouping import Wish, group
from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.report import write_report
from pipeline.dataset.finished.verify import verify
from pipeline.dataset.out.ledger import funnel
from schemas.errors import CorruptShardError
from schemas.shard import SUFFIXES, sample_files, sample_sha256

HUGE = 10**7
CUT = {"resized": [HUGE, HUGE], "offset": [0, 0], "size": [HUGE, HUGE]}
TARGETS = {"base": "b", "kind": "sd15", "vae_sha256": "v", "text_sha256": "t", "resolution": 8}
TARGETS |= {"latents": {"full": CUT}}


@pytest.mark.parametrize(
    "change",
    [
        {"text": "\ud800"},
        pytest.param({"url": "http://\ud800"}, marks=pytest.mark.long),
        {"\ud800": 1},
        {"det_score": 10**400},
        pytest.param({"bbox": [10**400] * 4}, marks=pytest.mark.long),
        {"targets": TARGETS},
        [1],
        "deep",
    ],
    ids=["text", "url", "key", "number", "numbers", "latents", "array", "deep"],
)
def test_json_of_others_is_read_or_a_sentence(tmp_path, change):
    record = fake.record("a", 0)
    content = {**json.loads(record["json"]), **change} if isinstance(change, dict) else change
    record["json"] = b"[" * 100_000 if change == "deep" else json.dumps(content).encode()
    files = sample_files({**dict.fromkeys(SUFFIXES.values()), **record})
    if "targets" in change:
        record["latents_full"] = files["latents.full.npy"] = b"latents"
    record["sample_sha256"] = sample_sha256(files)
    out = fake.write(tmp_path / "out", {"a-00000": [record, fake.record("a", 1)]})
    problems = verify(out)
    if "targets" in change:
        assert any(one.message.startswith("latents.full.npy is not an npy") for one in problems)
    for call in (
        lambda: write_report(out),
        lambda: write_card(out, funnel(out)),
        lambda: export_json(out, tmp_path / "single"),
        lambda: group([out], tmp_path / "grouped", Wish(), Console(file=StringIO())),
    ):
        with suppress(CorruptShardError):
            call()
