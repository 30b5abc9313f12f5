"""The base of every model that reads a part of a recipe. Imports no torch."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Values a person wrote: unknown keys are errors, and every number is finite (`.inf` and `.nan` would fail late or never).

    former_names  today's name of each key that was renamed, by its former one: a recipe that has that is refused with the new name
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    former_names: ClassVar[Mapping[str, str]] = {}
