"""Adapters on the tiny bases, and the real UNets without weights, for tests."""

import copy
import io
import pickle
from contextlib import contextmanager
from unittest.mock import patch
from weakref import WeakKeyDictionary

import pytest
import torch
from diffusers import UNet2DConditionModel
from train_made import UNETS

from pipeline.shared.bases import find_base
from pipeline.train.adapters.model import AdapterModel
from pipeline.train.adapters.variants import Widths, variant
from pipeline.train.settings import AdapterSettings

KINDS = ("sd15", "sdxl")
WITH_LORA = ("faceid", "faceid-plus", "faceid-plusv2")
TOKENS = {"ip-adapter": 4, "plus": 16, "plus-face": 16, "full-face": 257}
TOKENS |= {"faceid": 4, "faceid-portrait": 16, "faceid-plus": 4, "faceid-plusv2": 4}
PAIRS = [pytest.param((name, kind), id=f"{name}-{kind}") for kind in KINDS for name in TOKENS]
"""Every variant on both kinds of base."""
TEXT = 128
"""Text width of the tiny bases."""


def by_default(*names):
    """Of the pairs these always, all with -m long."""
    return [
        pytest.param(*pair.values, id=pair.id, marks=() if pair.id in names else pytest.mark.long) for pair in PAIRS
    ]


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def shapes_alone():
    """What is made within has no weights, on the meta device, and nobody draws their initial values.

    Diffusers' models are imported before: with them comes transformers, which remembers what torch.nn.init is then.
    """
    drawn = ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_")
    as_it_is = dict.fromkeys(drawn, lambda tensor, *_, **__: tensor)
    with torch.device("meta"), patch.multiple("torch.nn.init", **as_it_is):
        yield


def published_unet(kind):
    """The real UNet without weights: for shapes, keys and sizes."""
    with shapes_alone():
        return UNet2DConditionModel(**UNETS[kind])


def tiny_base(kind):
    return find_base({"sd15": "tiny", "sdxl": "tiny-sdxl"}[kind])


def tiny_unet(kind):
    return UNet2DConditionModel.from_pretrained(tiny_base(kind).folder / "unet").eval()


class _Packer(pickle.Pickler):
    """Writes a module without its tensors, which it gathers."""

    def __init__(self, stream):
        super().__init__(stream)
        self.tensors = {}

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = value
            return id(value)


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed, tensors):
        super().__init__(io.BytesIO(packed))
        self.persistent_load = lambda key: copy.deepcopy(tensors[key], shared)
        shared = {}


_packed = WeakKeyDictionary()


def copy_of(module):
    """What copy.deepcopy gives, in a fifth of its time: but for its tensors, a module stays as at its first copy."""
    if module not in _packed:
        packer = _Packer(stream := io.BytesIO())
        packer.dump(module)
        _packed[module] = stream.getvalue(), packer.tensors
    return _Unpacker(*_packed[module]).load()


def adapter(unet, name, kind, rank, **widths):
    """The named variant in a UNet; its text is as wide as the UNet's."""
    text = unet.config.cross_attention_dim
    return AdapterModel(unet, variant(name), Widths(kind, text, **widths), AdapterSettings(lora_rank=rank))


def set_scale(model, ip=1.0, lora=1.0):
    """Strength of the image tokens and of the LoRA; both zero are to give the untouched base."""
    for processor in model.ip_adapter:
        processor.scale, processor.lora_scale = ip, lora
