"""Caption: tiny random models of transformers, and a loopback server that speaks, and misspeaks, chat completions."""

import base64
import functools
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fake_dataset as fake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_captioners
from sample_runs import DRAWN, make
from servers import BOMB

from pipeline.dataset.config import load_config
from pipeline.dataset.plan import make_plan
from pipeline.shared.tars import unpack
from schemas.columns import schema
from schemas.errors import ConfigError, ExitCode, LostError, PlanError, ShardError, WeightsError
from schemas.record import check
from stages.caption import endpoint
from stages.caption.stage import Caption
from stages.models.weights import unaccepted
from stages.pack import Pack
from stages.pixels.images import decode_jpeg
from stages.runtime import Runtime
from stages.settings import Settings

KEY = "sk-do-not-print"
ROWS = [fake.record("a", row) for row in range(3)]
ROWS[1] |= {"full": None}
ROWS[2] |= {"full": None, "half": None, "portrait": None}


def plan_of(*sets: str):
    return make_plan(load_config(None, list(sets), shards="sample"))


def captioned(settings: Settings) -> list[dict[str, Any]]:
    table = Caption(settings, Runtime())(pa.Table.from_pylist(ROWS, schema=schema(Caption.reads)))
    check(table, Caption.writes, "caption")
    return table.to_pylist()


