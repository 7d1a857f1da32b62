"""No bytes of data or weights are ever run: a rule over the source, and the proof that the rule sees what it should."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("schemas", "stages", "pipeline", "benchmarks")
NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.loads", "cPickle.loads", "dill.load", "dill.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "joblib.load", "shelve.open", "marshal.load", "marshal.loads"),
    *("pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "os.system", "os.popen"),
}
"""Functions that run what they read."""
ONLY_WITH = {"torch.load": ("weights_only", True)}
"""Function -> keyword that makes it harmless."""
NEVER_WITH = {"allow_pickle": True, "trust_remote_code": True, "shell": True}
"""Keywords that make any function harmful."""


def names(tree: ast.AST) -> dict[str, str]:
    """Local name -> full name, of what a module imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def full_name(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def may_be_harmful(source: str) -> bool:
    """Whether all words of what is never allowed are in it; parsing takes a while."""
    words = {*re.findall(r"\w+", source)}
    return bool(words & {*NEVER_WITH, "compile"}) or any(
        words.issuperset(name.split(".")) for name in {*NEVER, *ONLY_WITH}
    )


def harmful(source: str) -> Iterator[int]:
    """Lines of calls that run what they read."""
    if not may_be_harmful(source):
        return
    tree = ast.parse(source)
    known, never = names(tree), NEVER - {"compile"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and full_name(node, known) in never:
            yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, known)
        given = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
        keyword, value = ONLY_WITH.get(name, (None, None))
        if name == "compile" or (keyword and given.get(keyword) is not value) or (keyword and None in given):
            yield node.lineno
        if any(word in NEVER_WITH and given[word] is not False for word in given):
            yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(data)",
        "import pickle as p\np.load(file)",
        "from pickle import loads as read\nread(data)",
        "from pickle import Unpickler\nclass Mine(Unpickler): pass",
        "import pickle\nread = pickle.loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import torch\ntorch.load(path, **options)",
        "import torch\ntorch.load(path, weights_only=True, **options)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.lib.format.read_array(file, allow_pickle=flag)",
        "import yaml\nyaml.load(text)",
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "model(path, trust_remote_code=True)",
    ],
)
def test_the_rule_sees(source: str) -> None:
    assert list(harmful(source))


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import UnpicklingError\ntry: pass\nexcept UnpicklingError: pass",
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import torch\ntorch.load(path, weights_only=True, map_location='cpu')\ntorch.save(x, path)",
        "import numpy as np\nnp.load(path)\nnp.save(path, x, allow_pickle=False)",
        "import re, json\nre.compile('x')\njson.loads(text)\nmodel.eval()",
        "import torch\ntorch.compile(model)",
    ],
)
def test_the_rule_lets_pass(source: str) -> None:
    assert not list(harmful(source))


def test_nothing_runs_what_it_reads() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    wrong = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in harmful(path.read_text(encoding="utf-8"))]
    assert not wrong
