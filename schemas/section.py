"""The one base of all settings, of stages, datasets and training alike."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, and a field's docstring is its explanation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
