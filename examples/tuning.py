# SPDX-License-Identifier: Apache-2.0
"""What tolerance, slack and `multiplier_max` do: one story of a discrepancy, told with four settings.

The discrepancy lies at its floor, below which no penalty brings it, grows to 2.5 times that for 200 batches, and falls
back. It answers a penalty as the plant of closed_loop.py does; λ is the library's own dual variable. A simulation:
that a policy answers so is not said here. Writes the figure of docs/tuning.md and prints its numbers; takes seconds.

    python examples/tuning.py --output docs/images/tuning.png
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from closed_loop import PAPER_LOOP_GAIN, Plant, simulate

from dc_trl.dual import DualVariable

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FLOOR = 0.004
BATCHES, GROWS, FALLS = 500, 100, 300
PLANT = Plant(response=0.05, gain=PAPER_LOOP_GAIN, delay=1, noise=0.05 * FLOOR, floor=FLOOR)


@dataclass
class Setting:
    """One column of the figure.

    Args:
        title: what is set, and what comes of it.
        slack: tolerance as a multiple of the floor.
        maximum: `multiplier_max`.
    """

    title: str
    slack: float
    maximum: float


SETTINGS = (
    Setting("defaults: slack 1.25\nλ works, then rests", 1.25, 1.0),
    Setting("tolerance below the floor\nλ climbs without end", 0.8, 1.0),
    Setting("slack 3\nλ never wakes: plain GRPO", 3.0, 1.0),
    Setting("multiplier_max 0.04\nλ is held, the discrepancy stays", 1.25, 0.04),
)


def levels() -> np.ndarray:
    """Where the discrepancy would go in each batch without a penalty."""
    level = np.full(BATCHES, FLOOR)
    level[GROWS:FALLS] = 2.5 * FLOOR
    return level


def run(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """The discrepancy, in units of the floor, and λ of each batch."""
    dual = DualVariable(0.0, 1.0, setting.maximum)
    d, multiplier = simulate(PLANT, levels(), dual, tolerance=setting.slack * FLOOR)
    return d / FLOOR, multiplier


def draw(path: Path) -> None:
    """Draws the discrepancy above and λ below, a column for each setting."""
    figure, axes = plt.subplots(2, len(SETTINGS), figsize=(12, 4.4), sharex=True, sharey="row", layout="constrained")
    for (above, below), setting in zip(axes.T, SETTINGS, strict=True):
        d, multiplier = run(setting)
        above.plot(levels() / FLOOR, "k:", linewidth=1, label="without penalty")
        above.plot(d, linewidth=1.2, label="with it")
        above.axhline(setting.slack, color="C1", linestyle="--", linewidth=1, label="tolerance")
        above.set_title(setting.title, fontsize=9)
        below.plot(multiplier, color="C2", linewidth=1.2)
        below.set_xlabel("batch")
    axes[0, 0].set(ylabel="mean discrepancy / floor", ylim=(0, 3.3))
    axes[0, 1].legend(fontsize=7, frameon=False, loc="upper right")
    axes[1, 0].set_ylabel("multiplier λ")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def report() -> Iterator[str]:
    """The numbers that the page quotes, a line each."""
    for setting in SETTINGS:
        d, multiplier = run(setting)
        late = d[FALLS - 60 : FALLS].mean() / setting.slack
        yield (
            f"{setting.title.replace(chr(10), ': ')}: d/ε {late:.2f} late in the disturbance, "
            f"λ {multiplier.max():.2f} at most, {multiplier[-1]:.2f} at the end"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tuning.png"), help="the figure")
    args = parser.parse_args()
    draw(args.output)
    print("\n".join(report()))


if __name__ == "__main__":
    main()
