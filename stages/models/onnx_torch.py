"""ONNX files of insightface packs as torch modules that take batches, whatever batch they were exported for.

A reader of the operators that packs use, and no converter: onnx2torch 1.5 keeps shapes in tensors on the device, which
CUDA graphs cannot capture, and like onnx2pytorch it knows no dynamic quantisation. Here shapes are lists, and
images come first in all that the module gives: an export that ends in Transpose(2, 3, 0, 1) and Reshape(-1, k) would
give the rows of a batch in the order height, width, image, anchor.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from schemas.errors import WeightsError

_DEVICE_INPUTS = {"Resize": 1, "Upsample": 1, "Clip": 1, "Reshape": 1, "Slice": 1, "Unsqueeze": 1, "Squeeze": 1}
"""How many inputs of an operator are data; those after them are sizes, axes and limits, and stay on the host."""
_QUANTUM = 128.0
"""Scale of quantised values: sums of their products then stay in the range of float16."""


class _Step(NamedTuple):
    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class OnnxModule(torch.nn.Module):
    """An ONNX graph with one input; `forward` gives its outputs in the graph's order, images first."""

    def __init__(self, path: Path) -> None:
        """Raises a WeightsError when the file is no ONNX model, or uses what is not known here."""
        super().__init__()
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except DecodeError as error:
            raise WeightsError(f"{path} cannot be loaded as an ONNX model ({error}): fetch it again.") from error
        unknown = sorted({node.op_type for node in graph.node} - _OPERATORS.keys())
        if unknown:
            raise WeightsError(
                f"{path} uses {', '.join(unknown)}, which models.runtime = torch does not know: use onnxruntime for it."
            )
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        fed = [value for value in graph.input if value.name not in arrays]
        self.input_shape = [dim.dim_value or None for dim in fed[0].type.tensor_type.shape.dim]
        """(N, C, H, W); None where the file leaves it open."""
        self.is_quantised = any(node.op_type == "DynamicQuantizeLinear" for node in graph.node)
        self.first_nodes = [node.name for node in graph.node[:8]]
        self._input, self._outputs = fed[0].name, [value.name for value in graph.output]
        self.output_names = self._outputs
        self._host: dict[str, Any] = {"": None}
        self._steps: list[_Step] = []
        of_images, transposed, on_host = {self._input}, set[str](), set[str]()
        for node in graph.node:
            attributes = {given.name: onnx.helper.get_attribute_value(given) for given in node.attribute}
            if node.op_type == "Constant":
                arrays[node.output[0]] = numpy_helper.to_array(attributes["value"])
                continue
            compute = _OPERATORS[node.op_type]
            if transposed.intersection(node.input):
                if node.op_type != "Reshape":
                    raise WeightsError(f"{path} moves its images behind other axes: use onnxruntime for it.")
                compute = _reshape_each
            elif node.op_type == "Transpose" and attributes["perm"][0] != 0 and node.input[0] in of_images:
                attributes["perm"] = [0, *(axis for axis in attributes["perm"] if axis != 0)]
                transposed.update(node.output)
            elif node.op_type == "Reshape" and node.input[0] in of_images:
                compute = _reshape_batch
            if node.op_type != "Shape" and of_images.intersection(node.input):
                of_images.update(node.output)
            self._steps.append(_Step(compute, tuple(node.input), tuple(node.output), attributes))
            on_host.update(node.input[_DEVICE_INPUTS.get(node.op_type, 99) :])
            if node.op_type in ("ConvInteger", "MatMulInteger"):
                weights = arrays[node.input[1]]
                if weights.dtype.kind in "iu":  # as multiples of 1 / 128 of their scale, instead of the integers
                    zero = arrays[node.input[3]].astype(np.float32) if len(node.input) > 3 else np.float32(0)
                    arrays[node.input[1]] = (weights.astype(np.float32) - zero) / np.float32(_QUANTUM)
        self._keys: dict[str, str] = {}
        for name, array in arrays.items():
            if name in on_host or array.dtype.kind in "iub":
                self._host[name] = array.ravel().tolist() if array.ndim else array.item()
            else:
                self._keys[name] = f"constant{len(self._keys)}"
                self.register_buffer(self._keys[name], torch.from_numpy(array.copy()))
        self._round_no_output()

    def _round_no_output(self) -> None:
        """Let the convolutions that outputs come from give float32, whatever the module's type.

        In float16 a distance of some pixels would be rounded to a hundredth of its stride: half of what boxes of
        SCRFD-2.5G would be off by.
        """
        made_by = {name: index for index, step in enumerate(self._steps) for name in step.outputs}
        names = list(self._outputs)
        while names:
            index = made_by.get(names.pop(), -1)
            if index >= 0 and self._steps[index].compute is _conv:
                self._steps[index] = self._steps[index]._replace(compute=_conv_in_float32)
            elif index >= 0 and self._steps[index].compute in _ELEMENTWISE:
                names += self._steps[index].inputs

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {**self._host, self._input: pixels}
        values.update((name, getattr(self, key)) for name, key in self._keys.items())
        for compute, inputs, outputs, attributes in self._steps:
            results = compute(*(values[name] for name in inputs), **attributes)
            values.update(zip(outputs, results if isinstance(results, tuple) else (results,), strict=False))
        return tuple(values[name] for name in self._outputs)


