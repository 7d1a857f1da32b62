"""Token features as int8: how far from float16 they are, whatever they hold, and that other bytes are refused."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from schemas.errors import CorruptShardError
from schemas.int8 import GROUP, decode_int8, dequantise, encode_int8, quantise
from schemas.shard import encode_npy

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3 * GROUP + 5))
ANY = hnp.arrays(np.float16, SHAPES, elements=st.floats(-65504, 65504, width=16))
USUAL = hnp.arrays(np.float16, SHAPES, elements=st.floats(-8, 8, width=16))
WHOLE = encode_int8(quantise(np.linspace(-2, 2, 3 * 70).reshape(3, 70).astype(np.float16)))


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Per token, and last over all."""
    pairs = [*zip(one, other, strict=True), (one.ravel(), other.ravel())]
    return np.array([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])


def towerlike() -> np.ndarray:
    """(257, 1280): three channels up to 100 times, and three tokens 12 times as large as the others."""
    features = np.random.default_rng(0).normal(size=(257, 1280))
    features[:, [17, 400, 901]] *= [60, 25, 100]
    features[[0, 33, 200]] *= 12
    return features.astype(np.float16)


def worst() -> np.ndarray:
    """A peak of as many steps as there are, and all others of its group between two steps."""
    token = np.full((1, GROUP), 0.5, np.float16)
    token[0, 5] = 127
    return token


@given(ANY | USUAL)
@example(worst())
@example(np.zeros((2, 70), np.float16))
@example(np.full((1, 65), 2.0**-24, np.float16))
@example(np.full((1, 65), 190 * 2.0**-24, np.float16))
@example(np.full((1, 65), 65504, np.float16))
def test_no_value_is_off_by_more_than_half_a_step_and_no_token_by_more_than_was_promised(features):
    stored = quantise(features)
    tokens, width = features.shape
    assert (stored.int8.dtype, stored.scale.dtype) == (np.int8, np.float16)
    assert stored.shape == features.shape
    assert stored.scale.shape == (tokens, -(-width // GROUP))
    assert np.abs(stored.int8.astype(int)).max() <= 127
    values, exact = dequantise(stored), features.astype(np.float64)
    assert values.dtype == np.float32
    steps = np.repeat(stored.scale.astype(np.float64), GROUP, axis=1)[:, :width]
    assert (np.abs(values - exact) <= steps * (0.5 + 1e-4)).all()
    assert (values[exact == 0] == 0).all()
    large = np.abs(exact).max(axis=1) > 0.01  # the scale of smaller ones has few bits, or none
    if large.any():
        assert cosines(exact[large], values[large]).min() >= 0.9995


@given(st.lists(hnp.arrays(np.float16, (1, 130), elements=st.floats(-100, 100, width=16)), min_size=1, max_size=3))
def test_a_token_does_not_depend_on_its_neighbours(tokens):
    together = quantise(np.concatenate(tokens))
    for index, token in enumerate(tokens):
        alone = quantise(token)
        assert (together.int8[index] == alone.int8[0]).all()
        assert (together.scale[index] == alone.scale[0]).all()


def test_features_like_those_of_a_tower_stay_and_take_half_the_bytes():
    features = towerlike()
    found = cosines(features.astype(np.float64), dequantise(quantise(features)))
    assert found.min() >= 0.9997
    assert len(encode_int8(quantise(features))) <= 0.52 * len(encode_npy(features))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_nan_and_spoils_its_group_alone(bad):
    features = towerlike()
    sound = quantise(features)
    features[3, 70] = bad
    stored = quantise(features)
    assert np.isnan(dequantise(stored)[3, GROUP : 2 * GROUP]).all()
    spoilt = np.zeros((257, 20), bool)
    spoilt[3, 1] = True
    assert (stored.scale[~spoilt] == sound.scale[~spoilt]).all()
    assert (stored.int8[~np.repeat(spoilt, GROUP, axis=1)] == sound.int8[~np.repeat(spoilt, GROUP, axis=1)]).all()


@given(USUAL)
def test_bytes_come_back_equal_and_equal_features_give_equal_bytes(features):
    data = encode_int8(quantise(features))
    back = decode_int8(data)
    # safetensors writes arrays as they lie in memory, whatever their order.
    assert (dequantise(back) == dequantise(quantise(features))).all()
    assert encode_int8(back) == data == encode_int8(quantise(np.asfortranarray(features)))


@given(st.binary(max_size=200))
def test_any_other_bytes_are_a_corrupt_shard(data):
    with pytest.raises(CorruptShardError):
        decode_int8(data)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_a_corrupt_shard_or_features_of_the_declared_types(at, bit):
    data = bytearray(WHOLE)
    data[at] ^= 1 << bit
    try:
        found = decode_int8(bytes(data))
    except CorruptShardError:
        return
    assert (found.int8.dtype, found.scale.dtype) == (np.int8, np.float16)
    assert found.scale.shape == (found.shape[0], -(-found.shape[1] // GROUP))


INT8, SCALE = np.zeros((3, 70), np.int8), np.zeros((3, 2), np.float16)
OTHERS = {
    "nothing": {},
    "no scale": {"int8": INT8},
    "no int8": {"scale": SCALE},
    "more": {"int8": INT8, "scale": SCALE, "zero": SCALE},
    "unsigned": {"int8": INT8.view(np.uint8), "scale": SCALE},
    "another scale": {"int8": INT8, "scale": SCALE.astype(np.float32)},
    "too few scales": {"int8": INT8, "scale": SCALE[:, :1]},
    "scales of fewer tokens": {"int8": INT8, "scale": SCALE[:2]},
    "one token": {"int8": INT8[0], "scale": SCALE[0]},
    "a batch": {"int8": INT8[None], "scale": SCALE[None]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_are_a_corrupt_shard(name):
    with pytest.raises(CorruptShardError):
        decode_int8(save(OTHERS[name]))


def header(*replacements: tuple[bytes, bytes]) -> bytes:
    data = WHOLE
    for old, new in replacements:
        assert old in data
        assert len(old) == len(new)
        data = data.replace(old, new)
    return data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[:-1],
        WHOLE + b"\0",
        WHOLE[:40],
        b"\xff" * 8 + WHOLE[8:],
        header((b'"I8"', b'"U8"')),
        header((b'"F16"', b'"F99"')),
        header((b"[3,70]", b"[70,3]")),
        header((b"[3,70]", b"[9,70]")),
        header((b'"int8"', b'"int9"')),
    ],
)
def test_damaged_headers_are_a_corrupt_shard(data):
    with pytest.raises(CorruptShardError):
        decode_int8(data)


def test_the_name_of_a_type_that_numpy_lacks_is_a_corrupt_shard():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save as save_torch

    parts = {"int8": torch.zeros(3, 70, dtype=torch.int8), "scale": torch.zeros(3, 2, dtype=torch.bfloat16)}
    with pytest.raises(CorruptShardError):
        decode_int8(save_torch(parts))
    parts["scale"] = torch.zeros(3, 2, dtype=torch.float8_e4m3fn)
    with pytest.raises(CorruptShardError):
        decode_int8(save_torch(parts))
