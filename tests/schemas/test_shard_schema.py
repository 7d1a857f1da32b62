import ast
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from schemas.columns import COLUMNS, LATER, LEDGER_SCHEMA, complete
from schemas.digest import sha256_of_json
from schemas.errors import CorruptShardError
from schemas.shard import SUFFIXES, Manifest, decode_npy, encode_npy

FILES = {"p-00000.tar": {"bytes": 1, "sha256": "ab"}}
MANIFEST = Manifest("p-00000", "embedded", "ab", 3, 1, {"no_face": 2, "unsafe": 0}, [], FILES)


@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.uint8]), hnp.array_shapes(max_dims=3, max_side=5)))
def test_npy_bytes_come_back_equal(array):
    back = decode_npy(encode_npy(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_no_parser_of_python_reads_a_header(monkeypatch):
    """It fails where several threads use it, as those of `verify` would."""
    monkeypatch.setattr(ast, "parse", lambda *_, **__: pytest.fail("Python's parser"))
    np.testing.assert_array_equal(decode_npy(encode_npy(np.arange(6.0).reshape(2, 3))), np.arange(6.0).reshape(2, 3))


def test_equal_arrays_give_equal_bytes_whatever_their_memory_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert encode_npy(array) == encode_npy(np.asfortranarray(array))


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "evil.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptShardError):
        decode_npy(path.read_bytes())


@given(st.binary(max_size=200))
def test_any_other_bytes_are_a_corrupt_shard(data):
    with pytest.raises(CorruptShardError):
        decode_npy(data)


@given(st.sets(st.sampled_from(LATER)))
def test_a_ledger_of_any_earlier_release_gets_the_columns_of_this_one_in_their_order(lacking):
    assert complete(LEDGER_SCHEMA.empty_table().drop_columns(sorted(lacking))).schema == LEDGER_SCHEMA


def test_a_manifest_comes_back_equal_and_its_text_is_stable():
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert MANIFEST.to_json() == Manifest.from_json(MANIFEST.to_json()).to_json()
    assert MANIFEST.conserves_rows()


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode) | st.integers().map(lambda n: str(n).encode()))
def test_what_is_no_manifest_is_a_corrupt_shard(data):
    with pytest.raises(CorruptShardError):
        Manifest.from_json(data)


def test_a_manifest_of_another_schema_version_is_refused():
    text = json.dumps({**json.loads(MANIFEST.to_json()), "schema_version": 99})
    with pytest.raises(CorruptShardError, match="99"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "change",
    [{"kept": "1"}, {"kept": -1}, {"kept": True}, {"files": {"x": 1}}, {"files": {"x": {"bytes": 1}}}, {"models": {}}],
)
def test_a_field_of_another_type_is_a_corrupt_shard(change):
    with pytest.raises(CorruptShardError, match="another type"):
        Manifest.from_json(json.dumps({**json.loads(MANIFEST.to_json()), **change}))


def test_a_header_that_claims_another_shape_is_refused_before_memory_is_taken():
    data = encode_npy(np.zeros(8, np.float32))
    with pytest.raises(CorruptShardError):
        decode_npy(data.replace(b"(8,), }          ", b"(99999999999,), }"))
    with pytest.raises(CorruptShardError):
        decode_npy(data[:-1])
    with pytest.raises(CorruptShardError):
        decode_npy(data + b"x")


def test_each_file_of_a_sample_is_a_payload_column_and_suffixes_are_sorted():
    assert all(not COLUMNS[name].ledger for name in SUFFIXES.values())
    assert list(SUFFIXES) == sorted(SUFFIXES)


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert sha256_of_json({"a": 1, "b": {"c": 2, "d": 3}}) == sha256_of_json({"b": {"d": 3, "c": 2}, "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})


@pytest.mark.parametrize(
    "changes",
    [
        {"models": [{"name": "x", "task": "detector", "sha256": "ab"}]},
        {"models": [{"name": "x", "task": "detector", "sha256": "ab", "licence": ["MIT"]}]},
        {"profile": "\ud800"},
    ],
)
def test_what_a_manifest_must_hold_is_there_and_is_text(changes):
    text = json.dumps({**json.loads(MANIFEST.to_json()), **changes})
    with pytest.raises(CorruptShardError, match="not a manifest"):
        Manifest.from_json(text)
