"""The house's rules as tests: who may import whom, and that every declaration is true."""

import ast
import collections
import functools
import graphlib
import inspect
import json
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.dataset.config import load_config
from pipeline.dataset.finished.group import grouping
from pipeline.dataset.finished.report_numbers import MEASURES
from pipeline.dataset.out import takedowns
from pipeline.dataset.plan import make_plan
from schemas.columns import COLUMNS, SEED
from schemas.drops import DropReason
from stages import STAGES
from stages.base import Stage
from stages.filter import FROM_POINTS, QUALITIES
from stages.models import REGISTRIES
from stages.models import backends as models

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("schemas", "stages", "pipeline")
OPTIONAL = {"aiobotocore", "bitsandbytes", "botocore"}
"""Asked for by a setting or a URL alone, which says what to install where it is not there."""
HEAVY = {
    *("accelerate", "diffusers", "facexlib", "insightface", "onnxruntime", "peft"),
    *("torch", "torchvision", "transformers"),
}
SHARD_BOUNDARY = "pipeline.dataset.execute.local"
"""Where whatever stopped a shard is caught: it is reported, the other shards go on, the run exits with 3."""
HEAVY_ROOMS = ("stages.models", "pipeline.train")
PROTOCOLS = {
    "detector": models.Detector,
    "segmenter": models.Segmenter,
    "face_embedder": models.FaceEmbedder,
    "fiqa": models.FaceQuality,
    "image_embedder": models.ImageEmbedder,
}


class Import(NamedTuple):
    """One imported name, as far as it is a module: `schemas.columns`, `torch`, …"""

    importer: str
    target: str
    line: int
    on_load: bool
    """Runs when the importer is loaded, not only inside a function or for the type checker."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def inside(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


@functools.cache
def modules() -> dict[str, Path]:
    """Our modules by dotted name; a package goes by its own name."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def import_nodes(node: ast.AST, on_load: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # holds no statement, and most nodes are such
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_load
        yield from import_nodes(child, on_load and not deferred)


def targets(importer: str, node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = importer if modules()[importer].name == "__init__.py" else importer.rpartition(".")[0]
    anchor = package.rsplit(".", node.level - 1)[0] if node.level else ""
    source = ".".join(part for part in (anchor, node.module) if part)
    return {f"{source}.{name.name}" if f"{source}.{name.name}" in modules() else source for name in node.names}


@functools.cache
def imports() -> tuple[Import, ...]:
    return tuple(
        Import(importer, target, node.lineno, on_load)
        for importer, path in modules().items()
        for node, on_load in import_nodes(tree(path))
        for target in targets(importer, node)
    )


def may_import(importer: str, target: str) -> bool:
    """The floors: schemas <- stages <- dataset, schemas <- shared <- dataset and train; these two do not meet."""
    if inside(importer, "schemas"):
        return inside(target, "schemas")
    if inside(importer, "stages"):
        return inside(target, "schemas", "stages")
    if inside(importer, "pipeline.shared"):
        return inside(target, "schemas", "pipeline.shared")
    if inside(importer, "pipeline.train"):
        return inside(target, "schemas", "pipeline.shared", "pipeline.train")
    return not inside(target, "pipeline.train")


def listing(found: list[Import]) -> str:
    return "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("schemas.shard", "stages.base", False),
        ("stages.detect", "pipeline.dataset.plan", False),
        ("stages.detect", "stages.models.backends", True),
        ("pipeline.dataset.plan", "stages", True),
        ("pipeline.dataset.plan", "pipeline.shared.bases", True),
        ("pipeline.dataset.finished.report", "pipeline.train.loader", False),
        ("pipeline.train.loop", "stages.pixels.images", False),
        ("pipeline.train.adapters.model", "pipeline.dataset.plan", False),
        ("pipeline.train.settings", "pipeline.shared.configfile", True),
        ("pipeline.shared.bases", "pipeline.shared.atomic", True),
        ("pipeline.shared.bases", "stages.models.backends", False),
        ("pipeline.shared.bases", "pipeline.train.settings", False),
    ],
)
def test_the_floors_themselves(importer: str, target: str, allowed: bool) -> None:
    assert may_import(importer, target) is allowed


def test_imports_are_found_wherever_they_hide() -> None:
    lines = (
        "import a.b",
        "class C:\n import c",
        "def f():\n import d",
        "if TYPE_CHECKING:\n import e",
        "with g: import g",
    )
    source = "\n".join(lines)
    found = {(next(iter(targets("schemas", node))), on_load) for node, on_load in import_nodes(ast.parse(source))}
    assert found == {("a.b", True), ("c", True), ("d", False), ("e", False), ("g", True)}
    relative = ast.parse("from ..models import backends").body[0]
    assert isinstance(relative, ast.ImportFrom)
    assert targets("stages.models.backends", relative) == {"stages.models.backends"}


