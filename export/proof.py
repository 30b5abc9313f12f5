"""How far an artifact may be from the checkpoint it was made of, by what its exporter did to the weights. Imports no torch.

The bounds are judged from records like every other gate (tasks/measurement/gates.py), so another bound exports and measures nothing again.
"""

from collections.abc import Mapping
from typing import Literal

# What an exporter did to the weights; it decides how far the artifact may move from its parent.
Change = Literal["float", "int8", "int8-static", "int4", "carried"]

KL_TO_PARENT: Mapping[Change, float] = {
    "float": 1e-4,  # f32, f16, bf16: rounding of a float type
    "int8": 1e-2,  # q8_0, and int8 with ranges taken at run time
    "int8-static": 5e-2,  # int8 with ranges from calibration
    "int4": 1.5e-1,  # codes of up to 6 bits that the exporter rounded itself
    "carried": 1e-3,  # codes of a GPTQ or AWQ checkpoint, against that checkpoint
}
