import pickle

import pyarrow as pa
import pytest

from pipeline.dataset.execute.make_shard import regrouped
from pipeline.dataset.execute.runner import Loaded, apply
from pipeline.dataset.rows import Rows
from schemas.columns import LEDGER, SEED_SCHEMA
from schemas.drops import Dropped, DropReason
from schemas.errors import ContractError
from stages.base import DROP, RowStage
from stages.runtime import Runtime
from stages.settings import Settings

KEEP = frozenset({*LEDGER, "image", "text"})


class Fetch(RowStage):
    """Rows 0, 3, 6 … are not found; the others get a picture."""

    name = "fetch"
    reads = ("row",)
    writes = ("image", "sha256", "n_bytes", "width")
    drops = (DropReason.NOT_FOUND, DropReason.SMALL_IMAGE)

    def row(self, record):
        assert set(record) == {"row"}
        if record["row"] % 3 == 0:
            raise Dropped(DropReason.NOT_FOUND, width=7)
        return {"image": b"picture", "sha256": "ab", "n_bytes": 7, "width": record["row"]}


def seeds(count: int) -> pa.Table:
    rows = [{"key": f"p-{n:09d}", "part": "p", "row": n, "url": f"http://x/{n}", "text": "t"} for n in range(count)]
    return pa.Table.from_pylist(rows, schema=SEED_SCHEMA)


def run(stage, table=None, keep=KEEP) -> Rows:
    return apply(Loaded(stage, keep), Rows.living(seeds(7) if table is None else table))


def test_dropped_rows_become_tombstones_with_their_measurements():
    rows = run(Fetch(Settings(), Runtime()))
    assert rows.alive.column("row").to_pylist() == [1, 2, 4, 5]
    assert rows.dead.column_names == list(LEDGER)
    assert rows.dead.select(["row", "verdict", "stage", "width"]).to_pylist() == [
        {"row": n, "verdict": "not_found", "stage": "fetch", "width": 7} for n in (0, 3, 6)
    ]


def test_a_stage_is_not_called_where_no_row_lives():
    """Models cannot run on nothing."""

    class Never(Fetch):
        def __call__(self, table):
            pytest.fail("called")

    assert run(Never(Settings(), Runtime()), seeds(0)).alive.num_rows == 0


class Look(RowStage):
    name = "look"
    reads = ("image",)
    writes = ("height",)
    drops = (DropReason.NO_FACE,)

    def row(self, record):
        return {"height": len(record["image"])}


def picture_addresses(rows: Rows) -> set[int]:
    return {chunk.buffers()[2].address for chunk in rows.alive["image"].chunks}


def test_where_nothing_is_dropped_no_picture_is_copied():
    rows = run(Fetch(Settings(), Runtime()))
    looked = apply(Loaded(Look(Settings(), Runtime()), KEEP), rows)
    assert looked.alive["height"].to_pylist() == [7] * 4
    assert picture_addresses(looked) == picture_addresses(rows)
    first, rest = Rows.joined([looked, looked]).split(3)
    assert picture_addresses(first) == picture_addresses(rest) == picture_addresses(rows)


def test_rows_go_to_another_process_whole_and_a_slice_without_the_rest_of_its_batch():
    rows, _ = run(Fetch(Settings(), Runtime()), seeds(99)).split(30)
    shared: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(rows, 5, buffer_callback=shared.append)
    assert b"picture" not in sent
    assert 30 <= sum(bytes(buffer).count(b"picture") for buffer in shared) < 40, "of 66; Arrow rounds up to 64 bytes"
    received = pickle.loads(sent, buffers=shared)
    assert received == rows
    held = [received.dead, received.alive.select([name for name in received.alive.column_names if name in LEDGER])]
    buffers = [b for table in held for c in table.columns for chunk in c.chunks for b in chunk.buffers() if b]
    memory = [(b.address, b.address + b.size) for b in map(pa.py_buffer, shared)]
    assert not any(start <= b.address < end for b in buffers for start, end in memory), "held until the shard is done"