def test_imports_go_down_only() -> None:
    wrong = [i for i in imports() if inside(i.target, *PACKAGES) and not may_import(i.importer, i.target)]
    assert not wrong, listing(wrong)


def test_schemas_use_only_numpy_and_pyarrow() -> None:
    allowed = sys.stdlib_module_names | {"schemas", "numpy", "pyarrow"}
    found = [i for i in imports() if inside(i.importer, "schemas") and i.target.partition(".")[0] not in allowed]
    # What stages and trainer both need, and these two may not import each other: docs/decisions/0021 and 0029.
    shared = {"schemas.section": "pydantic", "schemas.int8": "safetensors"}
    wrong = [i for i in found if shared.get(i.importer) != i.target.partition(".")[0]]
    assert not wrong, listing(wrong)


def test_every_library_in_use_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    libraries = {i.target.partition(".")[0] for i in imports()} - sys.stdlib_module_names - set(PACKAGES)
    libraries -= OPTIONAL
    others = {name for name in libraries if canonicalize_name(name) not in declared}
    for name in declared:  # such as pillow, whose library is PIL
        top_level = metadata.distribution(name).read_text("top_level.txt")
        files = top_level.split() if top_level else [file.parts[0] for file in metadata.files(name) or ()]
        others -= {file.removesuffix(".py") for file in files}
    assert not others


def test_fsspec_has_one_layer() -> None:
    """Stages, which stand below it, have one reader of files by it: of images that are there already."""
    allowed = ("pipeline.shared.files", "stages.fetch.stored")
    wrong = [i for i in imports() if inside(i.target, "fsspec") and i.importer not in allowed]
    assert not wrong, listing(wrong)


def test_only_the_cluster_imports_ray() -> None:
    cluster = {"pipeline.dataset.execute.cluster", "pipeline.dataset.execute.cluster_node"}
    wrong = [i for i in imports() if inside(i.target, "ray") and i.importer not in cluster]
    assert not wrong, listing(wrong)


def test_models_are_listed_without_insightface() -> None:
    """Its package imports image augmentation too, a second of it; all backends are imported for a list."""
    wrong = [i for i in imports() if inside(i.target, "insightface") and i.on_load]
    assert not wrong, listing(wrong)


LOADING = """
import contextlib, io, json, pickle, runpy, sys

def run(module, *words):
    sys.argv[1:] = words
    code, errors = None, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code
    seen.append((code, errors.getvalue(), [*sys.modules]))

seen = []
run("pipeline", "--help")
run("pipeline.train", "--help")
for words in {mistakes!r}:
    run("pipeline.train", *words.split())
from pipeline.dataset.execute.make_shard import Worker
plan = pickle.loads({plan!r})
Worker(plan).close()
plan.digest, plan.reasons
seen.append((0, "", [*sys.modules]))
print(json.dumps(seen))
"""
WITH_PANDAS = """
import pipeline.dataset.execute.make_shard, sys
assert "pandas" not in sys.modules
import pandas, pyarrow
nulls = pyarrow.array(pandas.Series([1.0, float("nan")])).null_count
print(nulls, *pyarrow.table({"a": [1]}).to_pandas().shape)
"""


MISTAKES = {
    "--variant faceidd": "'faceidd' is not known",
    "--variant faceid --preset sd16": "'sd16' is not known",
    "--variant faceid --set optim.rl=1": "optim.lr",
    "--variant faceid --base sd16": "did you mean sd15?",
}