def one_by_one(path: Path) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """The same file on ONNX Runtime's CPU, for what `OnnxModule` gives to be compared with: takes one image."""
    from stages.models.onnx import cpu_session

    session = cpu_session(path)
    name = session.get_inputs()[0].name

    def outputs(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arrays = session.run(None, {name: pixels.float().numpy()})
        return tuple(torch.from_numpy(array.reshape(1, *array.shape[-2:])) for array in arrays)

    return outputs


def _conv(x: Any, weight: Any, bias: Any = None, *, strides: Any = (1, 1), group: int = 1, **others: Any) -> Any:
    dilations = tuple(others.get("dilations", (1, 1)))
    x, padding = _padded(x, 0.0, **others)
    return F.conv2d(x, weight, bias, tuple(strides), padding, dilations, group)


def _conv_in_float32(x: Any, *weights: Any, **attributes: Any) -> Any:
    return _conv(x.float(), *(weight.float() for weight in weights), **attributes)


def _padded(
    x: Any, value: float | None, *, pads: Sequence[int] = (0, 0, 0, 0), auto_pad: bytes = b"NOTSET", **_: Any
) -> tuple[Any, tuple[int, int]]:
    """`x` with what cannot be left to torch's own symmetrical padding, and that padding; no `value` is for averages."""
    if auto_pad not in (b"NOTSET", b"VALID"):
        raise NotImplementedError(f"auto_pad {auto_pad!r}")
    top, left, bottom, right = pads
    if (top, left) == (bottom, right):
        return x, (top, left)
    if value is None:
        raise NotImplementedError("an average over uneven borders")
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


def _max_pool(x: Any, *, kernel_shape: Any, strides: Any = (1, 1), ceil_mode: int = 0, **borders: Any) -> Any:
    x, padding = _padded(x, float("-inf"), **borders)
    return F.max_pool2d(x, tuple(kernel_shape), tuple(strides), padding, ceil_mode=bool(ceil_mode))


def _average_pool(x: Any, *, kernel_shape: Any, strides: Any = (1, 1), ceil_mode: int = 0, **borders: Any) -> Any:
    x, padding = _padded(x, None, **borders)
    counts_borders = bool(borders.get("count_include_pad"))
    return F.avg_pool2d(x, tuple(kernel_shape), tuple(strides), padding, bool(ceil_mode), counts_borders)


def _gemm(a: Any, b: Any, c: Any = 0, *, alpha: float = 1, beta: float = 1, **transposed: int) -> Any:
    left, right = (x.T if transposed.get(name) else x for x, name in ((a, "transA"), (b, "transB")))
    return alpha * (left @ right) + beta * c


def _resize(
    x: Any, *sizes: Any, mode: bytes = b"nearest", coordinate_transformation_mode: bytes = b"", **_: Any
) -> Any:
    """Resize(x, roi, scales, sizes) and Upsample(x, scales)."""
    if len(sizes) == 3 and sizes[2]:
        height, width = (int(side) for side in sizes[2][2:])
    else:
        scales = sizes[-1] if len(sizes) < 3 else sizes[1]
        height, width = (int(side * scale) for side, scale in zip(x.shape[2:], scales[2:], strict=True))
    if mode == b"nearest":
        return F.interpolate(x, (height, width), mode="nearest")
    aligned = coordinate_transformation_mode == b"align_corners"
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=aligned)


