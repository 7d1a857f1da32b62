"""What `make setup` installs: one environment for all, at the pinned versions."""

import functools
import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
HOOK = ROOT / "docker" / "torchvision_beside_cpu_torch.py"
TOGETHER = {
    "insightface": "insightface",
    "onnxruntime": "onnxruntime",
    "cv2": "opencv-python",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "webdataset": "webdataset",
    "img2dataset": "img2dataset",
    "ray": "ray",
    "facexlib": "facexlib",
    "albumentations": "albumentations",
}
"""Module -> distribution: the libraries that faceshards stands on."""


@functools.cache
def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def installed(distribution: str) -> Version:
    return Version(Version(metadata.version(distribution)).public)


def runtimes() -> list[str]:
    return [name for name in ("onnxruntime", "onnxruntime-gpu") if any(metadata.distributions(name=name))]


@pytest.mark.filterwarnings("ignore")  # of libraries, as they are imported
def test_all_ten_import_together() -> None:
    for name in TOGETHER:
        importlib.import_module(name)
    import cv2
    import facexlib.parsing
    import torchvision

    assert facexlib.parsing
    assert torchvision
    assert cv2.__version__ == str(pins()["opencv-python"]).rpartition(".")[0]
    assert not cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml").empty()


@pytest.mark.parametrize("distribution", sorted(TOGETHER.values()))
def test_version_is_the_pinned_one(distribution: str) -> None:
    name = runtimes()[0] if distribution == "onnxruntime" else distribution
    assert installed(name) == pins()[name]


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert len(pins()) == len([line for line in lines if not line.startswith("#")])


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    pin = {one: pins()[canonicalize_name(one.name)] for one in requirements()}
    assert not [str(one) for one in pin if not one.specifier.contains(pin[one], prereleases=True)]


def test_pins_that_share_a_folder_agree() -> None:
    assert pins()["opencv-python"] == pins()["opencv-python-headless"]
    assert pins()["onnxruntime"] == pins()["onnxruntime-gpu"]
    assert len(runtimes()) == 1


FAKE = {
    "torch/__init__.py": """
class ops:
    def load_library(path):
        if not FITS:
            raise OSError("libtorch_cuda.so: cannot open shared object file")
class library:
    class Library:
        def __init__(self, name, kind): self.known = known
        def define(self, signature): known.append(signature.partition("(")[0])
known = []
""",
    "torchvision/__init__.py": "import torch; assert torch.FITS or torch.known == ['nms', 'qnms'], torch.known",
    "torchvision/_C.so": "",
}


@pytest.mark.parametrize("fits", [True, False])
def test_torchvision_gets_its_hook_only_where_torch_is_of_another_build(fits: bool, tmp_path: Path) -> None:
    """With stand-ins for both libraries, in a Python without site-packages."""
    for name, content in FAKE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"FITS = {fits}\n{content}" if name.startswith("torch/") else content)
    site = tmp_path / "site"
    site.mkdir()

    def python(*arguments: str) -> None:
        command = [sys.executable, "-S", "-B", *arguments]
        done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for _ in range(2):
        python(str(HOOK), str(site))
    assert sorted(path.suffix for path in site.iterdir()) == ([] if fits else [".pth", ".py"])
    start = f"import site, sys; site.addsitedir({str(site)!r}); assert 'torch' not in sys.modules"
    python("-c", f"{start}; import torchvision; assert torchvision.__spec__.loader.name == 'torchvision'")

    (tmp_path / "torch/__init__.py").write_text(f"FITS = True\n{FAKE['torch/__init__.py']}")  # another torch comes
    python("-c", f"{start}; import torchvision, torch; assert torch.known == []")
    python(str(HOOK), str(site))
    assert list(site.iterdir()) == []
