from collections.abc import Iterator

import pytest
from sample_runs import no_report, remembered_pictures


@pytest.fixture(scope="session", autouse=True)
def _pictures_once() -> Iterator[None]:
    """Reports and runs show and write the same few pictures again and again."""
    with remembered_pictures():
        yield


@pytest.fixture
def pageless() -> Iterator[None]:
    """Runs write no report, which the test does not look at."""
    with no_report():
        yield