class Folders(dict[str, str]):
    """A model of each kind, which is written when it is wanted."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, kind: str) -> str:
        self[kind] = str(tiny_captioners.write(self._root / kind, kind))
        return self[kind]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("captioners"))


def test_off_loads_nothing_and_is_no_part_of_the_plan():
    usual = plan_of()
    assert plan_of("caption.prompt=x", "caption.model=y", "caption.max_tokens=9").identity == usual.identity
    assert "caption" not in [*usual.identity["stages"], *usual.identity["settings"]]
    assert captioned(Settings()) == [dict.fromkeys(Caption.writes)] * 3


def test_the_plan_holds_the_weights_and_the_prompt_and_not_where_they_are(folders, tmp_path):
    plan = plan_of(f"models.captioner={folders['git']}")
    assert plan.identity["stages"][-2:] == ["caption", "pack"]
    assert [model["task"] for model in plan.model_list][-1] == "captioner"
    assert folders["git"] not in json.dumps(plan.identity)
    assert plan_of(f"models.captioner={folders['git']}", "caption.retries=0").digest == plan.digest
    assert plan_of(f"models.captioner={folders['git']}", "caption.prompt=x").digest != plan.digest
    other = tiny_captioners.write(tmp_path / "git", "git", seed=1)
    assert plan_of(f"models.captioner={other}").digest != plan.digest


@pytest.mark.parametrize(
    ("card", "licence", "refusals"),
    [
        ("---\nlicense: bsd-3-clause\n---\n", "bsd-3-clause", 0),
        ("---\nlicense: [cc-by-nc-4.0]\n---\n", "cc-by-nc-4.0", 2),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research", 2),
        ("license: mit", "not known", 2),
        ("---\nlicense: [mit\n---\n", "not known", 2),
    ],
)
def test_the_licence_of_a_folder_is_that_of_its_card(folders, tmp_path, card, licence, refusals):
    folder = shutil.copytree(folders["git"], tmp_path / "git")
    (folder / "README.md").write_text(card)
    refused = 0
    for profile in ("embedded", "permissive"):
        config = load_config(None, [f"models.captioner={folder}"], profile=profile)
        model = make_plan(config, dry_run=True).cards[-1]
        assert model.licence.startswith(licence)
        refused += bool(unaccepted([model], config.models))
    assert refused == refusals


@pytest.mark.parametrize("kind", ["git", pytest.param("llava", marks=pytest.mark.long)])
def test_a_model_by_folder_captions_each_photo_by_itself(folders, tmp_path, kind):
    settings = Settings(models={"captioner": folders[kind]}, caption={"max_tokens": 8, "prompt": "describe this a"})
    rows = captioned(settings)
    captions = [row["further_caption"] for row in rows]
    assert all(captions[:2])
    assert captions[0] != captions[1], "of full and of portrait"
    assert rows[2] == {"further_caption": None, "further_chars": 0}
    assert [row["further_chars"] for row in rows[:2]] == [len(caption) for caption in captions[:2]]
    assert captioned(settings) == rows
    model = Caption(settings, Runtime())._captioner
    pictures = [decode_jpeg(ROWS[0]["full"]), decode_jpeg(ROWS[1]["portrait"])]
    together = model.caption([*pictures, *pictures])
    assert together == [model.caption([picture])[0] for picture in [*pictures, *pictures]]
    if kind == "llava":
        template = shutil.copytree(folders[kind], tmp_path / kind) / "chat_template.jinja"
        template.write_text(f"{template.read_text()} <think>\n")  # so begin the answers of some models that think
        thinks = Settings(models={"captioner": str(template.parent)}, caption={"max_tokens": 8})
        assert [row["further_chars"] for row in captioned(thinks)] == [0] * 3, "it was cut off before its caption"
        assert "describe" not in captions[0], "the question is no part of the answer"
        asked = Settings(models={"captioner": folders[kind]}, caption={"max_tokens": 8, "prompt": "b c this"})
        assert captioned(asked) != rows


def test_a_further_caption_comes_after_those_that_were_there():
    row = {**ROWS[0], "text_alternatives": ["b"], "further_caption": "c"}
    packed = Pack(Settings(), Runtime()).row(dict.fromkeys(Pack.reads) | row)
    assert json.loads(packed["json"])["text_alternatives"] == ["b", "c"]


@pytest.mark.parametrize(
    ("sets", "error", "words"),
    [
        (["models.captioner=/nothing/there"], WeightsError, "neither a folder of transformers"),
        (["models.captioner=http://127.0.0.1:1/v1"], ConfigError, "caption.model"),
        (["models.captioner=http://me:secret@127.0.0.1/v1", "caption.model=m"], ConfigError, "api_key_env"),
        (["models.captioner=https://host/v1?key=secret", "caption.model=m"], ConfigError, "api_key_env"),
        (["models.captioner=ftp://host/v1", "caption.model=m"], ConfigError, "api_key_env"),
        (["caption.api_key_env=sk-123"], ConfigError, "api_key_env"),
    ],
)
def test_wrong_settings_are_one_sentence_without_secrets(sets, error, words):
    with pytest.raises(error, match=words) as caught:
        plan_of(*sets)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_key_that_is_not_there(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(PlanError, match="NO_SUCH_KEY"):
        plan_of("models.captioner=http://127.0.0.1:1/v1", "caption.model=m", "caption.api_key_env=NO_SUCH_KEY")
    with pytest.raises(PlanError, match="NO_SUCH_KEY"):
        captioned(settings_of("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY"))


Reply = tuple[int, dict[str, str], bytes]


def completion(content: str | None, finish_reason: str = "stop") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


GOOD = completion(" a photo\n of someone ")
REFUSAL = 400, {}, b'{"error": {"code": "content_filter", "message": "no"}}'
DEEP = 200, {}, b'{"choices":' + b"[" * 200_000
BAD: dict[str, Reply] = {
    "429": (429, {"Retry-After": "0"}, b""),
    "500": (500, {}, b"<html>"),
    "503 of a date": (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, b""),
    "no JSON": (200, {}, b"<html>busy</html>"),
    "deep JSON": DEEP,
    "another JSON": (200, {}, b'{"choices": [{"message": {"content": {"a": 1}}}]}'),
    "no choices": (200, {}, b'{"choices": []}'),
    "huge": (200, {}, GOOD[2] + b" " * (8 << 20)),
    "nothing": (200, {}, b""),
    "no UTF-8": (200, {}, GOOD[2].replace(b"photo", b"caf\xe9")),
    "a bomb": (200, {"Content-Encoding": "gzip"}, BOMB),
}


class Server:
    """Speaks chat completions; `reply` gives the answer to the n-th request, from 1, None for none at all."""

    def __init__(self) -> None:
        self.reply: Callable[[int], Reply | None] = lambda number: GOOD
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: Counter[str] = Counter()
        self.now = self.most = 0
        self.lock, self.over = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with outer.lock:
                    outer.requests.append(json.loads(body))
                    outer.headers.append(self.headers)
                    outer.paths[self.path] += 1
                    number = len(outer.requests)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                reply = outer.reply(number)
                time.sleep(0.02)
                with outer.lock:
                    outer.now -= 1
                if reply is None:
                    outer.over.wait(60)
                    return
                status, fields, content = reply
                self.send_response(status)
                for name, value in {**fields, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # who asked has had enough

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients that hang up are what is tested
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def chat(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "_BACKOFF_S", 0.01)
    monkeypatch.setenv("CAPTION_KEY", KEY)
    server = Server()
    yield server
    server.over.set()
    server.http.shutdown()
    server.http.server_close()


def shown(chat: Server, number: int) -> Any:
    """The picture of the n-th request."""
    url = chat.requests[number - 1]["messages"][0]["content"][0]["image_url"]["url"]
    return decode_jpeg(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))


def settings_of(url: str, **caption: Any) -> Settings:
    return Settings(models={"captioner": url}, caption={"model": "m", "retries": 2, **caption})


def test_an_endpoint_gets_the_picture_the_prompt_and_the_key(chat):
    rows = captioned(settings_of(chat.url, prompt="What?", max_side=64, api_key_env="CAPTION_KEY"))
    assert [row["further_caption"] for row in rows] == ["a photo of someone", "a photo of someone", None]
    assert chat.paths == {"/v1/chat/completions": 2}
    assert {headers["Authorization"] for headers in chat.headers} == {f"Bearer {KEY}"}
    for question in chat.requests:
        assert (question["model"], question["temperature"], question["max_tokens"]) == ("m", 0, 77)
        picture, text = question["messages"][0]["content"]
        assert text == {"type": "text", "text": "What?"}
        assert picture["type"] == "image_url"
    assert {max(shown(chat, number).shape) for number in (1, 2)} == {64}


@pytest.mark.parametrize("name", BAD)
def test_an_endpoint_that_fails_is_tried_again_and_then_fails_the_shard(chat, name):
    chat.reply = lambda number: BAD[name] if number <= 2 else GOOD
    assert captioned(settings_of(chat.url))[0]["further_chars"] == 18
    chat.reply = lambda number: BAD[name]
    with pytest.raises(ShardError, match="a rerun"):
        captioned(settings_of(chat.url, retries=0))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (None, r"0\.5 s are over"),
        ((429, {"Retry-After": "3600"}, b""), "HTTP 429"),
        ((401, {}, f"wrong key {KEY}".encode()), r"HTTP 401, wrong key \*\*\*"),
        ((404, {}, b"no\n\x1b[2Jmodel m" + b"!" * 9999), r"HTTP 404, no \[2Jmodel m!{170,180}\)"),
        ((307, {"Location": "/elsewhere"}, b""), "HTTP 307"),
    ],
)
def test_an_endpoint_that_will_not_do_is_given_up_at_once(chat, reply, words):
    chat.reply = lambda number: reply
    with pytest.raises((ShardError, LostError), match=words) as caught:
        captioned(settings_of(chat.url, timeout_s=0.5, api_key_env="CAPTION_KEY"))
    assert KEY not in str(caught.value)
    assert chat.paths == {"/v1/chat/completions": len(chat.requests)}
    assert len(chat.requests) <= 2, "one for each picture"


def test_a_server_that_is_not_there():
    with pytest.raises(ShardError, match="Cannot connect"):
        captioned(settings_of("http://127.0.0.1:1/v1", retries=0))


@pytest.mark.parametrize("reply", [completion(""), completion(None), completion("x", "content_filter"), REFUSAL])
def test_a_model_that_says_nothing_of_a_photo_leaves_it_without_a_further_caption(chat, reply):
    chat.reply = lambda number: reply
    assert captioned(settings_of(chat.url)) == [{"further_caption": None, "further_chars": 0}] * 3
    assert len(chat.requests) == 2


@pytest.mark.parametrize("status", [400, 403, 422])
def test_an_endpoint_that_refuses_one_photo_leaves_it_without_a_further_caption(chat, status):
    """It answers to a grey picture of that size: so it is the photo that it refuses, not all of them."""

    def reply(number: int) -> Reply:
        picture = shown(chat, number)
        is_portrait, is_grey = picture.shape[0] == picture.shape[1], (picture == 127).all()
        return (status, {}, b"flagged") if is_portrait and not is_grey else GOOD

    chat.reply = reply
    captions = [row["further_caption"] for row in captioned(settings_of(chat.url, max_side=64))]
    assert captions == ["a photo of someone", None, None]
    assert len(chat.requests) == 3


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("<think>A face?\n</think>\n\nA man.", "A man."),
        ("A face?</think>A man.", "A man."),
        ("<think>A face? Perhaps", ""),
        ("<think></think>A man.", "A man."),
        ("A man who wears a <think> badge.", "A man who wears a <think> badge."),
    ],
)
def test_what_a_model_thinks_before_it_answers_is_no_caption(chat, answer, caption):
    chat.reply = lambda number: completion(answer)
    assert captioned(settings_of(chat.url))[0]["further_caption"] == (caption or None)


def test_so_many_requests_at_a_time_and_no_more(chat):
    model = endpoint.Endpoint(settings_of(chat.url, concurrency=3), "cpu")
    pictures = [fake.drawn(64, 64, seed) for seed in range(12)]
    threads = [threading.Thread(target=model.caption, args=(pictures,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (chat.most, len(chat.requests)) == (3, 24)


def of_photos(chat: Server, folder: Path, *more: str) -> Callable[[], tuple[ExitCode, str]]:
    """A run of four photos of the sample in two shards, which has its captions from there."""
    folder.mkdir()
    for name in ("admiral.jpg", "close-up.jpg", "half-body.jpg", "tall.jpg"):
        (folder / name).write_bytes(DRAWN[name]())
    words = (f"models.captioner={chat.url}", "caption.model=m", "source.rows_per_shard=2", *more)
    return functools.partial(make, folder.parent / "out", *words, shards=str(folder), profile="embedded")


def test_a_run_with_an_endpoint_fails_whole_shards_and_a_rerun_finishes_them(chat, tmp_path):
    run = of_photos(chat, tmp_path / "photos", "caption.api_key_env=CAPTION_KEY", "caption.retries=0")
    chat.reply = lambda number: GOOD if number < 4 else BAD["500"]
    code, screen = run()
    assert code == ExitCode.SHARDS_FAILED
    assert "HTTP 500" in screen
    assert len(list((tmp_path / "out/shards").glob("*.json"))) == 1
    chat.reply = lambda number: completion(None) if number == 5 else GOOD
    code, again = run()
    assert code == ExitCode.OK
    tars = sorted((tmp_path / "out/shards").glob("*.tar"))
    jsons = [json.loads(sample.files["json"]) for tar in tars for sample in unpack(tar)]
    alternatives = Counter(str(content.get("text_alternatives")) for content in jsons)
    assert set(alternatives) == {"None", "['a photo of someone']"}
    card = (tmp_path / "out/README.md").read_text()
    assert "were written by m, which no one has checked" in card
    assert "further_caption" not in card, "json has them in text_alternatives"
    ledgers = [pq.read_table(path) for path in (tmp_path / "out/shards").glob("*.parquet")]
    chars = Counter(value for ledger in ledgers for value in ledger["further_chars"].to_pylist())
    assert chars[18] == alternatives["['a photo of someone']"]
    assert chars[0] == alternatives["None"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert KEY not in screen + again


WILL_NOT: dict[str, Reply] = {
    "HTTP 401, who?)": (401, {}, b"who?"),
    "HTTP 308, without a word)": (308, {"Location": "https://a/v1"}, b""),
    "HTTP 400, it sees no pictures)": (400, {}, b"it sees no pictures"),
    "HTTP 403, not for you)": (403, {}, b"not for you"),
    "HTTP 413, too large)": (413, {}, b"too large"),
}


@pytest.mark.parametrize("words", WILL_NOT)
def test_an_endpoint_that_will_answer_nothing_is_lost(chat, words):
    chat.reply = lambda number: WILL_NOT[words]
    with pytest.raises(LostError, match=rf"{re.escape(words)}.*caption\.api_key_env"):
        captioned(settings_of(chat.url))


def test_an_endpoint_that_is_lost_stops_the_run_at_its_first_photo(chat, tmp_path):
    chat.reply = lambda number: WILL_NOT["HTTP 401, who?)"]
    with pytest.raises(LostError, match="who"):
        of_photos(chat, tmp_path / "photos")()
    assert len(chat.requests) <= 2, "of the first shard"
    assert not list((tmp_path / "out/shards").glob("*.json"))
