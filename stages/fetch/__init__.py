"""Engines that fetch image files, one per file, behind the protocol in `stages.fetch.engine`.

Whatever is wrong with a URL is a `Dropped` in all of this; this machine's own trouble (no more files, ports or memory)
is an OSError.
"""

ENGINES: dict[str, str] = {
    "native": "stages.fetch.native:Native",  # asynchronous; stops at the header of an image that is too small
    "img2dataset": "stages.fetch.img2dataset:Img2dataset",  # img2dataset's own download function, in threads
}
"""settings.download.engine -> class, resolved lazily with pkgutil.resolve_name."""
