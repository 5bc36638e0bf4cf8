"""The base of every nested group of settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


def without_empty_paths(given: Any, fields: Mapping[str, FieldInfo]) -> Any:
    """An empty path is one that is not set: as it is, it would be the folder that the process stands in."""
    if not isinstance(given, dict):
        return given
    paths = {name for name, field in fields.items() if field.annotation == Path | None}
    return {name: value for name, value in given.items() if value != "" or name not in paths}


class Section(BaseModel):
    """A nested group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, given: Any) -> Any:
        return without_empty_paths(given, cls.model_fields)
