"""The base of every model that reads a part of a recipe. Imports no torch."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Values a person wrote: unknown keys are errors, and every number is finite (`.inf` and `.nan` would run, and be found out late or never)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
