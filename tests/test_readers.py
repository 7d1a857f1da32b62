"""Every block of docs/readers.md, executed on a dataset."""

import re
import shutil
import warnings
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "docs/readers.md").read_text(encoding="utf-8")
BLOCKS = {
    f"{heading.lower()} {number}": code
    for heading, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}


ALWAYS_READ = ("webdataset", "hugging face datasets")


def test_blocks_are_named_and_are_python():
    assert all(any(name.startswith(reader) for name in BLOCKS) for reader in ALWAYS_READ)
    for name, code in BLOCKS.items():
        compile(code, f"docs/readers.md: {name}", "exec")


@pytest.fixture
def folder(dataset, tmp_path, monkeypatch) -> Path:
    """A folder in which `out` is a dataset, as the working directory."""
    import datasets
    from mlcroissant._src.operation_graph.operations import extract

    shutil.copytree(dataset, tmp_path / "out", ignore=shutil.ignore_patterns("drops", "report.html"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(extract, "EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path / "extracted"))
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith(ALWAYS_READ) else [pytest.mark.long]) for name in BLOCKS]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # several leave files open
def test_a_block_runs_as_it_stands(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in re.findall(r"^(?:import|from) ([\w, ]+?)(?: import.*|\.\w+.*)?$", BLOCKS[name], re.MULTILINE):
        for one in module.split(", "):
            pytest.importorskip(one, reason=f"{one} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of each other
        exec(compile(BLOCKS[name], f"docs/readers.md: {name}", "exec"), {})
    assert capsys.readouterr().out.strip()
