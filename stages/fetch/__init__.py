"""Engines that fetch image files, one per file, behind the protocol in `stages.fetch.engine`."""

ENGINES: dict[str, str] = {
    "native": "stages.fetch.native:Native",  # asynchronous; stops at the header of an image that is too small
    "img2dataset": "stages.fetch.img2dataset:Img2dataset",  # img2dataset's own download function, in threads
}
"""settings.download.engine -> class, resolved lazily with pkgutil.resolve_name."""
