"""The settings of an OpenVINO graph, and which checkpoints can become one. Imports no torch: planning uses it."""

from typing import Annotated, Literal

from pydantic import Field

from compression.checkpoints.checkpoint import Checkpoint
from compression.settings import Settings
from export.checks import check_traceable, outer_types

StoredType = Literal["float32", "float16", "int8"]


class OpenvinoSettings(Settings):
    """In which types an OpenVINO graph stores its matrices. It computes in float32; norms and biases stay float32."""

    dtype: Annotated[StoredType, Field(description="Type of linear layers' weights; int8 has one scale per output channel.")] = "float32"
    embedding_type: Annotated[
        StoredType | None,
        Field(
            description="Of the token embedding; default: `dtype` where that is a float type, else the float type as wide as the checkpoint's."
        ),
    ] = None
    head_type: Annotated[StoredType | None, Field(description="As embedding_type, for the output head.")] = None

    def outer_types(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """Return the types of embedding and head."""
        own = "float32" if checkpoint.dtype in ("float32", "float64") else "float16"
        return outer_types(checkpoint, self, own if self.dtype == "int8" else self.dtype)


def check_openvino(checkpoint: Checkpoint, settings: OpenvinoSettings) -> None:
    """Raise Incompatible where `export_openvino` does not take this checkpoint with these settings; `key` names the parameter."""
    check_traceable(checkpoint, "the OpenVINO exporter")
    settings.outer_types(checkpoint)
