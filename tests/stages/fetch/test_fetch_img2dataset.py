"""What the img2dataset engine relies on in img2dataset. A new release that breaks it has to be adapted to.

What it promises in short, as the native engine does; test_download and others have it in full, with -m long.
"""

import inspect
import tomllib
import urllib.request
from pathlib import Path

import pyarrow as pa
import pytest
import servers
from packaging.requirements import Requirement

from stages.base import DROP
from stages.download import Download
from stages.fetch.img2dataset import patched_downloader, urlopen
from stages.runtime import Runtime
from stages.settings import DownloadSettings, Settings

ADAPT = "img2dataset has changed: adapt stages/fetch/img2dataset.py, then its ceiling in pyproject.toml"


def test_its_download_function_wants_what_we_give_it():
    wants = list(inspect.signature(patched_downloader().download_image_with_retry).parameters)
    assert wants == ["row", "timeout", "retries", "user_agent_token", "disallowed_header_directives"], ADAPT


def test_it_reaches_the_network_by_the_one_name_that_is_ours():
    names = patched_downloader().download_image.__code__.co_names
    assert {"urllib", "request", "Request", "urlopen"} <= set(names), ADAPT
    assert not {"requests", "socket", "http", "httpx", "aiohttp", "urllib3"} & set(names), ADAPT
    assert patched_downloader().urllib.request.urlopen is urlopen
    assert urllib.request.urlopen is not urlopen, "the urllib of everybody else stays as it is"


def test_its_version_has_a_ceiling():
    project = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text())["project"]
    (wanted,) = (Requirement(line) for line in project["dependencies"] if Requirement(line).name == "img2dataset")
    assert any(each.operator.startswith("<") for each in wanted.specifier)


VERDICTS = {
    "/ok.jpg": None,
    "/chunked.jpg": None,
    "/hop1.jpg": None,
    "/small.jpg": "small_image",
    "/page.jpg": "not_an_image",
    "/endless.jpg": "too_many_bytes",
    "/empty.jpg": "empty_body",
    "/truncated.jpg": "incomplete_body",
    "/hangs-up.jpg": "connection_error",
    "/404.jpg": "not_found",
    "/500.jpg": "server_error",
    "/drips-body.jpg": "timeout",
    "/loop.jpg": "redirect_loop",
    "/to-file.jpg": "bad_url",
    "/to-private.jpg": "forbidden_address",
    "/to-private-name.jpg": "forbidden_address",
    "/noai.jpg": "opted_out",
    "/403.jpg": "access_denied",
    "/no.jpg": "robots_txt",
    "/to-no.jpg": "robots_txt",
}
REFUSED = ["/noai.jpg", "/403.jpg", "/to-private.jpg", "/to-private-name.jpg", "/no.jpg", "/to-no.jpg"]


@pytest.mark.parametrize("engine", ["native", "img2dataset"])
def test_in_short_both_engines_have_the_same_verdicts_and_heed_refusals(engine, server, names, monkeypatch):
    monkeypatch.setattr(names, "addresses", lambda host: ["10.0.0.1"])
    server.answers["/robots.txt"] = servers.says(body=b"User-agent: *\nDisallow: /no.jpg\n")
    server.answers["/to-no.jpg"] = servers.redirects("/no.jpg")
    told = {"engine": engine, "allow_loopback": True, "timeout_s": 0.7, "max_bytes": 2_000_000, "retries": 0}
    download = Download(Settings(download=DownloadSettings(**told, host_failures=0, per_host=32)), Runtime())
    for paths in (list(VERDICTS), REFUSED):
        urls = [server.url(path) for path in paths]
        table = pa.table({"url": urls, "image_ref": pa.nulls(len(urls), pa.string())})
        assert dict(zip(paths, download(table)[DROP].to_pylist(), strict=True)) == {
            path: VERDICTS[path] for path in paths
        }
    download.close()
    asked = {path: server.hits[path] for path in (*REFUSED, "/robots.txt")}
    assert asked == {**dict.fromkeys(REFUSED, 1), "/no.jpg": 0, "/to-no.jpg": 2, "/robots.txt": 1}
    assert set(names.tried) == {"127.0.0.1"}
