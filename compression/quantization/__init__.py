"""Post-training quantization of the linear layers of decoder blocks. Planning imports this module: no torch here."""

from compression.checkpoint import Checkpoint
from compression.errors import Incompatible

GROUP_SIZES = (16, 32, 64, 128, 256)


def check_group_size(checkpoint: Checkpoint, group_size: int, bits: int) -> None:
    """Refuse a group size that does not divide the input width of every linear layer, or widths whose codes do not fill whole 32-bit words.

    Raises Incompatible(key="group_size") naming the layer, its width and the group sizes that would divide all widths,
    Incompatible(key="bits") where a layer's codes cannot be packed.
    """
    widths = checkpoint.linear_widths()
    for layer, (out_features, in_features) in widths.items():
        if group_size < 1 or in_features % group_size:
            fitting = [size for size in GROUP_SIZES if all(inp % size == 0 for _, inp in widths.values())]
            raise Incompatible(
                f"group_size {group_size} does not divide {layer}, which is {in_features} wide; group sizes that divide every layer: "
                f"{', '.join(map(str, fitting)) or 'none of ' + ', '.join(map(str, GROUP_SIZES))}",
                key="group_size",
            )
        for width in (out_features, in_features):
            if width * bits % 32:
                raise Incompatible(
                    f"{bits}-bit codes of {layer} ({out_features} x {in_features}) do not fill whole 32-bit words; "
                    f"{width} x {bits} bits must be a multiple of 32",
                    key="bits",
                )
