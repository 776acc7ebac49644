# SPDX-License-Identifier: Apache-2.0
"""Where the loop of λ is stable: dual ascent against a plant whose answer is known.

The discrepancy answers a penalty late. The simplest plant with that property is of first order: after each batch the
mean discrepancy d moves a share `response` of the way to a level that falls with the λ of `delay` batches ago,

    d_{k+1} = d_k + response · (level_k − gain · λ_{k−delay} − d_k)
    λ_{k+1} = clip(λ_k + dual_lr · (d_k + noise − ε))

One number decides: the *loop gain* dual_lr · gain, by how much d would fall in the end for a λ that rises by dual_lr.
Writes the figure of docs/method.md and prints its numbers; takes seconds.

    python examples/closed_loop.py --output docs/images/closed_loop.png
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from dc_trl.dual import DualVariable

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

TOLERANCE = 0.005  # of the size of those in the paper
DELAYS = (0, 1, 4, 16)
# The largest loop gain that the paper's sizes allow: λ = 0.1 takes all of a mean discrepancy of 0.005, at dual_lr = 1.
PAPER_LOOP_GAIN = 0.05


@dataclass
class Plant:
    """What the discrepancy does.

    Args:
        response: share of the way to its level that d moves in a batch, in (0, 1].
        gain: by how much the level falls for each unit of λ, in units of d.
        delay: batches between a λ and the first update that it acts in.
        noise: standard deviation of a batch's mean about d, in units of d.
        floor: level below which no penalty brings d; the default is that there is none.
    """

    response: float
    gain: float
    delay: int = 0
    noise: float = 0.0
    floor: float = -math.inf


def poles(loop_gain: float, response: float, delay: int) -> np.ndarray:
    """Poles of the linear loop, unclipped: the roots of z^D (z − 1)(z − 1 + response) + response · loop_gain."""
    polynomial = np.zeros(delay + 3)
    polynomial[:3] = 1.0, response - 2.0, 1.0 - response
    polynomial[-1] += response * loop_gain
    return np.roots(polynomial)


def stability_limit(response: float, delay: int) -> float:
    """The loop gain above which the linear loop oscillates without end, by bisection."""
    low, high = 0.0, 4.0 / response
    for _ in range(60):
        middle = (low + high) / 2
        stable = np.abs(poles(middle, response, delay)).max() < 1.0
        low, high = (middle, high) if stable else (low, middle)
    return low


def ringing_limit(response: float) -> float:
    """The loop gain above which d overshoots the tolerance, without delay: where the two poles meet."""
    return response / 4


def simulate(
    plant: Plant, levels: Sequence[float], dual: DualVariable, *, tolerance: float = TOLERANCE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the loop with the library's own dual variable.

    Args:
        plant: what the discrepancy does.
        levels: of each batch, where d would go without a penalty.
        dual: λ; moved.
        tolerance: ε.
        seed: of the noise.

    Returns:
        d and λ of each batch, both of the length of `levels`.
    """
    noise = np.random.default_rng(seed).normal(0.0, plant.noise, len(levels))
    d = levels[0]
    discrepancies, multipliers = [], []
    for k, level in enumerate(levels):
        discrepancies.append(d)
        multipliers.append(dual.value)
        acting = multipliers[k - plant.delay] if k >= plant.delay else dual.init
        dual.step(max(d + noise[k], 0.0) - tolerance)
        target = max(level - plant.gain * acting, plant.floor)
        d = max(d + plant.response * (target - d), 0.0)
    return np.array(discrepancies), np.array(multipliers)


def disturbed(batches: int = 600) -> np.ndarray:
    """Levels of one story: calm below ε, a step to 2 ε, a drift on to 3 ε, and calm again."""
    level = np.full(batches, 0.8 * TOLERANCE)
    third = batches // 4
    level[third : 2 * third] = 2.0 * TOLERANCE
    level[2 * third : 3 * third] = TOLERANCE * np.linspace(2.0, 3.0, third)
    return level


def stories() -> Iterator[tuple[str, float, np.ndarray, np.ndarray]]:
    """The curves of the figure: name, loop gain, d in units of ε, λ; each with 10 % noise and a response of 1/20."""
    for name, loop_gain, dual_lr in (
        ("dual_lr 1", PAPER_LOOP_GAIN, 1.0),
        ("dual_lr 0.1", 0.1 * PAPER_LOOP_GAIN, 0.1),
        ("dual_lr 30", 30 * PAPER_LOOP_GAIN, 30.0),
    ):
        plant = Plant(response=0.05, gain=PAPER_LOOP_GAIN, delay=1, noise=0.1 * TOLERANCE)
        d, multiplier = simulate(plant, disturbed(), DualVariable(0.0, dual_lr, 1.0))
        yield name, loop_gain, d / TOLERANCE, multiplier


def draw(path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    times = np.geomspace(1.0, 100.0, 60)
    for delay in DELAYS:
        axes[0].loglog(times, [stability_limit(1 / time, delay) for time in times], label=f"delay {delay}")
    axes[0].loglog(times, [ringing_limit(1 / time) for time in times], "k:", label="overshoots above, delay 0")
    axes[0].axhspan(1e-4, PAPER_LOOP_GAIN, color="0.9", label="the defaults, at the paper's sizes")
    axes[0].set(
        xlabel="batches that the discrepancy takes to answer", ylabel="loop gain", title="stable below its line"
    )
    axes[0].set_ylim(1e-3, 4)
    axes[0].legend(fontsize=7, loc="lower left")
    for name, _, d, multiplier in stories():
        axes[1].plot(d, label=name, linewidth=1)
        axes[2].plot(multiplier, label=name, linewidth=1)
    axes[1].plot(disturbed() / TOLERANCE, "k:", linewidth=1, label="without penalty")
    axes[1].axhline(1.0, color="0.6", linewidth=0.8)
    axes[1].set(xlabel="batch", ylabel="mean discrepancy / tolerance", title="a step, a drift, and calm again")
    axes[2].set(xlabel="batch", ylabel="multiplier λ", title="the multiplier in it")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report() -> Iterator[str]:
    """The numbers that the page quotes, a line each."""
    for delay in DELAYS:
        limits = ", ".join(f"{stability_limit(1 / time, delay):.3g} at {time}" for time in (1, 10, 100))
        yield f"delay {delay:2}: the largest loop gain is {limits} batches of response"
    for name, loop_gain, d, multiplier in stories():
        late = d[240:300]
        yield (
            f"{name:12} (loop gain {loop_gain:.3g}): d/ε {late.mean():.2f} ± {late.std():.2f} in the last 60 batches "
            f"after the step, λ at most {multiplier.max():.2f}, and {multiplier[-1]:.2f} at the end"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("closed_loop.png"), help="the figure")
    args = parser.parse_args()
    draw(args.output)
    print("\n".join(report()))


if __name__ == "__main__":
    main()
