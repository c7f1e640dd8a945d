"""``pyra visualize``: picture what merged in an image."""

from __future__ import annotations

from collections.abc import Sequence

from pyra.scripts.cli import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, draw, print a table and where the picture is."""
    from pyra.tasks.visualize import VisualizeOptions, visualize

    options = parse(
        VisualizeOptions,
        argv,
        prog="pyra visualize",
        description=(
            "Draw what merged in an image, layer by layer: patches in one token are outlined together and filled\n"
            "with their mean colour, patches that merged with no other show the image. Tokens that were dropped are\n"
            "drawn with the token that replaces them."
        ),
        example=(
            "pyra visualize photo.jpg --run runs/a --output groups.png\n"
            "  pyra visualize photo.jpg --backbone vit_small_patch14_dinov2 --rate 0.7 --output groups.png"
        ),
        positional="images",
    )
    from tabulate import tabulate

    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()
    drawn = visualize(options)
    rows = [
        (groups.layer, groups.tokens_in, groups.tokens_out, _range(groups.merged), _range(groups.largest))
        for groups in drawn.layers
    ]
    headers = ("layer", "tokens in", "tokens out", "groups of more than one patch", "largest group (patches)")
    print(tabulate(rows, headers=headers, numalign="right", stralign="right"))
    if drawn.prefix_tokens:
        print(f"prefix tokens (class, registers), which hold no patch and never merge: {drawn.prefix_tokens}")
    print(f"written to {options.output} ({drawn.picture.width} x {drawn.picture.height} pixels)")
    return 0


def _range(values: Sequence[int]) -> str:
    """Return the one value, or the smallest and the largest of several images."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
