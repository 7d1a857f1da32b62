"""A frozen UNet in the form that training gives it computes what diffusers' own does, and keeps less."""

import pytest
import torch
from diffusers.models.activations import GEGLU
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_adapters import tiny_unet
from torch import nn

from pipeline.train.adapters.frozen import keep_less, suit_compiler

REWRITES = {"keep_less": keep_less, "suit_compiler": suit_compiler}


def run(module, *inputs):
    """Output and the gradient of the first input, and the bytes kept for it."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    first = inputs[0].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(first, *inputs[1:])
    output = getattr(output, "sample", output)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (gradient,) = torch.autograd.grad((output * weights).sum(), first)
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    return output, gradient, sum(storage.nbytes() for at, storage in kept.items() if at not in own)


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("sides", [pytest.param((16, 16), marks=pytest.mark.long), (13, 10)])
def test_a_rewritten_unet_computes_the_same_and_keeps_less(rewrite, sides):
    torch.manual_seed(0)
    unet = tiny_unet("sd15").double().requires_grad_(False)
    noisy, text = torch.randn(2, 4, *sides).double(), torch.randn(2, 77, unet.config.cross_attention_dim).double()
    inputs = noisy, torch.tensor([3, 700]), text
    output, gradient, kept = run(unet, *inputs)
    REWRITES[rewrite](unet)
    new_output, new_gradient, new_kept = run(unet, *inputs)
    torch.testing.assert_close(new_output, output)
    torch.testing.assert_close(new_gradient, gradient)
    if rewrite == "keep_less":
        assert new_kept < 0.85 * kept


@settings(max_examples=20)
@given(
    sides=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    kernel=st.sampled_from([(1, 0), (3, 1), (3, 0)]),
    stride=st.integers(1, 3),
    has_bias=st.booleans(),
)
def test_gradients_of_a_frozen_convolution_are_its_own(sides, kernel, stride, has_bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, kernel[0], stride, kernel[1], bias=has_bias)).double().requires_grad_(False)
    x = torch.randn(2, 3, *sides, dtype=torch.float64)
    expected = run(model, x)
    keep_less(model)
    output, gradient, kept = run(model, x)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert kept == 0


def test_gradients_of_geglu_are_its_own():
    layer = nn.Sequential(GEGLU(6, 4)).double().requires_grad_(False)
    keep_less(layer)
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True))
