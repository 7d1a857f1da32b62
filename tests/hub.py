"""A stand-in of the Hugging Face hub's HTTP API on loopback: what huggingface_hub asks of it to publish a dataset."""

import base64
import hashlib
import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_of_a_test"
LARGE = (".tar", ".parquet", ".safetensors")


class Hub(ThreadingHTTPServer):
    """One dataset, of whatever name; its commits are whole trees: path -> content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.settings: dict = {}
        self.commits: list[dict[str, bytes]] = []
        self.large: dict[str, bytes] = {}
        """sha256 -> content of what was put."""
        self.names: dict[str, str] = {}
        """sha256 -> path of large files, also of earlier commits."""
        self.asked: Counter[str] = Counter()
        self.refuse_commit: int | None = None
        """The commit to be answered by 500."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1] if self.commits else {}

    def commit(self, lines: list[dict]) -> None:
        tree = dict(self.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.large[value["oid"]]
                self.names[value["oid"]] = value["path"]
        self.commits.append(tree)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, content: object = None, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self) -> None:
        hub, path = self.server, unquote(self.path).partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = next((word for word in ENDPOINTS if word in path), "?")
        hub.asked[f"{self.command} {name}"] += 1
        if name not in ("/put/", "/resolve/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif name == "/put/":
            hub.large[hashlib.sha256(body).hexdigest()] = body
            self.answer()
        elif name == "/resolve/":
            self.answer(hub.files[path.partition("/resolve/main/")[2]])
        elif name == "/commit/" and len(hub.commits) == hub.refuse_commit:
            hub.refuse_commit = None
            self.answer({"error": "Internal Error"}, 500)
        elif name == "/commit/":
            hub.commit([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{hub.url}/datasets/ann/faces/commit/0", "commitOid": "0" * 40})
        else:
            self.answer(ENDPOINTS[name](hub, json.loads(body) if body else {}))

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815  # names that http.server looks for

    def log_message(self, format: str, *args: object) -> None:
        pass


def created(hub: Hub, wanted: dict) -> dict:
    if not hub.commits:  # of one that is there, only /settings changes who may read it
        hub.settings |= wanted
    hub.commits = hub.commits or [{".gitattributes": b"*.tar filter=lfs"}]
    return {"url": f"{hub.url}/datasets/ann/faces"}


def tree(hub: Hub, wanted: dict) -> list:
    entries = []
    for path, data in hub.files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if path.endswith(LARGE) else {}
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entries.append({"type": "file", "path": path, "size": len(data), "oid": oid, **lfs})
    return entries


def batch(hub: Hub, wanted: dict) -> dict:
    objects = []
    for one in wanted["objects"]:
        known = one["oid"] in hub.large
        put = {"actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}"}}}
        objects.append({**one, **({} if known else put)})
    return {"transfer": "basic", "objects": objects}


def squashed(hub: Hub, wanted: dict) -> None:
    hub.commits = [hub.files]


def deleted(hub: Hub, wanted: dict) -> None:
    for sha256 in wanted["deletions"]["sha"]:
        del hub.large[sha256], hub.names[sha256]


ENDPOINTS = {
    "/put/": None,
    "/resolve/": None,
    "/commit/": None,
    "/repos/create": created,
    "/settings": lambda hub, wanted: hub.settings.update(wanted),
    "/tree/": tree,
    "/validate-yaml": lambda hub, wanted: {"errors": [], "warnings": []},
    "/preupload/": lambda hub, wanted: {
        "files": [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for one in wanted["files"]
        ]
    },
    "/objects/batch": batch,
    "/super-squash/": squashed,
    "/lfs-files/batch": deleted,
    "/lfs-files": lambda hub, wanted: [
        {"fileOid": sha256, "filename": path, "oid": sha256, "pushedAt": "2026-01-01T00:00:00.000Z", "size": 1}
        for sha256, path in hub.names.items()
    ],
}
