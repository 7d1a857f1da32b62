from types import SimpleNamespace

import pytest
from tiny_adapters import copy_of

from pipeline.train.base_model import Base


@pytest.fixture(scope="session", autouse=True)
def _no_collector():
    """A training ends with a look for garbage, which takes as long as its steps among all that the suite imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="module")
def loaded_once():
    """Within a module, a tiny base is read from its files once: trainings share the encoders, each has a UNet."""
    real, models = Base._model, {}

    def model(base, cls, part, dtype):
        if base.source.name not in ("tiny", "tiny-sdxl"):
            return real(base, cls, part, dtype)
        key = base.source.folder, part, dtype, base.device
        if key not in models:
            models[key] = real(base, cls, part, dtype)
        return copy_of(models[key]) if part == "unet" else models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "_model", model)
        yield


@pytest.fixture
def no_release(monkeypatch):
    """Trainings write checkpoints and metrics, but neither the released files nor a page, at which nobody looks."""
    monkeypatch.setattr("pipeline.train.loop.export", lambda *_: [])
    monkeypatch.setattr("pipeline.train.run_page.run_page.write_page", lambda run: run.root)
