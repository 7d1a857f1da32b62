"""What the img2dataset engine relies on in img2dataset. A new release that breaks it has to be adapted to."""

import inspect
import tomllib
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement

from stages.fetch.img2dataset import patched_downloader, urlopen

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
