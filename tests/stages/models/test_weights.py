"""Weights: papers, the order in which places are searched, verification, resumable downloads, packs, licences."""

import hashlib
import io
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from schemas.digest import sha256_of_file
from schemas.errors import WeightsError
from stages.models import downloads, packs, weights
from stages.models.base import ModelCard
from stages.models.weights import WEIGHTS, File, Weight
from stages.settings import ModelSettings

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at every path; what it does wrong is set per test."""

    content = CONTENT
    ranges = True
    cut_after: int | None = None
    """Bytes after which the next answer ends; None: it does not."""
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        """Range header of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if self.server.status != 200 or start >= len(self.server.content) > 0:
            self.send_error(self.server.status if self.server.status != 200 else 416)
            return
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut, self.server.cut_after = self.server.cut_after, None
        self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no FACESHARDS_MODELS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FACESHARDS_MODELS", raising=False)
    return tmp_path


def papers(name: str, *files: File, archive: File | None = None, commercial: bool = True) -> Weight:
    return Weight(name, files, "some licence", commercial, "page", "v1", "paper", "pixels", archive)


@pytest.fixture
def toy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Weight:
    """A known weight of one file, on the server."""
    weight = papers("toy", File("toy.bin", "detector", len(CONTENT), SHA256, server.url))
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
        assert bool(file.url) != bool(weight.archive and file is not weight.archive)
        if file.url:
            assert file.url.startswith("https://")
            assert weight.revision in file.url, "a moving branch is no source"


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"'bufalo_l' \(did you mean 'buffalo_l'\?\)"):
        weights.known("bufalo_l")


# --- where weights are found


def test_path_beats_environment_beats_cache(toy: Weight, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = put(weights.cache_root() / "toy.bin")
    assert weights.resolve("toy", ModelSettings()) == cached
    monkeypatch.setenv("FACESHARDS_MODELS", str(places / "models"))
    assert weights.resolve("toy", ModelSettings()) == cached
    found = put(places / "models" / "toy.bin")
    assert weights.resolve("toy", ModelSettings()) == found
    given = put(places / "mine.bin")
    assert weights.resolve("toy", ModelSettings(paths={"toy": str(given)})) == given


def test_missing_says_what_to_fetch_and_where_to_put_it(toy: Weight, server: Server) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.resolve("toy", ModelSettings())
    for fact in ("models fetch toy", server.url, SHA256, "toy.bin", str(weights.cache_root())):
        assert fact in str(caught.value)
    assert not server.asked, "nothing is fetched without leave"


@pytest.mark.parametrize("place", ["cache", "environment"])
def test_wrong_content_is_refused_where_it_was_not_given(
    place: str, toy: Weight, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = weights.cache_root() if place == "cache" else places / "models"
    monkeypatch.setenv("FACESHARDS_MODELS", str(root))
    put(root / "toy.bin", b"other")
    with pytest.raises(WeightsError, match=f"not {SHA256}: delete it"):
        weights.resolve("toy", ModelSettings())


def test_given_file_is_recorded_not_compared(toy: Weight, places: Path) -> None:
    put(places / "mine.bin", b"other")
    card = weights.card("toy", "detector", ModelSettings(paths={"toy": str(places / "mine.bin")}))
    assert card.sha256 == hashlib.sha256(b"other").hexdigest()


def test_given_file_that_is_absent_is_an_error(toy: Weight, places: Path) -> None:
    put(weights.cache_root() / "toy.bin")
    with pytest.raises(WeightsError, match=r"models\.paths\.toy"):
        weights.resolve("toy", ModelSettings(paths={"toy": str(places / "absent.bin")}))


def test_sha256_is_computed_anew_when_the_file_changes(places: Path) -> None:
    path = put(places / "file", b"one")
    first = sha256_of_file(path)
    put(path, b"two")
    os.utime(path, ns=(0, 0))
    assert sha256_of_file(path) != first


# --- fetching


def test_fetches_once_when_allowed(toy: Weight, server: Server) -> None:
    settings = ModelSettings(allow_download=True)
    path = weights.resolve("toy", settings)
    assert path.read_bytes() == CONTENT
    assert weights.resolve("toy", settings) == path
    assert server.asked == [None]
    assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == ["toy.bin"]


def test_reports_progress_up_to_the_end(toy: Weight) -> None:
    seen: list[tuple[str, int, int]] = []
    weights.fetch("toy", progress=lambda *what: seen.append(what))
    assert seen[-1] == ("toy.bin", len(CONTENT), len(CONTENT))


def test_goes_on_where_the_connection_broke(toy: Weight, server: Server) -> None:
    server.cut_after = 300_000
    assert weights.fetch("toy").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_goes_on_where_an_earlier_run_was_stopped(toy: Weight, server: Server) -> None:
    put(weights.cache_root() / "toy.bin.part", CONTENT[:100_000])
    assert weights.fetch("toy").read_bytes() == CONTENT
    assert server.asked == ["bytes=100000-"]


def test_starts_again_when_the_server_knows_no_ranges(toy: Weight, server: Server) -> None:
    server.ranges = False
    put(weights.cache_root() / "toy.bin.part", b"x" * 100)
    assert weights.fetch("toy").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"x" * len(CONTENT), CONTENT + b"more"], ids=["other", "longer"])
