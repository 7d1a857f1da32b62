"""Which column of a metadata file is which seed column.

Names are matched without regard to case, with `-` and blanks as `_`. Known sets: LAION-400M, laion2B-en,
laion-high-resolution, re-LAION, laion-coco, DataComp, COYO, PD12M, FaceCaption-15M, DiffusionDB, JourneyDB, what
img2dataset writes, and Hugging Face's imagefolder.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Literal

from schemas.errors import SourceError

Aliases = Mapping[str, tuple[str, ...]]
"""Seed column -> names it goes by; the first that a file has is taken."""

ALIASES: Aliases = {
    "url": ("url", "image_url", "img_url", "imageurl", "image_link"),
    # Further captions that a file has become text_alternatives.
    "text": (
        *("text", "caption", "txt", "alt_text", "alt", "captions", "prompt", "top_caption", "caption_en", "text_en"),
        *("long_caption", "short_caption", "laion_caption", "original_caption", "recaption", "re_caption"),
        *("blip_caption", "llava_caption", "cogvlm_caption", "all_captions", "description", "title", "p"),
    ),
    # Where both are given, width is what an earlier download stored and original_width what the URL delivers.
    "meta_width": ("original_width", "width", "image_width", "w"),
    "meta_height": ("original_height", "height", "image_height", "h"),
    "nsfw": ("nsfw", "nsfw_tag"),
    "punsafe": ("punsafe", "p_unsafe", "nsfw_score_opennsfw2", "nsfw_score", "nsfw_score_gantman", "image_nsfw"),
    "pwatermark": ("pwatermark", "p_watermark", "watermark_score"),
}

STORED_ALIASES: Aliases = {
    **ALIASES,
    "meta_width": ("width", "original_width"),
    "meta_height": ("height", "original_height"),
    "image_key": ("key", "__key__"),
}
"""The same for an existing download, where the size that counts is that of the stored file."""

FILE_NAMES = (
    *("file_name", "filename", "image_name", "img_path", "image_path"),
    *("image_file", "file_path", "filepath", "file"),
)
"""What a column of file names is called, also beside one of URLs."""

FILE_ALIASES: Aliases = {
    **{seed: names for seed, names in STORED_ALIASES.items() if seed != "image_key"},
    "source_file": (*FILE_NAMES, "img", "image", "path", *STORED_ALIASES["image_key"]),
}
"""The same for metadata of image files, which it names; a name without a suffix will do."""

MAPPED = {
    **{name: name for name in ("url", "text", "nsfw", "punsafe", "pwatermark", "image")},
    **{"width": "meta_width", "height": "meta_height", "file": "source_file"},
}
"""Key of `source.columns` -> seed column."""

ColumnKey = Literal["url", "text", "width", "height", "nsfw", "punsafe", "pwatermark", "image", "file"]


def mapped(aliases: Aliases, columns: Mapping[ColumnKey, str]) -> Aliases:
    """Aliases in which what `source.columns` names goes by that name alone."""
    return {**aliases, **{MAPPED[key]: (_normal(name),) for key, name in columns.items() if MAPPED[key] in aliases}}


def resolve(columns: Iterable[str], aliases: Aliases = ALIASES) -> dict[str, str]:
    """Seed column -> name of the file's column, for those that the file has; further captions are `text.1` and on."""
    by_alias: dict[str, str] = {}
    for column in columns:
        by_alias.setdefault(_normal(column), column)
    known = {seed: [by_alias[name] for name in names if name in by_alias] for seed, names in aliases.items()}
    further = {f"text.{number}": name for number, name in enumerate(known.get("text", ())[1:], 1)}
    return {seed: names[0] for seed, names in known.items() if names} | further


def _normal(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def require(path: str, columns: Sequence[str], chosen: Mapping[ColumnKey, str]) -> None:
    """Check that a file has the columns that `source.columns` names."""
    for key, name in chosen.items():
        if not resolve(columns, {key: (_normal(name),)}):
            near = get_close_matches(name, columns, n=1)
            hint = f", did you mean {near[0]}?" if near else f": it has {_shown(columns)}."
            raise SourceError(f"source.columns.{key} is {name!r}, which {path} does not have{hint}")


def require_url(
    path: str, columns: Sequence[str], aliases: Aliases = ALIASES, *, is_beside_images: bool = False
) -> None:
    if "url" in resolve(columns, aliases):
        return
    hint = "the first line of a csv or tsv must name the columns"
    if files := resolve(columns, {"file": FILE_ALIASES["source_file"]}):
        hint = f"if {files['file']} names files, give a folder in which it and they lie; if it holds URLs, "
        hint += f"--set source.columns.url={files['file']}"
    elif is_beside_images:
        hint = "nor one that names the images beside it: --set source.columns.file=… says which does, if any; "
        hint += "else move the table elsewhere"
    accepted = ", ".join(aliases["url"])
    raise SourceError(f"{path} has no URL column: it has {_shown(columns)}; accepted, in any case: {accepted}; {hint}.")


def _shown(columns: Sequence[str]) -> str:
    return (", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")) or "none"
