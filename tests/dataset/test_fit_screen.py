"""`python -m pipeline screen`: what it needs, and what it says."""

import heif
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from schemas.errors import SourceError, WeightsError

WITH_FIQA = ["--set", "filter.min_fiqa=0.5", "--set", "models.fiqa=ediffiqa-t"]


@pytest.mark.parametrize(
    ("more", "count"),
    [(WITH_FIQA, 8), *(pytest.param(more, None, marks=pytest.mark.long) for more in ([], WITH_FIQA))],
)
def test_a_screen_is_fitted_with_a_detector_and_no_other_weights(data, labels, tmp_path, more, count):
    """Labelled photos: the screen loses none of those that are kept."""
    for row in labels[:count]:
        (tmp_path / row["file"]).symlink_to(data / "photos" / row["file"])
    kept = sum(row["expected"] == "keep" for row in labels[:count])
    assert 5 <= kept < len(labels[:count])
    words = ["screen", str(tmp_path), "--set", f"models.pack={data / 'models' / 'real'}", *more]
    done = CliRunner().invoke(app, [*words, "--set", "models.accept_noncommercial=true"])
    assert done.exit_code == 0, done.output
    assert f"the full look keeps {kept}" in done.stdout
    assert "models.screen_thresh=" in done.stdout


def test_photos_are_what_a_run_takes_for_such(data, tmp_path):
    (tmp_path / "photo.HEIC").write_bytes(heif.UPRIGHT)  # too small for either look
    (tmp_path / "folder.jpg").mkdir()
    words = ["screen", str(tmp_path), "--set", f"models.pack={data / 'models' / 'real'}"]
    done = CliRunner().invoke(app, [*words, "--set", "models.accept_noncommercial=true"])
    assert isinstance(done.exception, SourceError)
    assert str(done.exception).startswith("None of the photos is kept")


def test_a_screen_needs_a_folder_before_it_needs_weights(tmp_path):
    done = CliRunner().invoke(app, ["screen", str(tmp_path / "none")])
    assert isinstance(done.exception, SourceError)
    assert str(done.exception) == f"{tmp_path / 'none'} is no folder: give one of photos."
    (tmp_path / "some").mkdir()
    wants_weights = CliRunner().invoke(app, ["screen", str(tmp_path / "some"), "--set", "models.pack=buffalo_sc"])
    assert isinstance(wants_weights.exception, WeightsError)
    assert "clip" not in str(wants_weights.exception)
