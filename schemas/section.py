"""The one base of all settings, of stages, datasets and training alike."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, and a field's docstring is its explanation.

    Numbers are finite: infinity is none in JSON, and few clocks take it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic takes for 0 and 1."""
        types = set(_types_in(cls.model_fields[str(info.field_name)].annotation))
        given = value if isinstance(value, list | tuple) else (value,)
        if {int, float} & types and bool not in types and any(isinstance(one, bool) for one in given):
            raise AssertionError("give a number")  # `explain` names the key
        return value


def _types_in(annotation: Any) -> Iterator[type]:
    """All types that an annotation is made of."""
    if isinstance(annotation, type):
        yield annotation
    for one in get_args(annotation):
        yield from _types_in(one)