class Loaded(NamedTuple):
    """(exit code, what went to stderr, modules that were loaded by then), one thing after the other in a process."""

    help: tuple[int, str, list[str]]
    help_of_train: tuple[int, str, list[str]]
    mistakes: dict[str, tuple[int, str, list[str]]]
    worker: tuple[int, str, list[str]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    plan = pickle.dumps(make_plan(load_config(None, [], shards="sample")))
    script = LOADING.format(plan=plan, mistakes=list(MISTAKES))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    help, help_of_train, *mistakes, worker = json.loads(done.stdout)
    return Loaded(help, help_of_train, dict(zip(MISTAKES, mistakes, strict=True)), worker)


def test_help_is_answered_before_anything_slow_is_imported(loaded: Loaded) -> None:
    slow = {"numpy", "pyarrow", "fsspec", "torch", "cv2", "onnxruntime", "ray"}
    for code, errors, modules in (loaded.help, loaded.help_of_train):
        assert (code, errors) == (0, "")
        assert "typer" in modules
        assert not slow.intersection(modules)


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_in_a_call_of_the_trainer_is_refused_before_torch_is_imported(loaded: Loaded, words: str) -> None:
    code, errors, modules = loaded.mistakes[words]
    assert code == 2
    assert MISTAKES[words] in errors
    assert "torch" not in modules


def test_who_makes_shards_imports_the_stages_that_it_runs_and_no_model(loaded: Loaded) -> None:
    """Nor pandas, which Arrow would import if it were let."""
    models = {"stages.detect", "stages.embed_face", "skimage", "torch", "onnxruntime"}
    assert not {*models, "pandas"}.intersection(loaded.worker[2])
    assert "stages.pack" in loaded.worker[2]


@pytest.mark.long
def test_arrow_takes_the_objects_of_pandas_once_somebody_imported_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITH_PANDAS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1"]


OF_A_CALL = ("pipeline.train.job", "pipeline.train.evaluate.call")
NOT_FOR_A_CALL = {"diffusers", "accelerate", "transformers"}


def loaded_with(*roots: str) -> set[str]:
    """What these modules of ours load when they are loaded: all of ours, and which libraries these import."""
    loaded: set[str] = set()
    waiting = {*roots}
    while waiting:
        loaded |= waiting
        packages = {name.rpartition(".")[0] for name in waiting if name in modules()} - {""}
        found = {i.target for i in imports() if i.on_load and i.importer in waiting}
        waiting = (found | packages) - loaded
    return loaded


def test_a_call_of_the_trainer_is_proved_before_diffusers_is_imported() -> None:
    libraries = {name.partition(".")[0] for name in loaded_with(*OF_A_CALL)}
    assert {"torch", "safetensors"} <= libraries
    assert not NOT_FOR_A_CALL & libraries


@pytest.mark.long
def test_nor_does_a_library_import_it_for_a_call() -> None:
    script = f"import sys, {', '.join(OF_A_CALL)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" in done.stdout.split()
    assert not NOT_FOR_A_CALL.intersection(done.stdout.split())


def test_model_libraries_load_only_in_model_rooms() -> None:
    heavy = [i for i in imports() if i.on_load and i.target.partition(".")[0] in HEAVY]
    wrong = [i for i in heavy if not inside(i.importer, *HEAVY_ROOMS)]
    assert not wrong, listing(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for found in imports():
        if found.target in graph and found.target != found.importer:
            graph[found.importer].add(found.target)
    assert not circle(graph)


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    """In each folder, its modules and folders, each folder taken as one, stand above one another."""
    folders: dict[str, dict[str, set[str]]] = {}
    for found in imports():
        importer, target = found.importer.split("."), found.target.split(".")
        depth = next((i for i, (a, b) in enumerate(zip(importer, target, strict=False)) if a != b), None)
        if depth is not None and found.target in modules():
            graph = folders.setdefault(".".join(importer[:depth]), {})
            graph.setdefault(importer[depth], set()).add(target[depth])
    circles = {folder: circle(graph) for folder, graph in folders.items()}
    assert not {folder: names for folder, names in circles.items() if names}


def test_no_folder_is_crowded_and_no_file_is_long() -> None:
    """At most 16 modules in a folder, beside the stages, one file each, and 400 lines in a file."""
    stages = {step.path.partition(":")[0] for step in STAGES.values()}
    others = (path for name, path in modules().items() if path.name != "__init__.py" and name not in stages)
    folders = collections.Counter(path.parent for path in others)
    assert not {str(folder): count for folder, count in folders.items() if count > 16}
    lines = {module: path.read_text(encoding="utf-8").count("\n") for module, path in modules().items()}
    assert not {module: count for module, count in lines.items() if count > 400}


def test_every_folder_of_ours_is_a_package_and_pipeline_is_an_empty_one() -> None:
    folders = {path.parent for path in modules().values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
    assert (ROOT / "pipeline/__init__.py").read_bytes() == b""
    assert not list((ROOT / "tests").rglob("__init__.py"))


ANYTHING = re.compile(r"\bexcept\s*:|\b(Base)?Exception\b")
"""What such a clause has."""


def goes_on_after_anything(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler) or any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
        return False
    caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"BaseException"}
    return bool(caught & {"Exception", "BaseException"})


@pytest.mark.parametrize(
    ("clause", "wrong"),
    [
        ("except:\n  log()", True),
        ("except (OSError, Exception):\n  log()", True),
        ("except BaseException:\n  clean()\n  raise", False),
        ("except OSError:\n  log()", False),
    ],
)
def test_the_rule_of_catching_itself(clause: str, wrong: bool) -> None:
    assert any(map(goes_on_after_anything, ast.walk(ast.parse(f"try:\n  f()\n{clause}")))) is wrong


def test_only_the_shard_boundary_catches_everything_to_go_on() -> None:
    wrong = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        if module != SHARD_BOUNDARY and ANYTHING.search(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree(path))
        if goes_on_after_anything(node)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_what_it_declares(name: str) -> None:
    stage = STAGES[name].stage()
    assert inspect.isclass(stage)
    assert inspect.isfunction(stage.__call__), "its instances are called with a table"
    assert list(inspect.signature(stage).parameters) == ["settings", "runtime"]
    assert set(Stage.__annotations__) == {"name", "reads", "writes", "drops"}
    assert stage.name == name
    for columns in (stage.reads, stage.writes):
        assert isinstance(columns, tuple)
        assert set(columns) <= set(COLUMNS)
        assert len(set(columns)) == len(columns)
    assert isinstance(stage.drops, tuple)
    assert all(isinstance(reason, DropReason) for reason in stage.drops)
    assert len(set(stage.drops)) == len(stage.drops)


def methods(protocol: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(protocol, inspect.isroutine) if not name.startswith("_")}


@pytest.mark.parametrize("task", REGISTRIES)
def test_registered_task_has_a_protocol(task: str) -> None:
    assert methods(PROTOCOLS[task]) - {"cards"}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, known in REGISTRIES.items() for name in known])
