"""Weights: papers, the order in which places are searched, verification, downloads, packs, licences."""

import gc
import hashlib
import io
import os
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.dataset.config import load_config
from pipeline.dataset.plan import make_plan
from schemas.arrays import Image
from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models import REGISTRIES, packs, weights
from stages.models.backends import Faces, ModelCard
from stages.models.papers import WEIGHTS, Weight, WeightFile
from stages.settings import ModelSettings

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REVISION = "0123456789" * 4


class Server(ThreadingHTTPServer):
    """Serves `content` at every path, as the hub does; what it does wrong is set per test."""

    content = CONTENT
    cut_after: int | None = None
    """Bytes after which the next answer ends; None: it does not."""
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and Range header of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(self.server.content)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            cut, self.server.cut_after = self.server.cut_after, None
            self.wfile.write(body if cut is None else body[:cut])

    do_HEAD = do_GET  # noqa: N815  # a name that http.server looks for

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # requests leaves the socket of a 404 to the collector
        gc.collect(1)  # all that is young; to look through whatever was imported takes half a second


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no FACESHARDS_MODELS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FACESHARDS_MODELS", raising=False)
    return tmp_path


def papers(name: str, *files: WeightFile, archive: WeightFile | None = None, commercial: bool = True) -> Weight:
    return Weight(name, files, "some licence", commercial, "page", "v1", "paper", "pixels", archive=archive)


@pytest.fixture
def toy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Weight:
    """A known weight of one file, on the server."""
    weight = papers("toy", WeightFile("toy.bin", "detector", len(CONTENT), SHA256, server.url))
    monkeypatch.setitem(WEIGHTS, "toy", weight)
    return weight


def put(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- papers


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=list(WEIGHTS))
def test_papers_are_complete_and_pinned(weight: Weight) -> None:
    assert weight.tasks
    assert weight.licence
    assert weight.paper
    assert weight.preprocessing
    for file in (*weight.files, *([weight.archive] if weight.archive else [])):
        assert re.fullmatch(r"[0-9a-f]{64}|", file.sha256)
        assert file.sha256 or not file.task, "a file that computes something has a known sha256"
        assert bool(file.source) != bool(weight.archive and file is not weight.archive)
        if file.source:
            assert weight.url(file).startswith("https://")
            assert weight.revision in weight.url(file), "a moving branch is no source"
            assert not weight.repository or re.fullmatch("[0-9a-f]{40}", weight.revision)


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"'bufalo_l' \(did you mean 'buffalo_l'\?\)"):
        weights.known("bufalo_l", ModelSettings())


# --- where weights are found


