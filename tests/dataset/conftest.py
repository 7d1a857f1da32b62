from pathlib import Path

import pytest
from sample_runs import make, shared

from schemas.errors import ExitCode


@pytest.fixture(scope="session")
def whole(shared_folder) -> Path:
    """What an undisturbed run in one process makes of the sample, once for all; tests must not write to it."""
    out = shared_folder / "whole"
    with shared(shared_folder):
        if not (out / "README.md").exists():  # what a run writes last
            assert make(out)[0] is ExitCode.OK
    return out
