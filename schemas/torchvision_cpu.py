"""Lets a torchvision that was built for CUDA be imported beside a torch that was built for the CPU.

Its C++ extension links libtorch_cuda and cannot be loaded then, and importing torchvision (and with it facexlib,
transformers' vision models, diffusers) dies with "operator torchvision::nms does not exist". The import only needs
the schemas of two operators, so they are declared; calling these two still raises, and nothing here calls them.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_OPERATORS = ("nms", "qnms")
_declared: list[Any] = []


def install() -> None:
    """Arrange that a later `import torchvision` works in this process; cheap, and does not import torch itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision as usual, with a loader that prepares torch first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Prepared(spec.loader, spec.submodule_search_locations or [])
        return spec


class _Prepared(Loader):
    """Torchvision's own loader, after the operators are known to torch."""

    def __init__(self, loader: Loader, folders: Sequence[str]) -> None:
        self._loader = loader
        self._folders = folders

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if not _declared and not _loads_natively(self._folders):
            _declare()
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # resources, get_data and the like of the real loader


def _loads_natively(folders: Sequence[str]) -> bool:
    """Whether torchvision's extension fits this torch, as a matching pair of builds does."""
    import torch

    for extension in (path for folder in folders for path in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
        except (OSError, ImportError):
            return False
    return True


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _declared.append(library)  # torch forgets the schemas when the library is collected
