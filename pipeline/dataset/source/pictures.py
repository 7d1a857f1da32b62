"""Folders of images: a row per image file, with what metadata there says of it, or the files beside it.

Metadata are tables (`metadata.csv`, …) with a column that names files, JSON files that map names to records or list
such records, and `<name>.json`, `.txt` and `.caption` beside `<name>.jpg`. Names lead to files of the folder's listing
alone, so that none leads out of it; a link that does is left out.
"""

import json
import os
import posixpath
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.source.aliases import FILE_ALIASES, FILE_NAMES, Aliases, resolve
from pipeline.dataset.source.metadata_files import (
    BESIDE,
    IMAGE_SUFFIXES,
    PROBED,
    format_of,
    from_files,
    from_records,
    parse_record,
    probe,
    tables,
)
from pipeline.dataset.source.prompts import in_image
from pipeline.dataset.source.values import as_text, distinct, to_seeds
from pipeline.shared.files import is_local, open_binary, reading
from schemas.columns import SEED_SCHEMA
from schemas.errors import SourceError, first_line
from stages.fetch.stored import of_file, read_many

_ROWS = 1000
"""Images whose captions are read together."""
_BESIDE_BYTES = 1 << 20
_UNREAD = tuple(
    f".{suffix}"
    for suffix in ("dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2", "psd", "tga", "exr", "svg", "ico")
)
"""Suffixes of other images: cameras write theirs beside a JPEG, so that they are no rows, but said."""
_LISTS = ("metadata", "data", "meta_cap", "meta_lat", "captions", "prompts")
"""JSON files of these names, `data` of export-json, or that of their folder, of DiffusionDB, list the images there."""
_DESCRIBED = (
    *("url", "text", "text_alternatives", "broken", "meta_width", "meta_height"),
    *("nsfw", "punsafe", "pwatermark"),
)
"""Columns that metadata fills."""


def is_image(path: str) -> bool:
    return path.lower().endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES))


