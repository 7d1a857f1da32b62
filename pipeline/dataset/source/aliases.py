"""Which column of a metadata file is which seed column.

Names are matched without regard to case, with `-` and blanks as `_`. Known sets: LAION-400M, laion2B-en,
laion-high-resolution, re-LAION, DataComp, COYO, PD12M, and what img2dataset writes.
"""

from collections.abc import Iterable, Mapping

from schemas.errors import SourceError

ALIASES: dict[str, tuple[str, ...]] = {
    "url": ("url", "image_url", "img_url", "imageurl", "image_link"),
    "text": ("text", "caption", "txt", "alt_text", "alt"),
    # Where both are given, width is what an earlier download stored and original_width what the URL delivers.
    "meta_width": ("original_width", "width", "image_width", "w"),
    "meta_height": ("original_height", "height", "image_height", "h"),
    "nsfw": ("nsfw", "nsfw_tag"),
    "punsafe": ("punsafe", "p_unsafe", "nsfw_score_opennsfw2", "nsfw_score", "nsfw_score_gantman"),
    "pwatermark": ("pwatermark", "p_watermark", "watermark_score"),
}
"""Seed column -> names it goes by; the first that a file has is taken."""

STORED_ALIASES = ALIASES | {
    "meta_width": ("width", "original_width"),
    "meta_height": ("height", "original_height"),
    "image_key": ("key", "__key__"),
}
"""The same for an existing download, where the size that counts is that of the stored file."""


def resolve(columns: Iterable[str], aliases: Mapping[str, tuple[str, ...]] = ALIASES) -> dict[str, str]:
    """Seed column -> name of the file's column, for those that the file has."""
    by_alias: dict[str, str] = {}
    for column in columns:
        by_alias.setdefault(column.strip().lower().replace("-", "_").replace(" ", "_"), column)
    known = {seed: [by_alias[name] for name in names if name in by_alias] for seed, names in aliases.items()}
    return {seed: names[0] for seed, names in known.items() if names}


def require_url(path: str, columns: Iterable[str]) -> None:
    """Check that a file has a column of URLs.

    Raises:
        SourceError: lists the file's columns and the accepted names.
    """
    columns = list(columns)
    if "url" not in resolve(columns):
        shown = ", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")
        accepted = ", ".join(ALIASES["url"])
        raise SourceError(f"{path} has no URL column: it has {shown or 'none'}; accepted, in any case: {accepted}.")
