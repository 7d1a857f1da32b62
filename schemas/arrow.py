"""Arrow imports pandas, where it is installed, with its first array: half a second and 56 MB of every process."""

import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import pyarrow as pa


class _Hidden:
    """Stands before the finders of modules, and lets them find no pandas.

    A None among sys.modules would do for Python, but Arrow's compiled import takes it for the module.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


class _Awaited:
    """Lets Arrow know of pandas when somebody imports it: until then its Series are plain sequences to Arrow."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "pandas" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            with suppress(ValueError, ImportError):  # another thread was first; a pandas that Arrow does not take
                sys.meta_path.remove(self)
                pa.array([]).to_pandas()  # for which it looks again

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def spare_pandas() -> None:
    """Have Arrow do without pandas until somebody imports it, or wants a DataFrame of Arrow.

    Arrow looks for it once, and again before it makes an object of pandas.
    """
    if "pandas" in sys.modules:
        return
    sys.meta_path.insert(0, hidden := _Hidden())
    try:
        pa.array([None])
    finally:
        sys.meta_path.remove(hidden)
    sys.meta_path.insert(0, _Awaited())
