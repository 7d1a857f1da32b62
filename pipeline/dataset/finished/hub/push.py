"""`push`: a finished dataset to the Hugging Face hub, gated by default, without anything of dropped photos.

The hub's copy is brought to what OUT is: shards that lie there as their manifests say are passed over, so the same call
goes on after any interruption, and what `forget` removed from OUT goes from the hub and its history.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.dataset.finished.hub.card import write_card
from pipeline.dataset.finished.hub.croissant import croissant
from pipeline.dataset.finished.report import REPORT, write_report
from pipeline.dataset.out.ledger import shards_folder
from pipeline.dataset.out.output import Output, is_whole
from pipeline.dataset.source.laion import OLD_LAION
from pipeline.shared.files import AnyPath, RemotePath
from pipeline.shared.readme import with_text_of
from schemas.digest import sha256
from schemas.errors import CorruptShardError, LostError, OutputError, first_line
from schemas.names import finished_shards
from schemas.shard import CARD, CROISSANT, DATASET, UNCONDITIONAL, Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)/?")
_SHARDS = 16
"""Per commit: the hub takes some 100 commits an hour."""
_REFUSED = (401, 403, 404)


def push(out: AnyPath, url: str, say: Callable[[str], None], *, gated: bool = True, private: bool = False) -> str:
    """Bring a dataset of the hub to what OUT is; returns the address of its page.

    Raises:
        OutputError: when OUT is no dataset, `url` is no dataset of the hub, or the hub does not let us.
        LostError: when the hub cannot be reached any more.
        CorruptShardError: when a shard is not what its manifest says.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    match = _URL.fullmatch(url)
    if match is None:
        raise OutputError(f"{url!r} is no dataset of the hub: give hf://datasets/OWNER/NAME.")
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise OutputError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, no URL of a hub: let it begin with https://.")
    shards_folder(out)
    repo, api = match[1], HfApi()
    with Output(out).locked(), TemporaryDirectory(prefix="faceshards-push-") as folder, _hub_errors(url):
        report = Path(folder) / REPORT
        counted = write_report(out, drops=False, target=report)
        if not counted.manifests:
            raise OutputError(f"{out} holds no finished shard yet: let `dataset` finish one.")
        about = write_card(out, counted)
        claimed = about.dataset.get("files", {}).get(UNCONDITIONAL)
        if claimed is not None and not is_whole(out / UNCONDITIONAL, claimed):
            raise CorruptShardError(f"{UNCONDITIONAL}: it is not what {DATASET} says, so nothing is sent")
        others = {name: (out / name).read_bytes() for name in (CARD, DATASET, UNCONDITIONAL) if (out / name).is_file()}
        if about.is_old_laion:
            say(f"WARNING: {OLD_LAION}")

        try:
            page = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        except ValueError as error:  # of a token or an address that is none, and of an answer that is no JSON
            raise OutputError(
                f"{url}: no hub answers; HF_TOKEN and HF_ENDPOINT say who asks whom ({first_line(error)})."
            ) from error
        # Before anything is there to be seen; what was there already would stay as open as it was.
        if gated or private:
            api.update_repo_settings(
                repo, repo_type="dataset", gated="manual" if gated else None, private=private or None
            )
        there, sent = _hashes(api, repo), 0
        if CARD in there:  # the hub's page lets its owner write into it
            fetched = Path(api.hf_hub_download(repo, CARD, repo_type="dataset", local_dir=folder))
            page_card, card = (data.decode("utf-8", "replace") for data in (fetched.read_bytes(), others[CARD]))
            others[CARD] = with_text_of(page_card, card).encode()
        missing = (one for one in counted.manifests if not _is_there(one, there))
        while batch := list(islice(missing, _SHARDS)):
            with ExitStack() as opened:
                files = [file for one in batch for file in _files(out, one, opened)]
                _commit(api, repo, files, f"{len(batch)} shards from {batch[0].shard} on")
            sent += len(batch)
            say(f"Shards sent: {sent:,}")
        others |= {CROISSANT: croissant(about, f"{page}/resolve/main/").encode(), REPORT: report.read_bytes()}
        _commit(api, repo, list(others.items()), "Card, Croissant and report")

        known = {one.shard for one in counted.manifests}
        if strange := set(finished_shards(path.partition("/")[2] for path in there)) - known:
            say(
                f"WARNING: shards that {out} has not stay ({len(strange):,}, such as {min(strange)}): readers get "
                "them too, the card does not count them, and `forget` does not reach them. Delete on its page "
                "what is not to be read."
            )
        current = set(_hashes(api, repo).values())
        listed = api.list_lfs_files(repo, repo_type="dataset")
        old = [one for one in listed if one.filename.startswith("shards/") and not current & {one.oid, one.file_oid}]
        if old:  # a take-down is none as long as earlier commits hold the photos
            api.super_squash_history(repo, repo_type="dataset")
            api.permanently_delete_lfs_files(repo, old, repo_type="dataset")
            say(f"{len(old):,} earlier files, and the history, are gone for good.")
    return str(page)


def _hashes(api: "HfApi", repo: str) -> dict[str, str]:
    """Path -> sha256 of the large files of the hub's copy; of small ones, some other hash."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, repo_type="dataset")
    files = (one for one in tree if isinstance(one, RepoFile))
    return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in files}


def _is_there(manifest: Manifest, there: Mapping[str, str]) -> bool:
    """Whether the hub's copy, of which these are the hashes, has a shard; another plan may give the same files."""
    text = manifest.to_json().encode()
    as_git = hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()
    return there.get(f"shards/{manifest.shard}.json") in (as_git, sha256(text)) and all(
        there.get(f"shards/{name}") == file["sha256"] for name, file in manifest.files.items()
    )


def _files(out: AnyPath, manifest: Manifest, opened: ExitStack) -> Iterator[tuple[str, Path | bytes]]:
    """Path there, and content, of a shard's files, which are whole; `opened` holds copies of remote ones.

    Raises:
        CorruptShardError: when one is not what the manifest says.
    """
    for name in (f"{manifest.shard}.tar", f"{manifest.shard}.parquet"):  # whatever else it may name
        path = out / "shards" / name
        if isinstance(path, RemotePath):
            copy = opened.enter_context(NamedTemporaryFile(prefix="faceshards-push-"))  # noqa: SIM115  # it is one
            with path.open() as stream:
                shutil.copyfileobj(stream, copy)
            copy.flush()
            path = Path(copy.name)
        if not is_whole(path, manifest.files.get(name, {})):
            raise CorruptShardError(f"{name}: it is not what its manifest says, so it is not sent")
        yield f"shards/{name}", path
    yield f"shards/{manifest.shard}.json", manifest.to_json().encode()


def _commit(api: "HfApi", repo: str, files: Iterable[tuple[str, Path | bytes]], message: str) -> None:
    """One commit of all files: readers see a shard whole or not at all."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path, content) for path, content in files]
    api.create_commit(repo, operations, commit_message=message, repo_type="dataset")


@contextmanager
def _hub_errors(url: str) -> Iterator[None]:
    """Turn what the hub's library raises into one sentence."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP client's
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (HFValidationError, OfflineModeIsEnabled) as error:
        raise OutputError(f"{url}: {first_line(error)}.") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last is what a failed upload becomes
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSED:
            raise OutputError(
                f"{url}: the hub does not let us write there ({first_line(error)}): log in by `hf auth login`, or set "
                "HF_TOKEN to a token that may."
            ) from error
        raise LostError(f"{url}: {first_line(error)}; what was sent stays there, and the same call goes on.") from error
