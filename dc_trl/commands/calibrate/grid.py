# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint on the sampler's grid means for a run: which floor will hold, and what rounding will lose."""

from dataclasses import dataclass

from dc_trl.commands.calibrate.scores import Mean

# Share of the weights from which a checkpoint counts as one that was published in this dtype. Published ones came to
# 1.0; ones trained in float32, to 0.00 and what is exactly 0 or 1.
ON_GRID = 0.9


@dataclass(frozen=True)
class Grid:
    """Where the weights lie, and how they come to the sampler.

    Attributes:
        share: of a sample of the weights that a cast to `dtype` leaves unchanged.
        dtype: the sampler's, or for quantised weights that of published checkpoints.
        rounding: `"dither"` or `"nearest"`, what `sync_rounding` comes to; None where nothing is rounded, as where
            the weights are trained in 16 bits.
        forward_rounds: whether the training forward multiplies with 16-bit roundings of the weights, and the sampler
            with none that are coarser.
        integers: whether the sampler's weights are integers.
    """

    share: float
    dtype: str
    rounding: str | None
    forward_rounds: bool
    integers: bool

    @property
    def loses_updates(self) -> bool:
        """Whether the trainer will learn what rounding keeps from the sampler."""
        small = self.share >= ON_GRID and self.rounding == "nearest"
        return small and not self.forward_rounds and not self.integers


def describe_grid(grid: Grid, floor: Mean, off_grid: Mean | None) -> str:
    """The two floors, and what will happen to them."""
    if grid.share < ON_GRID:
        return f"{grid.share:.1%} of the weights lie on the {grid.dtype} grid: the floor is that of the run."
    if grid.rounding is None or off_grid is None:
        return f"{grid.share:.1%} of the weights lie on the {grid.dtype} grid, and no sync will round them off it."
    words = (
        f"{grid.share:.1%} of the weights lie on the {grid.dtype} grid, as a published checkpoint's do. Floor at step "
        f"0 {floor.value:.3g} ± {floor.stderr:.1g}, off the grid {off_grid.value:.3g} ± {off_grid.stderr:.1g}."
    )
    if grid.rounding == "dither":
        return f"{words} The sync is dithered: the sampler follows from the first update."
    if grid.forward_rounds:
        return f"{words} Both engines round to nearest: they agree, and both lag behind what the optimizer holds."
    if grid.integers:
        return f"{words} The sync rounds to nearest: weights on a tie flip together, and move the sampler too far."
    return (
        f"{words} The sync rounds to nearest: updates smaller than half a grid step will not reach the sampler, and "
        "what it misses comes on top of either floor."
    )