def test_damaged_part_is_thrown_away(content: bytes, toy: Weight) -> None:
    part = put(weights.cache_root() / "toy.bin.part", content)
    with pytest.raises(WeightsError, match=SHA256):
        weights.fetch("toy")
    assert not part.exists()
    assert weights.fetch("toy").read_bytes() == CONTENT


def test_wrong_content_is_never_installed(toy: Weight, server: Server) -> None:
    server.content = b"<html>not found</html>"
    with pytest.raises(WeightsError, match=SHA256):
        weights.fetch("toy")
    assert [p.name for p in weights.cache_root().iterdir()] == [".lock"]


def test_server_errors_are_one_sentence(toy: Weight, server: Server) -> None:
    server.status = 404
    with pytest.raises(WeightsError, match=r"Cannot fetch .* 404"):
        weights.fetch("toy")
    assert len(server.asked) == 1


def test_endlessly_broken_connection_ends(toy: Weight, server: Server) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsError, match="Cannot fetch"):
        weights.fetch("toy")


def test_unwritable_cache_is_one_sentence(toy: Weight, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(places / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "file"))
    with pytest.raises(WeightsError, match="Cannot write"):
        weights.fetch("toy")


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
        File("det.onnx", "detector", 8, hashlib.sha256(b"detector").hexdigest()),
        File("rec.onnx", "face_embedder", 10, hashlib.sha256(b"recogniser").hexdigest()),
    )
    archive = File("pack.zip", "", len(server.content), hashlib.sha256(server.content).hexdigest(), server.url)
    weight = papers("toypack", *files, archive=archive, commercial=False)
    monkeypatch.setitem(WEIGHTS, "toypack", weight)
    return weight


def test_takes_only_the_wanted_files_out_of_a_zip(pack: Weight, places: Path) -> None:
    folder = weights.fetch("toypack")
    assert folder == weights.cache_root() / "toypack"
    everything = {str(p.relative_to(places)) for p in places.rglob("*") if p.is_file() and p.name != ".lock"}
    assert everything == {f"cache/faceshards/models/toypack/{name}.onnx" for name in ("det", "rec")}


