"""`push`, against a stand-in of the hub's HTTP API."""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import fake_dataset as fake
import fsspec
import hub as stand_in
import pytest
from huggingface_hub import constants
from rich.console import Console

from pipeline.dataset.finished.forget import forget
from pipeline.dataset.finished.hub.push import push
from pipeline.dataset.job import Job, make_dataset
from pipeline.dataset.out.ledger import Funnel, funnel, read_ledger, read_manifest, read_manifests, shard_names
from pipeline.dataset.out.output import Output
from pipeline.shared.files import RemotePath
from schemas.errors import CorruptShardError, ExitCode, LostError, OutputError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's

NAME = "hf://datasets/ann/faces"


@pytest.fixture
def hub(monkeypatch) -> Iterator[stand_in.Hub]:
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with stand_in.Hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of five shards, with all that a run writes at its end."""
    rows = {
        f"a-0000{n}": [fake.record("a", 2 * n), fake.dead("a", 2 * n + 1, "download", "not_found")] for n in range(5)
    }
    made = fake.write(tmp_path_factory.mktemp("small") / "out", rows)
    assert make_dataset(Job(fake.plan(), ()), made, Console(quiet=True)) is ExitCode.OK
    return made


@pytest.fixture
def out(small, tmp_path, monkeypatch):
    """Whose page nobody looks at."""

    def write_report(out, *, drops, target):
        target.write_text("a page")
        return funnel(out)

    monkeypatch.setattr("pipeline.dataset.finished.hub.push.write_report", write_report)
    return shutil.copytree(small, tmp_path / "out")


def test_a_pushed_dataset_is_gated_and_loads_and_shows_nothing_of_dropped_photos(whole, hub, tmp_path):
    out, said = shutil.copytree(whole, tmp_path / "out"), list[str]()
    assert push(out, NAME, said.append) == f"{hub.url}/datasets/ann/faces"
    assert hub.settings["gated"] == "manual"
    assert hub.settings.get("visibility") != "private"
    names = {"README.md", "croissant.json", "dataset.json", "report.html", "unconditional.safetensors"}
    shards = {f"shards/{one}.{end}" for one in shard_names(out) for end in ("tar", "parquet", "json")}
    assert set(hub.files) == names | shards | {".gitattributes"}
    for path in ("dataset.json", *shards):
        assert hub.files[path] == (out / path).read_bytes()
    page = hub.files["report.html"].decode()
    rows = [row for one in shard_names(out) for row in read_ledger(out, one, ["url", "verdict"]).to_pylist()]
    kept = {row["url"] for row in rows if row["verdict"] == "kept"}
    dropped = {row["url"] for row in rows} - kept - {None, ""}
    assert any(url in page for url in kept)
    assert any(url in (out / "report.html").read_text() for url in dropped)
    assert not [url for url in dropped if url in page]
    first = json.loads(hub.files["croissant.json"])["distribution"][0]
    assert first["contentUrl"] == f"{hub.url}/datasets/ann/faces/resolve/main/shards/{first['@id']}"
    copy = tmp_path / "copy"
    for path, data in hub.files.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(data)
    import datasets

    rows = datasets.load_dataset(str(copy), split="train", streaming=True)
    assert len(list(rows)) == sum(one.kept for one in read_manifests(out))


def test_a_push_that_broke_off_goes_on_with_what_is_missing(out, hub, monkeypatch):
    monkeypatch.setattr("pipeline.dataset.finished.hub.push._SHARDS", 2)
    hub.refuse_commit = 3
    with pytest.raises(LostError, match=f"{NAME}: .*what was sent stays there"):
        push(out, NAME, print)
    there = {path for path in hub.files if path.endswith(".tar")}
    assert len(there) == 4
    assert all({path.replace(".tar", end) for end in (".parquet", ".json")} <= set(hub.files) for path in there)
    hub.asked.clear()
    sent = len(hub.large)  # those of the commit that failed are among them
    assert sent > len({hub.files[path] for path in hub.files if path.endswith(stand_in.LARGE)})
    push(out, NAME, print)
    assert {path for path in hub.files if path.endswith(".tar")} > there
    assert hub.files["README.md"]
    assert hub.asked["PUT /put/"] == len(hub.large) - sent > 0
    hub.asked.clear()
    commits = len(hub.commits)
    push(out, NAME, print)
    assert not hub.asked["PUT /put/"]
    assert len(hub.commits) == commits + 1  # the card


def test_an_address_of_a_hub_that_is_none(out, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example.com")
    with pytest.raises(OutputError, match="HF_ENDPOINT is 'hub"):
        push(out, NAME, print)


def test_a_manifest_of_another_plan_replaces_the_one_there_though_the_files_are_the_same(out, hub):
    """As --replan with a threshold that parts no row writes it: the copy would contradict its dataset.json."""
    push(out, NAME, print)
    shard, hub.asked = shard_names(out)[0], Counter()
    manifest = out / "shards" / f"{shard}.json"
    manifest.write_text(replace(read_manifest(out, shard), plan_digest="0" * 64).to_json())
    said: list[str] = []
    push(out, NAME, said.append)
    assert hub.files[f"shards/{shard}.json"] == manifest.read_bytes()
    assert (said, hub.asked["PUT /put/"]) == (["Shards sent: 1"], 0)


def test_a_page_that_asks_for_a_login_is_no_hub(out, hub, monkeypatch):
    monkeypatch.setitem(stand_in.ENDPOINTS, "/repos/create", lambda hub, wanted: b"<html>Welcome to our WLAN</html>")
    with pytest.raises(OutputError, match=f"{NAME}: no hub answers; .*HF_ENDPOINT"):
        push(out, NAME, print)


def test_what_is_forgotten_goes_from_the_hub_and_its_history(out, hub):
    push(out, NAME, print)
    shard = next(name for name in shard_names(out) if read_ledger(out, name, ["url"], "kept").num_rows)
    before = (out / "shards" / f"{shard}.tar").read_bytes()
    url = read_ledger(out, shard, ["url"], "kept")["url"][0].as_py()
    forget(out, urls=(url,))
    push(out, NAME, print)
    everything = [*hub.large.values(), *(data for commit in hub.commits for data in commit.values())]
    assert before not in everything
    assert not [data for data in everything if url.encode() in data]
    assert hub.files[f"shards/{shard}.tar"] == (out / "shards" / f"{shard}.tar").read_bytes()
    assert len(hub.commits) == 1


def test_a_shard_that_is_damaged_is_not_sent(out, hub):
    tar = sorted((out / "shards").glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptShardError, match=tar.name):
        push(out, NAME, print)
    assert not [path for path in hub.files if path.endswith("tar")]


def test_a_dataset_behind_a_url_is_pushed_alike(out, hub, tmp_path):
    there = RemotePath(f"memory:/{tmp_path}")
    fsspec.filesystem("memory").put(f"{out}/", f"{tmp_path}/", recursive=True)
    push(there, NAME, print, gated=False, private=True)
    for path in (out / "shards").iterdir():
        assert hub.files[f"shards/{path.name}"] == path.read_bytes()
    assert hub.settings["visibility"] == "private"
    assert "gated" not in hub.settings


def test_a_copy_that_all_may_read_becomes_private(out, hub):
    push(out, NAME, print)
    push(out, NAME, print, private=True)
    assert hub.settings["visibility"] == "private"


def test_what_the_owner_wrote_into_the_card_on_its_page_stays(out, hub):
    push(out, NAME, print)
    hub.files["README.md"] += "\nCollected in Iași: ask ann.\n".encode()
    push(out, NAME, print)
    assert hub.files["README.md"].decode().endswith("\nCollected in Iași: ask ann.\n")
    with (out / "README.md").open("a") as card:
        card.write("\nAsk bob.\n")
    push(out, NAME, print)
    assert hub.files["README.md"].decode().endswith("-->\n\nAsk bob.\n")  # what OUT's copy says counts


def test_shards_of_another_dataset_stay_and_that_is_said(out, hub, tmp_path):
    push(out, NAME, print)
    other = shutil.copytree(out, tmp_path / "other")
    for path in (other / "shards").glob(f"{max(shard_names(other))}.*"):
        path.unlink()
    said: list[str] = []
    push(other, NAME, said.append)
    assert f"shards/{max(shard_names(out))}.tar" in hub.files
    assert [line for line in said if line.startswith("WARNING") and f"(1, such as {max(shard_names(out))})" in line]


@pytest.mark.parametrize(
    ("url", "token", "says"),
    [
        ("ann/faces", stand_in.TOKEN, "give hf://datasets/OWNER/NAME"),
        ("hf://datasets/faces", stand_in.TOKEN, "give hf://datasets/OWNER/NAME"),
        ("hf://datasets/ann/fa--ces", stand_in.TOKEN, "fa--ces"),
        (NAME, "hf_wrong", "hf auth login"),
        (NAME, "hf_wröng", "HF_TOKEN"),
    ],
)
def test_what_cannot_be_pushed_is_one_sentence(out, hub, monkeypatch, url, token, says):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=says) as caught:
        push(out, url, print)
    assert "\n" not in str(caught.value)
    assert not hub.commits


def test_features_of_no_face_that_are_not_those_of_dataset_json_are_not_sent(out, hub):
    (out / "unconditional.safetensors").unlink()
    (out / "unconditional.safetensors").mkdir()
    with pytest.raises(CorruptShardError, match=r"it is not what dataset\.json says, so nothing is sent"):
        push(out, NAME, print)
    assert not hub.commits


def test_manifests_are_read_while_no_other_run_writes_them(out, monkeypatch):
    def read(out, **words):
        with pytest.raises(OutputError, match="Another run is writing"), Output(out).locked():
            pass
        return Funnel((), 0, ())

    monkeypatch.setattr("pipeline.dataset.finished.hub.push.write_report", read)
    with pytest.raises(OutputError, match="holds no finished shard yet"):
        push(out, NAME, print)