def _slice(values: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    """Of shapes, and of tensors by positive steps."""
    parts = [
        slice(start, end, step) for start, end, step in zip(starts, ends, steps or (1,) * len(starts), strict=True)
    ]
    if isinstance(values, list):
        return values[parts[0]]
    picked = [slice(None)] * values.ndim
    for axis, part in zip(axes or range(len(parts)), parts, strict=True):
        picked[axis] = part
    return values[tuple(picked)]


def _unsqueeze(x: Any, given: Any = None, *, axes: Sequence[int] = ()) -> Any:
    if not isinstance(x, torch.Tensor):
        return [x]
    for axis in sorted(axes if given is None else given):
        x = x.unsqueeze(axis)
    return x


def _reshape(x: Any, shape: Any, **_: Any) -> Any:
    return x.reshape([x.shape[axis] if side == 0 else int(side) for axis, side in enumerate(shape)])


def _reshape_batch(x: Any, shape: Any, **_: Any) -> Any:
    """Of a batch: a first side of one image is that of all of them."""
    return _reshape(x, [0 if shape[0] == 1 else shape[0], *shape[1:]])


def _reshape_each(x: Any, shape: Any, **_: Any) -> Any:
    """Of a batch whose images were to lie behind other axes: each image gets the shape that one alone would have."""
    return x.reshape([x.shape[0], *map(int, shape)])


def _quantise(x: torch.Tensor) -> tuple[torch.Tensor, float, None]:
    """`x` rounded to the 256 levels of its range, as DynamicQuantizeLinear does it for one image; scale; no zero point.

    Each image of a batch has a range of its own, so that it gets the numbers that it has alone.
    """
    axes = tuple(range(1, x.ndim))
    low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    scale = ((high - low).float() / 255).clamp(min=1e-12)
    zero = torch.round(-low.float() / scale).clamp(0, 255)
    levels = torch.round(x.float() / scale).add_(zero).clamp_(0, 255)
    return ((levels - zero) * scale).to(x.dtype), _QUANTUM, None


_OPERATORS: dict[str, Callable[..., Any]] = {  # a list is a shape, of which some sides are taken or put together
    "Add": lambda a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": lambda x, w, b, mean, var, epsilon=1e-5, **_: F.batch_norm(x, mean, var, w, b, eps=epsilon),
    "Cast": lambda x, **_: x,
    "Clip": lambda x, low=None, high=None, min=None, max=None: x.clamp(
        min if low is None else low, max if high is None else high
    ),
    "Concat": lambda *values, axis: [*chain(*values)] if isinstance(values[0], list) else torch.cat(values, axis),
    "Constant": lambda **_: None,
    "Conv": _conv,
    "ConvInteger": lambda x, weight, *_, **attributes: _conv(x, weight, **attributes),
    "Div": lambda a, b: a / b,
    "Dropout": lambda x, *_, **__: x,
    "DynamicQuantizeLinear": _quantise,
    "Flatten": lambda x, axis=1: x.flatten(axis),
    "Gather": lambda shape, at, axis=0: [shape[side] for side in at] if isinstance(at, list) else shape[at],
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "Identity": lambda x: x,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "MatMul": lambda a, b: a @ b,
    "MatMulInteger": lambda x, weight, *_: x @ weight,
    "MaxPool": _max_pool,
    "Mul": lambda a, b: a * b,
    "PRelu": lambda x, slope: F.prelu(x, slope.flatten()),
    "Relu": F.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda x: list(x.shape),
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Squeeze": lambda x, at=None, axes=(): x[0] if isinstance(x, list) else x.squeeze(tuple(at or axes)),
    "Sub": lambda a, b: a - b,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}

_ELEMENTWISE = {_reshape, _reshape_batch, _reshape_each}
_ELEMENTWISE |= {_OPERATORS[name] for name in ("Identity", "Mul", "Relu", "Sigmoid", "Transpose")}
"""What may stand between a convolution and an output that it decides."""