@dataclass(frozen=True)
class Pictures:
    """A folder of images as it was listed."""

    folder: str
    """Absolute path or fsspec URL, without a slash at its end."""
    files: Mapping[str, None]
    """Those below it, relative to it, as sorted keys; none with a dot before its name or that of a folder."""
    aliases: Aliases
    left_out: int = 0
    """Links that lead out of the folder or nowhere, pipes, devices."""

    @staticmethod
    def listed(folder: str, paths: Sequence[str], aliases: Aliases = FILE_ALIASES) -> "Pictures":
        """A folder, and the full paths of the files below it."""
        folder, inside = folder.rstrip("/"), paths
        if is_local(folder):
            root = f"{os.path.realpath(folder)}/"
            real = (path for path in paths if os.path.isfile(path))  # pipes and devices are none
            inside = [path for path in real if not os.path.islink(path) or os.path.realpath(path).startswith(root)]
        files = dict.fromkeys(one[len(folder) + 1 :] for one in inside)
        return Pictures(folder, files, aliases, len(paths) - len(inside))

    @cached_property
    def images(self) -> tuple[str, ...]:
        return tuple(filter(is_image, self.files))

    @cached_property
    def metadata(self) -> tuple[str, ...]:
        """The tables that name files; beside a column of URLs, a key alone does so in what img2dataset wrote."""
        folders, naming = set(map(posixpath.dirname, self.images)), []
        for file in filter(format_of, self.files):
            columns = resolve(probe(self._path(file))[0].names, {**self.aliases, "name": FILE_NAMES})
            is_sure = "name" in columns or "url" not in columns or posixpath.splitext(file)[0] in folders
            if "source_file" in columns and is_sure:
                naming.append(file)
        return tuple(naming)

    @cached_property
    def _lists(self) -> list[str]:
        """The JSON files that may list images."""
        jsons = [file for file in self.files if file.endswith(".json")]
        split = ((file, *self._path(file)[: -len(".json")].split("/")[-2:]) for file in jsons)
        return [file for file, folder, name in split if name in (*_LISTS, folder)]

    def keys(self) -> list[str]:
        """The columns and keys of its metadata; of files beside images those of the first ones."""
        names = [name for file in self.metadata for name in probe(self._path(file))[0].names]
        records = [record for file in self._lists for record in self._records(file)]
        beside = (f"{stem}.json" for image in self.images for stem in (posixpath.splitext(image)[0], image))
        contents = self._contents(list(islice(filter(None, map(self._file, beside)), PROBED)))
        records += [parse_record(content or b"") for content in contents]
        return list(dict.fromkeys([*names, *(key for record in records for key in record or ())]))

    def _path(self, file: str) -> str:
        return f"{self.folder}/{file}"

    def tables(self) -> Iterator[pa.Table]:
        """The rows in the order of the files' names, in tables of bounded size, under our names."""
        named = self.named
        for start in range(0, len(self.images), _ROWS):
            images = self.images[start : start + _ROWS]
            numbers = [named.rows.get(image, ()) for image in images]
            lacking = [index for index, image in enumerate(images) if image not in named.captioned]
            bare = [images[index] for index in lacking]
            prompt = partial(self._prompt, bare) if is_local(self.folder) else None  # of others it would fetch most
            beside = to_seeds(from_files(self._beside(bare), self.aliases, prompt))
            # First records of all images, second ones, …, what lies beside: of each column the first value counts.
            layers = [
                named.table.take(pa.array([own[depth] if depth < len(own) else None for own in numbers], pa.int64()))
                for depth in range(max(map(len, numbers)))
            ]
            at = {index: count for count, index in enumerate(lacking)}
            layers.append(beside.take(pa.array(map(at.get, range(len(images))), pa.int64())))
            columns = {name: pc.coalesce(*(layer[name] for layer in layers)) for name in _DESCRIBED}
            captions = (layer[name].to_pylist() for layer in layers for name in ("text", "text_alternatives"))
            columns["text"] = pa.array(map(distinct, zip(*captions, strict=True)), pa.list_(pa.string()))
            del columns["text_alternatives"]
            # A name that is no text (in another encoding than this system's) is shown as near as can be, and not read.
            shown = [as_text(image) for image in images]
            pairs = zip(shown, images, strict=True)
            refs = [of_file(self._path(one)) if one == image else of_file("") for one, image in pairs]
            yield pa.table({**columns, "source_file": pa.array(shown), "image_ref": pa.array(refs)})

    def _beside(self, images: Sequence[str]) -> Sequence[Mapping[str, bytes]]:
        """Of each image, suffix -> content of the files beside it that tell of it."""
        files = [
            (index, suffix, file)
            for index, image in enumerate(images)
            for suffix in BESIDE
            for name in (f"{posixpath.splitext(image)[0]}.{suffix}", f"{image}.{suffix}")
            if (file := self._file(name)) is not None
        ]
        samples: list[dict[str, bytes]] = [{} for _ in images]
        for (index, suffix, _), content in zip(files, self._contents([name for *_, name in files]), strict=True):
            if content is None:
                samples[index]["json"] = b""  # which is no record: whatever it holds is not passed over
            else:
                samples[index].setdefault(suffix, content)
        return samples

    def _prompt(self, images: Sequence[str], number: int) -> bytes:
        """What a local image says that it was made by; empty where it cannot be opened."""
        with suppress(OSError), Path(self._path(images[number])).open("rb") as opened:
            return in_image(opened)
        return b""

    def _file(self, name: str) -> str | None:
        """The file beside an image that has a name, however its accents and the case of its suffix are written."""
        if name in self.files:
            return name
        form = unicodedata.normalize("NFC", name)
        return form if form in self.files else self._otherwise.get(form)

    @cached_property
    def _otherwise(self) -> dict[str, str]:
        """NFC, with a suffix of BESIDE -> the name of a file that is written otherwise."""
        splits = ((file, *posixpath.splitext(file)) for file in self.files)
        forms = (
            (unicodedata.normalize("NFC", stem) + suffix.lower(), file)
            for file, stem, suffix in splits
            if suffix[1:].lower() in BESIDE
        )
        return {form: file for form, file in forms if form != file}

    def _contents(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Contents of small files; None for a local one that cannot be opened."""
        paths = [self._path(name) for name in names]
        for path, content in zip(paths, read_many(paths, _BESIDE_BYTES), strict=True):
            if isinstance(content, FileNotFoundError | PermissionError) and is_local(path):
                yield None
                continue
            with reading(path):
                if isinstance(content, Exception):
                    raise content
            yield content

    @cached_property
    def named(self) -> "Named":
        records, rows, count = [SEED_SCHEMA.empty_table()], defaultdict(list), 0
        captioned: set[str] = set()
        notes = (
            [f"{self.folder}: left out, as links that lead out of it or no files: {self.left_out:,}"]
            if self.left_out
            else []
        )
        if unread := sum(file.lower().endswith(_UNREAD) for file in self.files):
            notes.append(f"{self.folder}: left out, as files of cameras or drawings, which are not read: {unread:,}")
        if unnamed := sum(as_text(image) != image for image in self.images):
            notes.append(f"{self.folder}: images that are not read, as their names are no UTF-8: {unnamed:,}")
        for file in [*self.metadata, *self._lists]:
            first, names, hits = "", 0, 0
            for table in self._read(file):
                seeds = to_seeds(table, path=self._path(file))
                pairs = zip(seeds["source_file"].to_pylist(), seeds["text"].to_pylist(), strict=True)
                for number, (name, text) in enumerate(pairs, count):
                    first, names = first or name or "", names + 1
                    image = self._image(posixpath.dirname(file), name or "")
                    if image is not None:
                        hits += 1
                        rows[image].append(number)
                        captioned.update([image] if text else ())
                count += seeds.num_rows
                records.append(seeds)
            if first and not hits:
                raise SourceError(
                    f"{self._path(file)} names no file that lies in {self.folder}: the first is {first!r}."
                )
            if hits < names:
                notes.append(f"{self._path(file)}: of {names:,} rows, {names - hits:,} name no file that is there.")
        return Named(pa.concat_tables(records).select(_DESCRIBED).combine_chunks(), rows, captioned, tuple(notes))

    def _read(self, file: str) -> Iterator[pa.Table]:
        if file.endswith(".json"):
            yield from_records(self._records(file), self.aliases)
        else:
            yield from tables(self._path(file), self.aliases)

    def _records(self, file: str) -> list[dict[str, Any] | None]:
        """What a JSON file lists, or says of the names that it maps."""
        path = self._path(file)
        with reading(path), open_binary(path) as stream:
            data = stream.read()
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path} cannot be read: {first_line(error)}.") from error
        if isinstance(content, dict):
            content = [
                {"file_name": name, **(one if isinstance(one, dict) else {"text": one})}
                for name, one in content.items()
            ]
        return [one if isinstance(one, dict) else None for one in (content if isinstance(content, list) else ())]

    def _image(self, base: str, name: str) -> str | None:
        """The image that metadata in a folder means: right there, or the only one below it whose name ends so."""
        name, base, folder = posixpath.normpath(_normal(name)), _normal(base), f"{_normal(self.folder)}/"
        if name.startswith(folder):
            name, base = name.removeprefix(folder), ""
        path = posixpath.normpath(posixpath.join(base, name))
        exact = bisect_left(self._by_form, (path,))
        for form, image in self._by_form[exact : exact + 1]:
            if form == path:
                return image
        # A thousand folders may each have an `01.jpg`: those that end so, or those below, whichever are fewer.
        below = f"{base}/" if base else ""
        sides = ((self._by_end, _reversed(name)), *([(self._by_form, below)] if base else []))
        pairs, at = min(((pairs, _starting(pairs, start)) for pairs, start in sides), key=lambda side: len(side[1]))
        meant = (
            image
            for form, image in ((_normal(image), image) for _, image in map(pairs.__getitem__, at))
            if form.startswith(below)
            and any(f"/{end}".endswith(f"/{name}") for end in (form, posixpath.splitext(form)[0]))
        )
        two = list(islice(meant, 2))
        return two[0] if len(two) == 1 else None

    @cached_property
    def _by_form(self) -> Sequence[tuple[str, str]]:
        """Normal forms of images' names, sorted, and these names."""
        return sorted((_normal(image), image) for image in self.images)

    @cached_property
    def _by_end(self) -> Sequence[tuple[str, str]]:
        """The same with the last part of the name first; also without the suffix."""
        ends = ((end, image) for form, image in self._by_form for end in (form, posixpath.splitext(form)[0]))
        return sorted((_reversed(end), image) for end, image in ends)


def _reversed(name: str) -> str:
    """`b/c/`, of `c/b`."""
    return "".join(f"{part}/" for part in reversed(name.split("/")))


def _starting(pairs: Sequence[tuple[str, str]], start: str) -> range:
    """Numbers of those of sorted pairs that begin with a text, which ends with a slash."""
    return range(bisect_left(pairs, (start,)), bisect_left(pairs, (f"{start[:-1]}0",)))  # `0` comes after the slash


def _normal(name: str) -> str:
    """As one writes names of files: some systems take accents apart."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


@dataclass(frozen=True)
class Named:
    table: pa.Table
    """A row per record."""
    rows: Mapping[str, Sequence[int]]
    """Image -> numbers of its rows."""
    captioned: Set[str]
    """Images of which a record has a caption."""
    notes: tuple[str, ...]
    """What was left out."""
