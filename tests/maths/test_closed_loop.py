# SPDX-License-Identifier: Apache-2.0
"""The loop of λ against a plant of first order: where it settles, where it does not, and that it does not wind up."""

import sys

import numpy as np
import pytest
from example_scripts import load_example

from dc_trl.dual import DualVariable

loop = load_example("closed_loop")


def settle(loop_gain: float, response: float, delay: int, batches: int, start: float = 0.5) -> np.ndarray:
    """d − ε from d = 1.5 ε and λ = `start` on; the equilibrium is λ = 0.5, far from either end of its range."""
    tolerance, gain = 1.0, 1.0
    dual = DualVariable(start, loop_gain, 1.0)
    plant = loop.Plant(response, gain, delay)
    d, _ = loop.simulate(plant, np.full(batches, tolerance + 0.5), dual, tolerance=tolerance)
    return d - tolerance


def test_without_delay_the_limit_is_a_loop_gain_of_one() -> None:
    # z² − (2 − r) z + 1 − r + r·g has its product of roots at 1, the end of stability, where g = 1.
    for response in (1.0, 0.3, 0.01):
        assert loop.stability_limit(response, 0) == pytest.approx(1.0, rel=1e-6)


def test_an_immediate_answer_with_a_delay_of_one() -> None:
    # z (z − 1) z + g = 0 has roots on the unit circle at g = 2 sin(π/10).
    assert loop.stability_limit(1.0, 1) == pytest.approx(2 * np.sin(np.pi / 10), rel=1e-6)


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("response", [1.0, 0.2])
def test_the_limit_is_where_the_simulation_stops_settling(response: float, delay: int) -> None:
    limit = loop.stability_limit(response, delay)
    below = np.abs(settle(0.8 * limit, response, delay, 600))
    above = np.abs(settle(1.2 * limit, response, delay, 600))
    assert below[-50:].max() < 1e-3 * below.max()
    assert above[-50:].max() > 0.1


def test_slow_gains_settle_without_overshoot_and_faster_ones_do_not() -> None:
    response = 0.2
    slow = settle(0.9 * loop.ringing_limit(response), response, 0, 2000, start=0.0)
    fast = settle(4.0 * loop.ringing_limit(response), response, 0, 2000, start=0.0)
    assert slow.max() > 0.01 and slow.min() > -1e-12
    assert fast.min() < -0.01


def test_the_multiplier_does_not_wind_up() -> None:
    # 500 batches of a violation that no λ can mend, then a calm: λ falls from its maximum with the first batch.
    dual = DualVariable(0.0, 1.0, 1.0)
    levels = np.concatenate([np.full(500, 5.0), np.full(20, 0.0)])
    _, multipliers = loop.simulate(loop.Plant(1.0, 0.1), levels, dual, tolerance=0.5)
    assert multipliers[499] == 1.0
    assert multipliers[502] == pytest.approx(0.5) and multipliers[503] == 0.0


def test_the_script_draws_its_figure_and_reports_it(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{tmp_path}/loop.png"
    monkeypatch.setattr(sys, "argv", ["closed_loop.py", "--output", path])
    loop.main()
    with open(path, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert "delay  1: the largest loop gain is 0.618 at 1, 0.512 at 10, 0.501 at 100" in capsys.readouterr().out
