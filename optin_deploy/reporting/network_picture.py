"""A drawing of a network: its blocks from the input down, each group of units as a bar as long as its share of MACs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from optin_deploy.common.extras import require
from optin_deploy.files.storage import atomic_file
from optin_deploy.reporting.network_table import summary
from optin_deploy.reporting.score_table import shortened
from optin_deploy.structure.blocks import by_block
from optin_deploy.structure.groups import Layout, UnitGroup
from optin_deploy.structure.labels import KINDS
from optin_deploy.structure.shares import CostShares, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARK = "optin inspect"
"""Entry in the metadata of the file by which a picture of ours is recognised."""
HEAD_BYTES = 4096
DPI = 110
ROW_INCHES, COLUMN_INCHES = 0.21, 6.4
COLUMN_ROWS, MOST_COLUMNS = 56, 8
"""Rows of a column, until there are so many columns; then columns get longer."""
NAME_WIDTH, BAR_WIDTH = 0.46, 0.3
"""Shares of a column's width; the rest is for numbers."""
COLOURS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#999933", "#E69F00", "#009E73", "#CC79A7", "#D55E00"), strict=True))
"""Colours of the kinds, which colour-blind people can also tell apart (Okabe and Ito)."""
LONGEST_NAME, LONGEST_BLOCK = 44, 66
NOTE = "Bars and percentages: multiply-accumulates that would go with all units of a group."


@dataclass(frozen=True)
class Block:
    """Groups of one entry of a list of layers, or of one module."""

    name: str
    rows: tuple[tuple[str, UnitGroup], ...]
    """Names within the block, and groups."""
    alike: int = 1
    """So many blocks in a row that look the same; this is the first."""

    @property
    def form(self) -> tuple[tuple[str, str, int, int], ...]:
        """What makes two blocks look the same."""
        return tuple((name, group.kind, group.units, group.width) for name, group in self.rows)

    @property
    def height(self) -> int:
        """Rows that it takes, with one for its name."""
        return len(self.rows) + 1


def draw(layout: Layout, path: Path) -> None:
    """Write a PNG. Large networks are drawn in columns, from left to right, with blocks that look the same as one.

    Raises: MissingDependency.
    """
    require("matplotlib")
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    blocks = blocks_of(layout)
    if sum(block.height for block in blocks) > COLUMN_ROWS:
        blocks = joined(blocks)
    columns = list(_columns(blocks))
    height = max(1, *(sum(block.height for block in column) for column in columns))
    figure = Figure((COLUMN_INCHES * len(columns), ROW_INCHES * height + 1.1), dpi=DPI, layout="constrained")
    found = shares(layout)
    most = max((share.macs for share in found.values()), default=1) or 1
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes.set(xlim=(0, 1), ylim=(height, 0))
        axes.axis("off")
        _draw_column(axes, column, found, most)
    kinds = [kind for kind in KINDS if any(group.kind == kind for group in layout.groups)]
    _legend(figure.axes[0], kinds)
    figure.suptitle("\n".join((*summary(layout), NOTE)), fontsize=8, x=0.01, ha="left")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None, "Description": MARK})


def is_ours(path: Path) -> bool:
    """Is this a picture of an earlier `optin inspect`?"""
    with path.open("rb") as file:
        return MARK.encode() in file.read(HEAD_BYTES)


def blocks_of(layout: Layout) -> list[Block]:
    """Gather groups by the entry of a list of layers that they belong to, in the order of work."""
    return [
        Block(block, tuple((within, layout.by_name[name]) for within, name in inner))
        for block, inner in by_block(group.name for group in layout.groups).items()
    ]


def joined(blocks: Sequence[Block]) -> list[Block]:
    """Blocks in a row that look the same, as one."""
    return [
        Block(first.name, first.rows, 1 + len(others))
        for first, *others in (list(same) for _, same in groupby(blocks, key=lambda block: block.form))
    ]


def _columns(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    rows = sum(block.height for block in blocks)
    limit = max(COLUMN_ROWS, -(-rows // MOST_COLUMNS))
    column: list[Block] = []
    for block in blocks:
        if column and sum(each.height for each in column) + block.height > limit:
            yield column
            column = []
        column.append(block)
    yield column


def _draw_column(axes: Axes, blocks: Sequence[Block], found: dict[str, CostShares], most: float) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    y = 0
    for block in blocks:
        frame = FancyBboxPatch(
            (0.005, y + 0.12),
            0.985,
            block.height - 0.3,
            boxstyle="round,pad=0,rounding_size=0.012",
            mutation_aspect=14,
            facecolor="#f4f4f4",
            edgecolor="#bbbbbb",
            linewidth=0.6,
        )
        axes.add_patch(frame)
        more = f"   and {block.alike - 1} alike" if block.alike > 1 else ""
        axes.text(
            0.02,
            y + 0.55,
            f"{shortened(block.name, LONGEST_BLOCK)}{more}",
            va="center",
            fontsize=7.5,
            fontweight="bold",
        )
        for n, (name, group) in enumerate(block.rows):
            middle, share = y + n + 1.4, found[group.name].macs
            axes.text(
                0.04,
                middle,
                shortened(f"{name}: {group.kind}" if name else group.kind, LONGEST_NAME),
                va="center",
                fontsize=7,
            )
            axes.add_patch(Rectangle((NAME_WIDTH, middle - 0.28), BAR_WIDTH, 0.56, facecolor="#e4e4e4"))
            length = BAR_WIDTH * share / most
            axes.add_patch(Rectangle((NAME_WIDTH, middle - 0.28), length, 0.56, facecolor=COLOURS[group.kind]))
            units = f"{group.units:,}" + (f" × {group.width:,}" if group.width > 1 else "")
            axes.text(NAME_WIDTH + BAR_WIDTH + 0.015, middle, units, va="center", fontsize=7)
            axes.text(0.98, middle, f"{share:.1%}", va="center", ha="right", fontsize=7)
        y += block.height


def _legend(axes: Axes, kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=COLOURS[kind], label=kind) for kind in kinds]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=7, frameon=False, fontsize=7)
