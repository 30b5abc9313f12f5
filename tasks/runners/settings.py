"""`execution:` of a recipe: where jobs run, and how much may run at once. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compression.settings import Settings

_BELONGS_TO = {"address": "dask", "pool": "prefect"}


class ExecutionSettings(Settings):
    """How a recipe's stages are executed; outside every identity."""

    model_config = ConfigDict(validate_default=True)

    runner: Literal["local", "dask", "prefect"] = Field(
        default="local", description="Where stages work: on this machine, on a Dask cluster, or on the workers of a Prefect work pool."
    )
    address: str | None = Field(
        default=None, description="With `runner: dask`: the scheduler (tcp://host:8786).", examples=["tcp://host:8786"]
    )
    pool: str | None = Field(default=None, description="With `runner: prefect`: the work pool.")
    cores: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Cores that stages on this machine may use together. Default: all of the machine."
    )
    memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Memory that stages on this machine may take together, by the plan's estimate; a larger stage runs alone. Default: all of the machine.",
    )

    @field_validator("address", "pool", mode="after")
    @classmethod
    def _as_the_runner_needs(cls, value: Any, info: ValidationInfo) -> Any:
        runner = info.data.get("runner")
        owner = _BELONGS_TO[str(info.field_name)]
        if runner == owner and value is None:
            example = "the scheduler, as `address: tcp://host:8786`" if owner == "dask" else "a work pool, as `pool: NAME`"
            raise PydanticCustomError("missing_address", f"`runner: {owner}` needs {example}; edgepress starts no cluster of its own")
        if runner is not None and runner != owner and value is not None:
            raise PydanticCustomError("wrong_runner", f"this belongs to `runner: {owner}`, and the runner is {runner}")
        return value

    @field_validator("address", mode="after")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(tcp|tls|ucx|ws|wss)://\S+:\d+", value):
            raise PydanticCustomError("wrong_address", f"{value!r} is not the address of a Dask scheduler (tcp://host:8786)")
        return value
