from pathlib import Path

import pytest
import sample_runs


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """What an undisturbed run in one process makes of the sample."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = sample_runs.make(out)
    assert done.returncode == 0, done.stderr
    return out