def test_backend_has_its_protocols_methods(task: str, name: str) -> None:
    backend = models.backend(task, name)
    assert inspect.isclass(backend)
    assert list(inspect.signature(backend).parameters) == ["settings", "device"]
    assert inspect.ismethod(backend.cards), "cards is a classmethod"
    for method in methods(PROTOCOLS[task]):
        expected = inspect.signature(getattr(PROTOCOLS[task], method))
        assert list(inspect.signature(getattr(backend, method)).parameters) == list(expected.parameters)


def test_every_reason_is_declared_by_a_stage_by_take_downs_or_by_group() -> None:
    declared = {reason for step in STAGES.values() for reason in step.stage().drops}
    others = [*takedowns.DROPS, *grouping.DROPS]
    assert not declared & set(others)
    assert declared | set(others) == set(DropReason)


def test_qualities_are_measured_where_they_are_judged_and_in_the_report() -> None:
    order = [list(STAGES).index(quality.stage) for quality in QUALITIES]
    assert order == sorted(order)
    sliders = [key for measure in MEASURES for key in measure.thresholds]
    for quality in QUALITIES:
        stage = STAGES[quality.stage].stage()
        assert quality.reason in stage.drops
        assert ("kps" if quality.measure in FROM_POINTS else quality.measure) in {*stage.reads, *stage.writes}
        assert quality.key in sliders


def functions(path: Path) -> set[str]:
    return set(re.findall(r"^def (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", [*STAGES, "takedowns", "group"])
def test_every_reason_of_a_stage_has_a_witness(name: str) -> None:
    others = {"takedowns": takedowns.DROPS, "group": grouping.DROPS}
    drops = others[name] if name in others else STAGES[name].stage().drops
    tests = {test for path in (ROOT / "tests").rglob(f"test_{name}*.py") for test in functions(path)}
    missing = {f"test_drops_{reason.value}" for reason in drops} - tests
    assert not missing, f"tests/test_{name}.py lacks {sorted(missing)}"


def test_every_column_is_written() -> None:
    written = {column for step in STAGES.values() for column in step.stage().writes}
    others = {*SEED, "person", "verdict", "stage"}
    assert not set(COLUMNS) - written - others
    assert not written & others


@functools.cache
def files() -> tuple[Path, ...]:
    """All that would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the project's files")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return tuple(path for path in paths if path.is_file() and not path.is_symlink())


# in two halves, since this file is searched too
PLACES = [
    "".join(halves)
    for halves in (
        ("/wo", "rk/"),
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("py", "torch.org"),
        ("npm", "js.org"),
        ("debian", ".org"),
        ("anaconda", ".org"),
        ("conda", "-forge"),
    )
]


@pytest.mark.parametrize("place", PLACES)
def test_no_file_names_a_place_of_its_own_machine_or_a_package_index(place: str) -> None:
    wrong = [str(path.relative_to(ROOT)) for path in files() if place.encode() in path.read_bytes()]
    assert not wrong, f"{place} stands in {wrong}"
