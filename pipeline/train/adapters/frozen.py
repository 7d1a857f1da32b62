"""What diffusers' UNet computes, written anew for one whose weights are frozen; the values are the same."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import conv_transpose2d, gelu, group_norm, linear


def keep_less(unet: Any) -> None:
    """Let convolutions and GEGLU keep no more for backward than frozen weights need.

    A convolution's input is needed for the gradient of its weights alone, and the gate of GEGLU costs little to compute
    again. Of what a sample of SD1.5 keeps at 512 px 27 % go, of SDXL at 1024 px 20 %.
    """

    def convolution(module: nn.Conv2d, x: Tensor) -> Tensor:
        return _applied(_Convolution, x, module)

    def geglu(module: GEGLU, x: Tensor) -> Tensor:
        return _applied(_Gated, module.proj(x))

    _replace(unet, {nn.Conv2d: convolution, GEGLU: geglu})


def suit_compiler(unet: Any) -> None:
    """Let torch compile the UNet well, which takes care of what is kept.

    As torch traces them, group norms and every `contiguous` leave channels_last, and each convolution behind them
    copies its input or gradient, some twice. GEGLU's gradient is written as one tensor of two halves, which takes three
    times as long as its bytes need. Of a step of SD1.5 the norms cost 8 %, the other copies 5 %, GEGLU 4 %.
    """

    def norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
        x = _applied(_ChannelsLast, x)
        return _applied(_ChannelsLast, group_norm(x, module.num_groups, module.weight, module.bias, module.eps))

    def convolution(module: nn.Conv2d, x: Tensor) -> Tensor:
        x = _applied(_ChannelsLast, x)
        return _applied(_ChannelsLast, module._conv_forward(x, module.weight, module.bias))

    def geglu(module: GEGLU, x: Tensor) -> Tensor:
        halves = zip(module.proj.weight.chunk(2), module.proj.bias.chunk(2), strict=True)
        hidden, gate = (linear(x, weight, bias) for weight, bias in halves)
        return hidden * gelu(gate)

    unet.to(memory_format=torch.channels_last)
    _replace(unet, {nn.GroupNorm: norm, nn.Conv2d: convolution, GEGLU: geglu})


class _ChannelsLast(Function):
    """The same values in channels_last, forward and backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


class _Convolution(Function):
    """A frozen convolution without dilation and groups, which keeps nothing."""

    @staticmethod
    def forward(context: Any, x: Tensor, module: nn.Conv2d) -> Tensor:
        context.module, context.sides = module, x.shape[2:]
        result: Tensor = module._conv_forward(x, module.weight, module.bias)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        module: nn.Conv2d = context.module
        assert not isinstance(module.padding, str)
        shapes = zip(context.sides, gradient.shape[2:], module.stride, module.padding, module.kernel_size, strict=True)
        rest = [side - (steps - 1) * stride + 2 * pad - kernel for side, steps, stride, pad, kernel in shapes]
        # What a convolution does to gradients is a transposed one, by the same kernels.
        return conv_transpose2d(gradient, module.weight, None, module.stride, module.padding, rest), None


class _Gated(Function):
    """Half of the channels times GELU of the others, which is computed again backwards."""

    @staticmethod
    def forward(context: Any, projected: Tensor) -> Tensor:
        context.save_for_backward(projected)
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * gelu(gate)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (projected,) = context.saved_tensors
        hidden, gate = projected.chunk(2, dim=-1)
        both = torch.empty_like(projected)
        of_hidden, of_gate = both.chunk(2, dim=-1)
        torch.mul(gradient, gelu(gate), out=of_hidden)
        torch.ops.aten.gelu_backward(gradient * hidden, gate, grad_input=of_gate)
        return both


def _applied(function: type[Function], *values: Any) -> Tensor:
    result: Tensor = function.apply(*values)  # type: ignore[no-untyped-call]
    return result


def _replace(unet: Any, forwards: Mapping[type[nn.Module], Callable[..., Tensor]]) -> None:
    for module in unet.modules():
        if type(module) in forwards:
            module.forward = partial(forwards[type(module)], module)
