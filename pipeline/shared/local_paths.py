"""Files and folders that have to lie on this machine, as they are given on a command line."""

from pathlib import Path

from schemas.errors import OutputError


def local_path(word: str) -> Path:
    """The path on this machine that a word names.

    Raises:
        OutputError: when it is empty, as of a shell variable that is not set, or a URL, of which `Path` would make the
            folder `s3:` below the current one.
    """
    if not word:
        raise OutputError("The name of a folder is empty: give one, or `.` for the current folder.")
    word = word.removeprefix("file://")
    if "://" in word:
        raise OutputError(f"{word} is a URL: what is given here has to lie on this machine.")
    return Path(word)
