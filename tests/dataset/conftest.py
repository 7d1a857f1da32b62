from collections.abc import Iterator

import pytest
from sample_runs import remembered_pictures


@pytest.fixture(scope="session", autouse=True)
def _pictures_once() -> Iterator[None]:
    """Reports and runs show and write the same few pictures again and again."""
    with remembered_pictures():
        yield
