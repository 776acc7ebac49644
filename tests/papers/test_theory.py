# SPDX-License-Identifier: Apache-2.0
"""The papers' theory against numbers worked otherwise."""

import math

import pytest
import torch

A = torch.tensor([0.6, -0.2, -0.4], dtype=torch.float64)
MU = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def test_lambert_w_inverts_its_definition() -> None:
    from papers.theory.optima import lambert_w

    w = torch.tensor([-0.99, -0.5, -1e-3, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(lambert_w(w * w.exp()), w, rtol=1e-6, atol=1e-9)
    assert lambert_w(torch.tensor([-1.0])).isnan().all()  # below −1/e


def test_the_difference_has_a_solution_that_is_seen_at_once() -> None:
    from papers.theory.optima import optimum

    # ν is the mean advantage, 0, so π = μ + A/λ with λ = 4.
    torch.testing.assert_close(optimum(A, MU, 4.0, "difference"), MU + A / 4)


def test_the_ratio_has_a_solution_that_is_seen_at_once() -> None:
    from papers.theory.optima import optimum

    nu = float((MU * A).sum())  # Σ μ (1 + (A − ν)/λ) = 1
    torch.testing.assert_close(optimum(A, MU, 4.0, "ratio"), MU * (1 + (A - nu) / 4))


@pytest.mark.parametrize("model", ["difference", "ratio", "log"])
def test_the_theorem_agrees_with_ascent(model: str) -> None:
    from papers.theory.optima import maximise, optimum

    best = optimum(A, MU, 3.0, model)
    assert best is not None
    torch.testing.assert_close(best, maximise(A, MU, 3.0, model, steps=1500), rtol=0, atol=1e-6)


def test_the_log_model_has_no_solution_for_a_large_advantage() -> None:
    from papers.theory.optima import maximise, optimum

    large = torch.tensor([3.0, -0.2, -0.4], dtype=torch.float64)
    assert optimum(large, MU, 1.0, "log") is None
    assert (maximise(large, MU, 1.0, "log", steps=1500) / MU).max() > math.e


def test_the_toy_spends_its_budget_and_keeps_the_paper_s_order() -> None:
    from papers.theory.toy import BUDGET, lines

    found = {(line["model"], line["sides"]): line for line in lines()}
    assert len(found) == 6
    for line in found.values():
        assert line["spent"] == pytest.approx(BUDGET, rel=1e-3)
        assert sum(line["policy"]) == pytest.approx(1, abs=1e-4)
    for sides in (1, 2):
        low = [found[model, sides]["policy"][-1] for model in ("difference", "log", "ratio")]
        assert low == sorted(low, reverse=True)


def test_the_change_of_entropy_is_that_of_a_small_step() -> None:
    from papers.theory.entropy import entropy_change

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    d = torch.rand(5, 6, generator=generator, dtype=torch.float64)

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    pi = z.softmax(-1)
    step = -pi * (d - (pi * d).sum(-1, keepdim=True))
    expected = (entropy(z + 1e-6 * step) - entropy(z - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(entropy_change(z.log_softmax(-1), d), expected, rtol=1e-5, atol=1e-9)


def test_only_the_probability_difference_raises_entropy() -> None:
    from papers.theory.entropy import lines

    found = lines(states=100)
    shares = {metric: [x["rises"] for x in found if x["metric"] == metric] for metric in {x["metric"] for x in found}}
    assert min(shares["prob_diff"]) > 0.6
    assert max(shares["logprob_diff"]) < 0.6 and max(shares["prob_ratio"]) < 0.6
    assert all(0.25 < share < 0.6 for share in shares["logit_diff"])


def test_the_gradient_of_an_enumerated_chain_is_autograd_s() -> None:
    from papers.theory import chain

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(chain.TOKENS + 1, chain.TOKENS, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = chain.sequences(3)
    reward = (torch.rand(len(tokens), generator=generator) < 0.5).double()
    logps = logits.log_softmax(-1)[chain.states(tokens), tokens].sum(1)
    (expected,) = torch.autograd.grad((logps.exp() * reward).sum(), logits)
    torch.testing.assert_close(chain.gradient(logits.detach(), logits.detach(), tokens, reward), expected)


def test_the_bound_holds_on_chains() -> None:
    from papers.theory.chain import lines

    assert all(0 < line["largest_ratio"] <= 1 for line in lines(chains=5))