def test_path_beats_environment_beats_cache(toy: Weight, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = put(weights.cache_root() / "toy.bin")
    assert weights.find(toy, ModelSettings()) == cached
    monkeypatch.setenv("FACESHARDS_MODELS", str(home / "models"))
    assert weights.find(toy, ModelSettings()) == cached
    found = put(home / "models" / "toy.bin")
    assert weights.find(toy, ModelSettings()) == found
    given = put(home / "mine.bin")
    assert weights.find(toy, ModelSettings(paths={"toy": str(given)})) == given


def test_missing_says_what_to_fetch_and_where_to_put_it(toy: Weight, server: Server) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.find(toy, ModelSettings())
    for fact in ("models fetch toy", server.url, SHA256, "toy.bin", str(weights.cache_root())):
        assert fact in str(caught.value)
    assert not server.requests, "nothing is fetched without leave"


@pytest.mark.parametrize("kind", ["cache", "environment"])
def test_wrong_content_is_refused_where_it_was_not_given(
    kind: str, toy: Weight, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = weights.cache_root() if kind == "cache" else home / "models"
    monkeypatch.setenv("FACESHARDS_MODELS", str(root))
    put(root / "toy.bin", b"other")
    with pytest.raises(WeightsError, match=f"not {SHA256}: delete it"):
        weights.find(toy, ModelSettings())


def test_given_file_is_recorded_not_compared(toy: Weight, home: Path) -> None:
    put(home / "mine.bin", b"other")
    card = weights.card(toy, "detector", ModelSettings(paths={"toy": str(home / "mine.bin")}))
    assert card.sha256 == hashlib.sha256(b"other").hexdigest()


def test_given_file_that_is_absent_is_an_error(toy: Weight, home: Path) -> None:
    put(weights.cache_root() / "toy.bin")
    with pytest.raises(WeightsError, match=r"models\.paths\.toy"):
        weights.find(toy, ModelSettings(paths={"toy": str(home / "absent.bin")}))


def test_sha256_is_computed_anew_when_the_file_changes(home: Path) -> None:
    path = put(home / "file", b"one")
    first = sha256_of_file(path)
    put(path, b"two")
    os.utime(path, ns=(0, 0))
    assert sha256_of_file(path) != first


# --- fetching


def test_fetches_once_when_allowed(toy: Weight, server: Server) -> None:
    settings = ModelSettings(allow_download=True)
    path = weights.find(toy, settings)
    assert path.read_bytes() == CONTENT
    assert weights.find(toy, settings) == path
    assert len(server.requests) == 1
    assert sorted(name.name for name in path.parent.iterdir()) == [".lock", "toy.bin"]
    assert path.stat().st_mode == put(path.with_name("any")).stat().st_mode, "others may read it, as far as umask says"


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("trouble", ["other content", "cut short", "404", "down"])
def test_what_cannot_be_fetched_whole_is_never_installed(trouble: str, toy: Weight, server: Server) -> None:
    if trouble == "other content":
        server.content = b"<html>not found</html>"
    elif trouble == "cut short":
        server.cut_after = 300_000
    elif trouble == "404":
        server.status = 404
    else:
        server.shutdown()
        server.server_close()
    with pytest.raises(WeightsError, match="Cannot fetch toy") as caught:
        weights.fetch(toy)
    for fact in (server.url, SHA256, f"put toy.bin into {weights.cache_root()}"):
        assert fact in str(caught.value)
    assert files_of(weights.cache_root()) == set()


def test_a_damaged_file_is_fetched_again(toy: Weight) -> None:
    put(weights.cache_root() / "toy.bin", b"damaged")
    assert weights.fetch(toy).read_bytes() == CONTENT


def test_unwritable_cache_is_one_sentence(toy: Weight, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    with pytest.raises(WeightsError, match="Cannot write"):
        weights.fetch(toy)


@pytest.fixture
def hub(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is said of a weight of two files that is fetched from a hub on loopback."""
    from huggingface_hub import constants

    address = server.url.removesuffix("/weights.bin")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_CACHE": str(home / "hf" / "hub"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)

    def fetched(sha256: str = SHA256) -> str:
        files = (
            WeightFile("part/config.json", "", source="encoder/config.json"),
            WeightFile("model.bin", "detector", 0, sha256, "encoder/model.bin"),
        )
        weight = Weight("hubtoy", files, "MIT", True, "page", REVISION, "paper", "pixels", "owner/toy")
        try:
            return str(weights.fetch(weight))
        except WeightsError as error:
            return str(error)

    return fetched


def test_files_of_the_hub_come_at_their_revision_and_go_on_where_they_broke(
    server: Server, hub: Callable[..., str]
) -> None:
    server.content, server.cut_after = CONTENT * 12, 11 << 20  # the hub's library writes 10 MiB at a time
    folder = weights.cache_root() / "hubtoy"
    assert hub(hashlib.sha256(server.content).hexdigest()) == str(folder)
    assert files_of(weights.cache_root()) == {"hubtoy/part/config.json", "hubtoy/model.bin"}
    assert (folder / "model.bin").read_bytes() == server.content
    assert {path for _, path, _ in server.requests} == {
        f"/owner/toy/resolve/{REVISION}/encoder/{name}" for name in ("config.json", "model.bin")
    }
    assert [wanted for method, _, wanted in server.requests if method == "GET"][:2] == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize("trouble", ["other content", "404", "offline"])
def test_trouble_with_the_hub_is_one_sentence(
    trouble: str, server: Server, hub: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 404 if trouble == "404" else 200
    sha256 = "f" * 64 if trouble == "other content" else SHA256
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", trouble == "offline")
    message = hub(sha256)
    url = f"https://huggingface.co/owner/toy/resolve/{REVISION}/encoder/model.bin"
    for fact in ("Cannot fetch hubtoy", "models fetch hubtoy", url, sha256, str(weights.cache_root() / "hubtoy")):
        assert fact in message
    assert not (weights.cache_root() / "hubtoy/model.bin").exists()
    assert bool(server.requests) == (trouble != "offline")


# --- archives


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def pack(server: Server, monkeypatch: pytest.MonkeyPatch) -> Weight:
    """A known pack whose zip holds a climbing path, a file in a folder, and one that nobody wants."""
    server.content = zipped(**{"../../../det.onnx": b"detector", "toy/rec.onnx": b"recogniser", "big.onnx": b"unused"})
    files = (
        WeightFile("det.onnx", "detector", 8, hashlib.sha256(b"detector").hexdigest()),
        WeightFile("rec.onnx", "face_embedder", 10, hashlib.sha256(b"recogniser").hexdigest()),
    )
    archive = WeightFile("pack.zip", "", len(server.content), hashlib.sha256(server.content).hexdigest(), server.url)
    weight = papers("toypack", *files, archive=archive, commercial=False)
    monkeypatch.setitem(WEIGHTS, "toypack", weight)
    return weight


def test_takes_only_the_wanted_files_out_of_a_zip(pack: Weight, home: Path) -> None:
    assert weights.fetch(pack) == weights.cache_root() / "toypack"
    assert files_of(home) == {f"cache/faceshards/models/toypack/{name}.onnx" for name in ("det", "rec")}


@pytest.mark.parametrize("wrong", ["rec.onnx", "absent.onnx"])
def test_wrong_file_in_a_zip_is_not_installed(wrong: str, pack: Weight) -> None:
    other = papers("toypack", pack.files[0], WeightFile(wrong, "face_embedder", 10, "0" * 64), archive=pack.archive)
    with pytest.raises(WeightsError, match=wrong.replace(".", r"\.")):
        weights.fetch(other)
    assert not (weights.cache_root() / "toypack" / wrong).exists()


def test_a_task_needs_only_its_own_file_of_a_pack(pack: Weight) -> None:
    put(weights.cache_root() / "toypack" / "det.onnx", b"detector")
    settings = ModelSettings(pack="toypack")
    assert packs.pack_file("detector", settings).name == "det.onnx"
    with pytest.raises(WeightsError, match="missing"):
        packs.pack_file("face_embedder", settings)


# --- packs


def test_pack_that_is_nothing_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"models\.pack = 'nothing' is neither a folder nor one of buffalo_l"):
        packs.pack_file("detector", ModelSettings(pack="nothing"))


def test_pack_without_the_task_says_so(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    put(home / "auraface_glintr100.onnx", b"any")
    settings = ModelSettings(pack="auraface", paths={"auraface": str(home)})
    assert packs.pack_file("face_embedder", settings) == home / "auraface_glintr100.onnx"
    with pytest.raises(WeightsError, match=r"has no detector"):
        packs.pack_file("detector", settings)


def test_folder_with_known_names_is_not_opened(home: Path) -> None:
    for name in ("1k3d68.onnx", "aaa.onnx", "det_10g.onnx", "w600k_r50.onnx"):
        put(home / "pack" / name, b"not even ONNX")
    settings = ModelSettings(pack=str(home / "pack"))
    assert packs.pack_file("detector", settings).name == "det_10g.onnx"
    assert packs.pack_file("face_embedder", settings).name == "w600k_r50.onnx"


def test_folder_with_garbage_or_nothing_is_one_sentence(home: Path) -> None:
    (home / "pack").mkdir()
    with pytest.raises(WeightsError, match="holds no ONNX file for the detector"):
        packs.pack_file("detector", ModelSettings(pack=str(home / "pack")))
    put(home / "pack" / "a.onnx", b"garbage" * 9)
    with pytest.raises(WeightsError, match="is not an ONNX model"):
        packs.pack_file("detector", ModelSettings(pack=str(home / "pack")))


def test_broken_manifest_of_a_pack_is_one_sentence(home: Path) -> None:
    settings = ModelSettings(pack=str(home))
    put(home / "det_10g.onnx")
    put(home / "manifest.json", b'{"manifest_version": 1}')
    assert packs.pack_file("detector", settings).name == "det_10g.onnx"
    for broken in (
        b"{",
        b"[]",
        b'{"manifest_version": 2}',
        b'{"manifest_version": 2, "tasks": {"detection": {"file": "x"}}}',
    ):
        put(home / "manifest.json", broken)
        with pytest.raises(WeightsError, match=r"manifest\.json names"):
            packs.pack_file("detector", settings)


def test_unknown_file_of_a_folder_counts_as_non_commercial(home: Path, toy: Weight) -> None:
    put(home / "pack" / "det_10g.onnx", b"any")
    put(home / "pack" / "w600k_r50.onnx", CONTENT)
    settings = ModelSettings(pack=str(home / "pack"))
    assert not packs.pack_card("detector", settings).commercial
    assert packs.pack_card("detector", settings).name == "pack/det_10g.onnx"
    assert packs.pack_card("face_embedder", settings).commercial, "the sha256 is that of a free weight"


# --- licences and lists


def test_licence_gate() -> None:
    free = ModelCard("free", "detector", "", "MIT", True)
    bound = ModelCard("bound", "segmenter", "", "research only", False)
    other = ModelCard("other", "detector", "", "research only", False)
    assert not weights.unaccepted([free], ModelSettings())
    assert not weights.unaccepted([free, bound], ModelSettings(accept_noncommercial=True))
    refusal = weights.unaccepted([free, bound, other], ModelSettings())
    assert "bound, other (research only)" in refusal
    assert "models.accept_noncommercial=true" in refusal
    assert "free" not in refusal


def test_a_list_of_licences_is_a_gate_that_nothing_else_opens() -> None:
    free, bound = ModelCard("free", "detector", "", "MIT", True), ModelCard("bound", "detector", "", "research", False)
    settings = ModelSettings(licences=("mit*", "apache*"), accept_noncommercial=True)
    assert not weights.unaccepted([free], settings)
    refusal = weights.unaccepted([free, bound], settings)
    assert "leaves out: bound (research)" in refusal
    assert "free" not in refusal


def test_list_and_check_tell_the_state(toy: Weight, home: Path) -> None:
    def state(settings: ModelSettings) -> tuple[str, str]:
        listed, checked = (weights.weight_state(toy, settings, hashes=hashes).state for hashes in (False, True))
        return listed, checked

    assert state(ModelSettings()) == ("missing", "missing")
    put(weights.cache_root() / "toy.bin", b"other")
    assert state(ModelSettings()) == ("found", "wrong sha256: toy.bin")
    put(weights.cache_root() / "toy.bin")
    assert state(ModelSettings()) == ("found", "verified")
    put(home / "mine.bin", b"other")
    given = ModelSettings(paths={"toy": str(home / "mine.bin")})
    assert state(given) == ("given", "given, wrong sha256: mine.bin")


# --- `models list | fetch | check`


class Newcomer:
    """A detector with weights of its own, as somebody adds one: a file, and a line in the registry."""

    papers: Weight
    runtime = "thought alone"

    def __init__(self, settings: ModelSettings, device: str) -> None:
        weights.find(self.papers, settings)

    @classmethod
    def weights(cls, settings: ModelSettings) -> tuple[Weight, ...]:
        return (cls.papers,)

    @classmethod
    def cards(cls, settings: ModelSettings) -> list[ModelCard]:
        return [weights.card(cls.papers, "detector", settings)]

    def detect(self, image: Image) -> Faces:
        return Faces(np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, np.float32))


@pytest.fixture
def newcomer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    Newcomer.papers = papers("newcomer-v1", WeightFile("new.bin", "detector", len(CONTENT), SHA256, server.url))
    monkeypatch.setitem(REGISTRIES["detector"], "newcomer", f"{__name__}:Newcomer")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Newcomer.__module__])


def models(*words: str) -> str:
    result = CliRunner().invoke(app, ["models", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


CHOSEN = ["models.detector=newcomer", "models.segmenter=grabcut", "models.face_embedder=lbp"]
SETS = [word for pair in [*CHOSEN, "models.image_embedder=patches"] for word in ("--set", pair)]


@pytest.mark.usefixtures("newcomer")
def test_models_commands_know_a_backend_that_was_just_registered() -> None:
    assert "newcomer-v1" in models("list")
    models("fetch", *SETS)
    assert (weights.cache_root() / "new.bin").read_bytes() == CONTENT
    assert "verified; detector newcomer on thought alone" in models("check", "newcomer-v1")


@pytest.mark.usefixtures("newcomer")
def test_a_missing_weight_has_the_card_that_it_will_have_when_it_is_there() -> None:
    (missing,) = Newcomer.cards(ModelSettings())
    assert missing.lacks is Newcomer.papers
    weights.fetch(Newcomer.papers)
    (there,) = Newcomer.cards(ModelSettings())
    assert there.lacks is None
    assert there == replace(missing, lacks=None)


@pytest.mark.usefixtures("newcomer")
def test_a_run_may_fetch_what_is_missing_once_it_is_told_so_and_a_dry_run_never_does(server: Server) -> None:
    config = load_config(None, [*(pair for pair in SETS if pair != "--set"), "models.allow_download=true"])
    assert [state.weight.name for state in make_plan(config, dry_run=True).lacks] == ["newcomer-v1"]
    assert not server.requests
    assert not make_plan(config).lacks
    assert (weights.cache_root() / "new.bin").read_bytes() == CONTENT


@pytest.mark.usefixtures("newcomer")
def test_a_damaged_weight_is_neither_used_nor_fetched_over_nor_loaded(server: Server) -> None:
    damaged = put(weights.cache_root() / "new.bin", b"other")
    config = load_config(None, [*(pair for pair in SETS if pair != "--set"), "models.allow_download=true"])
    with pytest.raises(WeightsError, match=r"newcomer-v1 \(wrong sha256: new\.bin\)"):
        make_plan(config)
    assert not server.requests
    assert damaged.read_bytes() == b"other"
    result = CliRunner().invoke(app, ["models", "check", "newcomer-v1"])
    assert result.exit_code == 2
    assert "NOT USABLE as detector: newcomer-v1 is wrong sha256: new.bin" in result.output


@pytest.mark.usefixtures("newcomer")
def test_models_fetch_leaves_out_what_a_path_gives(home: Path, server: Server) -> None:
    path = put(home / "mine.bin")
    models("fetch", *SETS, "--set", f'models.paths={{newcomer-v1 = "{path}"}}')
    assert not server.requests
    assert not weights.cache_root().exists()


def test_models_fetch_gets_what_the_profile_needs_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("stages.models.weights.fetch", lambda weight: fetched.append(weight.name))
    models("fetch")
    assert fetched == ["buffalo_l", "bisenet", "clip-vit-h"]
    fetched.clear()
    models("fetch", "--set", "pack.embeddings=false")
    assert fetched == ["buffalo_l", "bisenet"]