class Bad(Fetch):
    """Breaks its declaration in the way that `how` returns."""

    def __init__(self, how):
        super().__init__(Settings(), Runtime())
        self.how = how

    def __call__(self, table):
        return self.how(super().__call__(table))


def undeclared(table):
    reasons = pa.array(["no_face"] * table.num_rows, pa.string())
    return table.set_column(table.column_names.index(DROP), DROP, reasons)


def nulls(table):
    return table.set_column(table.column_names.index("sha256"), "sha256", pa.nulls(table.num_rows, pa.string()))


@pytest.mark.parametrize(
    "how",
    [
        lambda table: table.slice(1),
        lambda table: table.drop_columns(["n_bytes"]),
        lambda table: table.append_column("det_score", pa.nulls(table.num_rows, pa.float32())),
        lambda table: table.set_column(0, "image", pa.array(["x"] * table.num_rows)),
        undeclared,
        nulls,
    ],
    ids=["rows lost", "column missing", "column undeclared", "wrong type", "undeclared reason", "null in a living row"],
)
def test_a_stage_that_breaks_its_declaration_is_stopped(how):
    with pytest.raises(ContractError, match="fetch"):
        run(Bad(how))


def test_an_unforeseen_error_is_not_swallowed():
    class Breaks(Fetch):
        def row(self, record):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Breaks(Settings(), Runtime()))


@pytest.mark.parametrize(
    ("sizes", "expected"), [([7, 7, 7], [5, 5, 4]), ([1], [0]), ([0, 2, 3], [3]), ([20], [5, 5, 3])]
)
def test_regrouped_batches_hold_the_same_rows_in_order(sizes, expected):
    start, batches = 0, []
    for size in sizes:
        batches.append(run(Fetch(Settings(), Runtime()), seeds(start + size).slice(start)))
        start += size
    groups = list(regrouped(iter(batches), 5))
    assert [rows.alive.num_rows for rows in groups] == expected
    alive = [row for rows in groups for row in rows.alive.column("row").to_pylist()]
    dead = [row for rows in groups for row in rows.dead.column("row").to_pylist()]
    assert (alive, dead) == ([n for n in range(start) if n % 3], [n for n in range(start) if n % 3 == 0])


class Points(RowStage):
    """Five points in each picture; every third row falls."""

    name = "points"
    reads = ("row",)
    writes = ("kps",)
    drops = (DropReason.NO_FACE,)

    def row(self, record):
        if record["row"] % 3 == 1:
            raise Dropped(DropReason.NO_FACE, kps=points(record["row"]))
        return {"kps": points(record["row"])}


def points(row: int) -> list[list[float]]:
    return [[float(row), float(n)] for n in range(5)]


def test_points_stay_with_their_rows_however_the_batches_were_cut():
    fetched = [run(Fetch(Settings(), Runtime()), seeds(start + 7).slice(start)) for start in (0, 7, 14)]
    for rows in regrouped(iter(fetched), 6):
        measured = apply(Loaded(Points(Settings(), Runtime()), KEEP), rows)
        assert measured.alive.num_rows
        for row, kps in zip(measured.alive["row"].to_pylist(), measured.alive["kps"].to_pylist(), strict=True):
            assert kps == points(row)
        for record in measured.dead.select(["row", "kps", "stage"]).to_pylist():
            assert record["kps"] == (points(record["row"]) if record["stage"] == "points" else None)


def test_one_photo_per_reason_is_kept_as_a_witness():
    class Second(RowStage):
        name = "second"
        reads = ("image", "row")
        writes = ()
        drops = (DropReason.NO_FACE, DropReason.SMALL_FACE)

        def row(self, record):
            return {DROP: DropReason.NO_FACE if record["row"] < 5 else DropReason.SMALL_FACE}

    rows = apply(Loaded(Second(Settings(), Runtime()), KEEP), run(Fetch(Settings(), Runtime())))
    assert rows.witnesses.to_pylist() == [
        {"key": "p-000000001", "verdict": "no_face", "image": b"picture"},
        {"key": "p-000000005", "verdict": "small_face", "image": b"picture"},
    ]
