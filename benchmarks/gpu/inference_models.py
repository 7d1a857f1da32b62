"""Models of the published sizes with random weights: speed does not depend on weights, and nothing is downloaded."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)


class Graph:
    """An ONNX graph in the making, with He-initialised weights."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.arrays: dict[str, Any] = {}
        self._rng = np.random.default_rng(0)

    def add(self, operator: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def array(self, values: Any) -> str:
        name = f"w{len(self.arrays)}"
        self.arrays[name] = np.asarray(values)
        return name

    def random(self, *shape: int, scale: float = 1.0) -> str:
        deviation = scale * np.sqrt(2 / np.prod(shape[1:]))
        return self.array(self._rng.standard_normal(shape, np.float32) * np.float32(deviation))

    def conv(self, x: str, c_in: int, c_out: int, k: int, s: int = 1, *, scale: float = 1.0, bias: float = 0.0) -> str:
        weights = self.random(c_out, c_in, k, k, scale=scale)
        values = self.array(np.full(c_out, bias, np.float32))
        return self.add("Conv", x, weights, values, kernel_shape=[k, k], strides=[s, s], pads=[k // 2] * 4)

    def conv_relu(self, x: str, c_in: int, c_out: int, k: int = 3, s: int = 1) -> str:
        return self.add("Relu", self.conv(x, c_in, c_out, k, s))

    def batch_norm(self, x: str, channels: int) -> str:
        one, zero = (self.array(np.full(channels, value, np.float32)) for value in (1, 0))
        return self.add("BatchNormalization", x, one, zero, zero, one)

    def save(self, path: Path, shape: list[Any], outputs: list[tuple[str, list[Any]]]) -> Path:
        given = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in outputs]
        constants = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        graph = helper.make_graph(self.nodes, "random", [given], ends, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)])
        model.ir_version = 6
        onnx.save(model, str(path))
        return path


def scrfd(path: Path, *, tiny: bool = False) -> Path:
    """SCRFD-10G: ResNet of basic blocks, PAFPN, three head convolutions per level; exported as insightface does."""
    planes, blocks, neck, head = (
        ((8, 8, 8, 16), (1, 1, 1, 1), 8, 8) if tiny else ((56, 88, 88, 224), (3, 4, 2, 3), 56, 80)
    )
    graph, levels = Graph(), []
    x = graph.conv_relu("input.1", 3, planes[0] // 2, 3, 2)
    x = graph.conv_relu(x, planes[0] // 2, planes[0] // 2)
    x = graph.conv_relu(x, planes[0] // 2, planes[0])
    x = graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    c_in = planes[0]
    for stage, (width, count) in enumerate(zip(planes, blocks, strict=True)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            short = x
            if stride == 2:
                short = graph.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
            if c_in != width:
                short = graph.conv(short, c_in, width, 1)
            deep = graph.conv(graph.conv_relu(x, c_in, width, 3, stride), width, width, 3, scale=0.3)
            x, c_in = graph.add("Relu", graph.add("Add", deep, short)), width
        levels.append((x, width))
    lateral = [graph.conv(level, width, neck, 1) for level, width in levels[1:]]
    for above in (1, 0):
        scales = graph.array(np.array([1, 1, 2, 2], np.float32))
        larger = graph.add("Resize", lateral[above + 1], graph.array(np.zeros(0, np.float32)), scales, mode="nearest",
                           coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
        lateral[above] = graph.add("Add", lateral[above], larger)
    pyramid = [graph.conv(level, neck, neck, 3) for level in lateral]
    for below in (1, 2):
        pyramid[below] = graph.add("Add", pyramid[below], graph.conv(pyramid[below - 1], neck, neck, 3, 2))
    outputs: dict[str, str] = {}
    for stride, level in zip(STRIDES, pyramid, strict=True):
        x, c_in = level, neck
        for _ in range(1 if tiny else 3):
            x, c_in = graph.conv_relu(x, c_in, head), head
        for kind, values in (("score", 1), ("bbox", 4), ("kps", 10)):
            end = graph.conv(x, head, 2 * values, 3, scale=0.1, bias={"score": -4.0, "bbox": 2.0, "kps": 0.0}[kind])
            rows = graph.add("Transpose", end, perm=[2, 3, 0, 1])
            rows = graph.add("Reshape", rows, graph.array(np.array([-1, values], np.int64)), out=f"{kind}{stride}")
            outputs[f"{kind}{stride}"] = graph.add("Sigmoid", rows) if kind == "score" else rows
    ends = [(outputs[f"{kind}{s}"], [None, n]) for kind, n in (("score", 1), ("bbox", 4), ("kps", 10)) for s in STRIDES]
    return graph.save(path, [1, 3, None, None], ends)


def arcface(path: Path, *, tiny: bool = False) -> Path:
    """IResNet50 (w600k_r50's architecture), 43.6 million parameters; with `tiny` one block per stage, and narrow."""
    widths, blocks = ((8, 8, 16, 16), (1, 1, 1, 1)) if tiny else ((64, 128, 256, 512), (3, 4, 14, 3))
    graph = Graph()

    def prelu(x: str, channels: int) -> str:
        return graph.add("PRelu", x, graph.array(np.full((channels, 1, 1), 0.25, np.float32)))

    x, c_in = prelu(graph.conv("input.1", 3, widths[0], 3), widths[0]), widths[0]
    for width, count in zip(widths, blocks, strict=True):
        for block in range(count):
            stride = 1 if block else 2
            short = x if block else graph.conv(x, c_in, width, 1, stride)
            deep = prelu(graph.conv(graph.batch_norm(x, c_in), c_in, width, 3), width)
            x, c_in = graph.add("Add", graph.conv(deep, width, width, 3, stride, scale=0.3), short), width
    x = graph.add("Flatten", graph.batch_norm(x, c_in))
    x = graph.add("Gemm", x, graph.random(512, c_in * 49, scale=0.7), graph.array(np.zeros(512, np.float32)), transB=1)
    return graph.save(path, [None, 3, 112, 112], [(graph.batch_norm(x, 512), [None, 512])])


def bisenet() -> Any:
    """facexlib's parser, float32 on the CPU."""
    import torch
    from facexlib.parsing.bisenet import BiSeNet

    torch.manual_seed(0)
    return BiSeNet(num_class=19).eval().requires_grad_(False)


def vit_h(device: str, *, tiny: bool = False) -> Any:
    """The image tower of CLIP ViT-H/14, float32, its 632 million random parameters made on the device."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPVisionConfig(**sizes, image_size=224, patch_size=14, projection_dim=1024, hidden_act="gelu")
    torch.manual_seed(0)
    with torch.device(device):
        return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
