"""Packs of a few kB with random weights, as ONNX files of insightface's packs are, and pictures for them."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stages.models.backends import Image


def tensor(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], arrays: dict[str, Any]) -> None:
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def detector(path: Path) -> None:
    """A random network with a pack's outputs, a batch of 1, and operators whose shapes are computed in the graph."""
    rng, nodes = np.random.default_rng(0), list[Any]()
    arrays: dict[str, Any] = {"two": np.array([2], np.int64), "none": np.zeros(0, np.float32), "from": np.array([2])}
    arrays |= {"to": np.array([4]), "axis": np.array([0])}
    for stride in (8, 16, 32):
        arrays[f"f{stride}"] = rng.normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32)
        shape = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
        nodes.append(helper.make_node("AveragePool", ["x"], [f"p{stride}"], **shape))
        nodes.append(helper.make_node("Conv", [f"p{stride}", f"f{stride}"], [f"c{stride}"], pads=[1] * 4))
    nodes += [  # a feature pyramid: the coarser level at the size of the finer one, as exports write it
        helper.make_node("Shape", ["c16"], ["shape16"]),
        helper.make_node("Slice", ["shape16", "from", "to", "axis"], ["sides"]),
        helper.make_node("Shape", ["c32"], ["shape32"]),
        helper.make_node("Slice", ["shape32", "axis", "two", "axis"], ["front"]),
        helper.make_node("Concat", ["front", "sides"], ["sizes"], axis=0),
        helper.make_node("Resize", ["c32", "none", "none", "sizes"], ["up"], mode="nearest",
                         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        helper.make_node("Add", ["c16", "up"], ["sum16"]),
    ]  # fmt: skip
    outputs = []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            name, given = f"{kind}{stride}", "sum16" if stride == 16 else f"c{stride}"
            arrays[f"w{name}"] = rng.normal(0, 0.5, (2 * width, 8, 1, 1)).astype(np.float32)
            arrays[f"b{name}"] = np.full(2 * width, 2.0 if kind == "bbox" else 0.0, np.float32)
            arrays[f"s{name}"] = np.array([-1, width], np.int64)
            nodes.append(helper.make_node("Conv", [given, f"w{name}", f"b{name}"], [f"h{name}"]))
            nodes.append(helper.make_node("Transpose", [f"h{name}"], [f"t{name}"], perm=[2, 3, 0, 1]))
            nodes.append(helper.make_node("Reshape", [f"t{name}", f"s{name}"], [f"r{name}"]))
            nodes.append(helper.make_node("Sigmoid" if kind == "score" else "Identity", [f"r{name}"], [name]))
            outputs.append(tensor(name, f"n{stride}", width))
    save(path, nodes, [tensor("x", 1, 3, "height", "width")], outputs, arrays)


def recogniser(path: Path, faces: int | str = 1, flat: int = 1) -> None:
    """A random network whose shapes were written down for one face; with flat = 0 it takes as many as it says."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "w": rng.normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32),
        "slope": np.full((8, 1, 1), 0.25, np.float32),
        "flat": np.array([flat, -1], np.int64),
        "fc": rng.normal(0, 0.1, (512, 8 * 14 * 14)).astype(np.float32),
        "bias": rng.normal(0, 0.1, 512).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[8, 8], pads=[1, 1, 0, 0]),
        helper.make_node("PRelu", ["c", "slope"], ["r"]),
        helper.make_node("Reshape", ["r", "flat"], ["f"]),
        helper.make_node("Gemm", ["f", "fc", "bias"], ["y"], transB=1),
    ]
    save(path, nodes, [tensor("x", faces, 3, 112, 112)], [tensor("y", faces, 512)], arrays)


def pictures(count: int, side: int) -> list[Image]:
    rng = np.random.default_rng(0)
    return [cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (side, side)) for _ in range(count)]
