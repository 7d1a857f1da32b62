import errno

import pytest

from schemas.errors import RemoteError, first_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "No such file or directory: '/a'"),
        (OSError("footer is damaged.\nmore"), "footer is damaged"),
        (RemoteError("s3://bucket/a.tar: slow down"), "s3://bucket/a.tar: slow down"),
        (ValueError(" no number. "), "no number"),
        (TimeoutError(), "no answer in time"),
        (EOFError(), "EOFError"),
    ],
)
def test_what_a_sentence_has_of_an_error(error, words):
    assert first_line(error) == words
