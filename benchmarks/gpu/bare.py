"""A bare machine with torch and a GPU, pretended: what it lacks, so that a smoke test misses it here too."""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

WHEELS = Path(__file__).with_name("wheels.txt")
# fmt: off
HAS = {
    "accelerate", "aiohttp", "filelock", "fsspec", "huggingface-hub", "hypothesis", "jinja2", "matplotlib", "numpy",
    "onnx", "onnxruntime", "opencv-python", "opencv-python-headless", "packaging", "peft", "pillow",
    "prometheus-client", "protobuf", "psutil", "pyarrow", "pytest", "pytest-xdist", "pyyaml", "rich", "safetensors",
    "scikit-image", "scipy", "tensorboard", "threadpoolctl", "tokenizers", "torch", "torchvision", "transformers",
    "typer", "yarl",
}
# fmt: on
"""Of what faceshards requires."""
NOT_IN_OPENCV_5 = ("CascadeClassifier", "HOGDescriptor")


class _Lacks:
    """Finds no package that faceshards requires, unless the machine has it or wheels.txt brings it."""

    def __init__(self) -> None:
        lines = WHEELS.read_text().splitlines()
        there = HAS | {_normed(line) for line in lines if not line.startswith("#")}
        required = {_normed(re.split("[^A-Za-z0-9._-]", line)[0]) for line in metadata.requires("faceshards") or ()}
        self._missing = required - there
        self._owners = metadata.packages_distributions()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        owners = {_normed(owner) for owner in self._owners.get(name, ())}
        if owners and owners <= self._missing:
            raise ModuleNotFoundError(f"No module named {name!r}, and a bare machine has none", name=name)


def _normed(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def pretend() -> None:
    """From now on in this process."""
    import cv2

    for name in NOT_IN_OPENCV_5:
        vars(cv2).pop(name, None)
    sys.meta_path.insert(0, _Lacks())