def test_wrong_file_in_a_zip_is_not_installed(pack: Weight, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = File("rec.onnx", "face_embedder", 10, "0" * 64)
    monkeypatch.setitem(WEIGHTS, "toypack", papers("toypack", pack.files[0], wrong, archive=pack.archive))
    with pytest.raises(WeightsError, match=r"rec\.onnx in the archive"):
        weights.fetch("toypack")
    assert not (weights.cache_root() / "toypack" / "rec.onnx").exists()


def test_zip_without_the_file_is_one_sentence(places: Path) -> None:
    archive = put(places / "a.zip", zipped(**{"other.onnx": b""}))
    with pytest.raises(WeightsError, match=r"holds no det\.onnx"):
        downloads.unpack(archive, places / "out", {"det.onnx": ""})
    put(archive, b"no zip at all")
    with pytest.raises(WeightsError, match="Cannot unpack"):
        downloads.unpack(archive, places / "out", {"det.onnx": ""})


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


def test_pack_without_the_task_says_so(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    put(places / "auraface_glintr100.onnx", b"any")
    settings = ModelSettings(pack="auraface", paths={"auraface": str(places)})
    assert packs.pack_file("face_embedder", settings) == places / "auraface_glintr100.onnx"
    with pytest.raises(WeightsError, match=r"has no detector"):
        packs.pack_file("detector", settings)


def test_folder_with_known_names_is_not_opened(places: Path) -> None:
    for name in ("1k3d68.onnx", "aaa.onnx", "det_10g.onnx", "w600k_r50.onnx"):
        put(places / "pack" / name, b"not even ONNX")
    settings = ModelSettings(pack=str(places / "pack"))
    assert packs.pack_file("detector", settings).name == "det_10g.onnx"
    assert packs.pack_file("face_embedder", settings).name == "w600k_r50.onnx"


def test_folder_with_garbage_or_nothing_is_one_sentence(places: Path) -> None:
    (places / "pack").mkdir()
    with pytest.raises(WeightsError, match="holds no ONNX file for the detector"):
        packs.pack_file("detector", ModelSettings(pack=str(places / "pack")))
    put(places / "pack" / "a.onnx", b"garbage" * 9)
    with pytest.raises(WeightsError, match="is not an ONNX model"):
        packs.pack_file("detector", ModelSettings(pack=str(places / "pack")))


def test_broken_manifest_of_a_pack_is_one_sentence(places: Path) -> None:
    settings = ModelSettings(pack=str(places))
    put(places / "det_10g.onnx")
    put(places / "manifest.json", b'{"manifest_version": 1}')
    assert packs.pack_file("detector", settings).name == "det_10g.onnx"
    for broken in (
        b"{",
        b"[]",
        b'{"manifest_version": 2}',
        b'{"manifest_version": 2, "tasks": {"detection": {"file": "x"}}}',
    ):
        put(places / "manifest.json", broken)
        with pytest.raises(WeightsError, match=r"manifest\.json names"):
            packs.pack_file("detector", settings)


def test_unknown_file_of_a_folder_counts_as_non_commercial(places: Path, toy: Weight) -> None:
    put(places / "pack" / "det_10g.onnx", b"any")
    put(places / "pack" / "w600k_r50.onnx", CONTENT)
    settings = ModelSettings(pack=str(places / "pack"))
    assert not packs.pack_card("detector", settings).commercial
    assert packs.pack_card("detector", settings).name == "pack/det_10g.onnx"
    assert packs.pack_card("face_embedder", settings).commercial, "the sha256 is that of a free weight"


# --- licences and lists


def test_licence_gate() -> None:
    free = ModelCard("free", "detector", "", "MIT", True)
    bound = ModelCard("bound", "segmenter", "", "research only", False)
    weights.require_licences([free], ModelSettings())
    weights.require_licences([free, bound], ModelSettings(accept_noncommercial=True))
    with pytest.raises(WeightsError, match=r"bound \(research only\).*models\.accept_noncommercial=true"):
        weights.require_licences([free, bound], ModelSettings())


def test_listing_and_check_tell_the_state(toy: Weight, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(settings: ModelSettings) -> tuple[str, str]:
        listed = {row.weight.name: row.state for row in weights.listing(settings)}
        (checked,) = weights.check(settings, ["toy"])
        return listed["toy"], checked.state

    assert state(ModelSettings()) == ("missing", "missing")
    put(weights.cache_root() / "toy.bin", b"other")
    assert state(ModelSettings()) == ("found", "wrong sha256: toy.bin")
    put(weights.cache_root() / "toy.bin")
    assert state(ModelSettings()) == ("found", "verified")
    put(places / "mine.bin", b"other")
    given = ModelSettings(paths={"toy": str(places / "mine.bin")})
    assert state(given) == ("given", "given, wrong sha256: mine.bin")
