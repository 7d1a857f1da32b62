"""Lets a torchvision that was built for CUDA be imported beside a torch that was built for the CPU.

    python docker/torchvision_beside_cpu_torch.py [SITE-PACKAGES]

is part of `make setup` and of the images. Where the two builds do not fit, as where a package index has torchvision for
CUDA only, it copies this file into the environment, with a .pth beside it that calls `install` in every Python process.
Where they fit, nothing is needed, and what an earlier call left there is removed.

The extension of such a torchvision links libtorch_cuda. It cannot be loaded, and importing torchvision, and with it
facexlib, diffusers and the vision models of transformers, dies with "operator torchvision::nms does not exist". The
import only needs to know what two operators look like. Calling these two still raises; nothing here calls them.
"""

import sys  # and nothing else before torchvision is imported: every process of the environment reads this

OPERATORS = ("nms", "qnms")
_declared = []


class TorchvisionFinder:
    """Finds torchvision as usual, and has its operators declared before it is executed, not earlier."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            if not _declared and not fits(spec.submodule_search_locations or ()):
                declare()
            execute(module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Arrange that a later `import torchvision` works; imports neither it nor torch."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)


def fits(folders):
    """Whether torchvision's extension can be loaded by this torch."""
    from pathlib import Path

    import torch

    for extension in (path for folder in folders for path in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(extension))
        except (OSError, ImportError):
            return False
    return True


def declare():
    """Tell torch what the operators look like."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # torch forgets them when this is collected


def main(site_packages):
    """Put the hook into a folder of packages, or take it away."""
    from importlib.machinery import PathFinder
    from pathlib import Path

    spec = PathFinder.find_spec("torchvision")
    if spec is None:
        sys.exit("torchvision is not installed: install it first, from the index of torch.")
    module = Path(site_packages, Path(__file__).name)
    if fits(spec.submodule_search_locations or ()):
        module.with_suffix(".pth").unlink(missing_ok=True)
        module.unlink(missing_ok=True)
        return
    module.write_bytes(Path(__file__).read_bytes())
    module.with_suffix(".pth").write_text(f"import {module.stem}; {module.stem}.install()\n", encoding="utf-8")
    sys.stdout.write(f"torchvision was built for another torch: {module.with_suffix('.pth')} makes it importable\n")


if __name__ == "__main__":
    import sysconfig

    main(*(sys.argv[1:] or [sysconfig.get_path("purelib")]))
