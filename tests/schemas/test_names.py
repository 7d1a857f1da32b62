import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import SourceError
from schemas.names import finished_shards, part_name, part_number, sample_key, shard_name, split_spec
from schemas.shard import SUFFIXES


def test_ranges_are_inclusive_and_lists_keep_their_order():
    assert split_spec("laion-part-0..2") == ["laion-part-0", "laion-part-1", "laion-part-2"]
    assert split_spec(" b.parquet , laion-part-9,sample ") == ["b.parquet", "laion-part-9", "sample"]


def test_a_comma_in_a_path(tmp_path):
    (tmp_path / "a, b").mkdir()
    assert split_spec(f"made:{tmp_path}/a, b") == [f"made:{tmp_path}/a, b"]
    assert split_spec(rf"memory://x\, y/*.tar,{tmp_path}/a\, b") == ["memory://x, y/*.tar", f"{tmp_path}/a, b"]


@pytest.mark.parametrize(
    "spec", ["", " , ", "laion-part-3..1", "laion-part-0..99999999999", "made:", "a.parquet,web: "]
)
def test_an_empty_or_backward_spec_is_the_users_mistake(spec):
    with pytest.raises(SourceError):
        split_spec(spec)


def test_a_part_number_is_only_read_from_a_whole_word():
    assert part_number("laion-part-17") == 17
    assert part_number("dir/laion-part-17") is None
    assert part_number("laion-part-1..2") is None


@given(st.text(max_size=40))
def test_part_names_never_hold_a_dot_or_a_slash_and_are_never_empty(text):
    name = part_name(f"s3://bucket/{text}")
    assert name
    assert not set(name) & set("./\\ ?%")


def test_no_name_is_too_long_for_a_tar_or_a_file_system():
    assert part_name(f"{'a' * 74}.parquet") == "a" * 74
    long = [part_name(f"/x/{'a' * count}.parquet") for count in (75, 76, 247)]
    assert len(set(long)) == 3
    longest = max(map(len, SUFFIXES))
    assert all(len(f"{sample_key(name, 10**9 - 1)}.") + longest <= 100 for name in long)


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1))
def test_keys_sort_as_rows_do(one, other):
    assert (sample_key("p", one) < sample_key("p", other)) == (one < other)


def test_shard_names():
    assert shard_name("laion-part-7", 12) == "laion-part-7-00012"
    assert finished_shards(["b-00001.json", "a-r2_00000.json", "a-123456.json", "index.json", ".x-00000.json"]) == [
        "a-123456",
        "a-r2_00000",
        "b-00001",
    ]
    assert part_name("hf://datasets/x/part-00000-5b.snappy.parquet") == "part-00000-5b"
