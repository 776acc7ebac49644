# SPDX-License-Identifier: Apache-2.0
"""Every rejection rule by hand, and what all of them have in common on generated batches."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from torch import Tensor

from dc_trl.estimators.rejection import RULES, Bound, RejectionInputs, RejectionRule, reject, resolve_bounds
from dc_trl.estimators.rejection.binary_kl import COMPLEMENT_FLOOR, binary_kl
from dc_trl.estimators.rejection.measure import emptied_notices, rejection_counts, rejection_metrics
from dc_trl.estimators.rejection.rule import tokens

NAMES = sorted(RULES)
SEQUENCE_RULES = [name for name in NAMES if RULES[name].level == "sequence"]
POISON = [1e4, -1e4, math.nan, math.inf, -math.inf]

# ρ of row 0: 2, 0.5, 1. Row 1: 1.2, 1.2. Row 2: 2e-5, 1, 1. Row 3 has no valid token.
PI = [[0.5, 0.2, 0.3], [0.6, 0.6, 1.0], [1e-5, 0.9, 0.8], [1.0, 1.0, 1.0]]
MU = [[0.25, 0.4, 0.3], [0.5, 0.5, 1.0], [0.5, 0.9, 0.8], [1.0, 1.0, 1.0]]
VALID = [[True, True, True], [True, True, False], [True, True, True], [False, False, False]]


def batch(pi: Any = PI, mu: Any = MU, valid: Any = VALID, advantages: Any = None) -> RejectionInputs:
    log_pi, log_mu = torch.tensor(pi).log(), torch.tensor(mu).log()
    advantages = [1.0] * len(pi) if advantages is None else advantages
    return RejectionInputs(log_pi, log_pi, log_mu, torch.tensor(valid), torch.tensor(advantages))


def kept_by(name: str, inputs: RejectionInputs, **bounds: float) -> list[list[bool]]:
    kept, by_rule = reject([name], resolve_bounds([name], {name: bounds}), inputs)
    assert torch.equal(kept, by_rule[name])
    assert kept.shape == inputs.valid.shape and kept.dtype == torch.bool
    return kept.tolist()


def rows(*kept: bool) -> list[list[bool]]:
    return [[row] * 3 for row in kept]


# By hand


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        # Geometric means: (2 · 0.5 · 1)^(1/3) = 1; (1.2 · 1.2)^(1/2) = 1.2; (2e-5)^(1/3) = 0.0271.
        ({}, rows(True, False, False, True)),
        ({"high": 1.21}, rows(True, True, False, True)),
        ({"high": 1.19}, rows(True, False, False, True)),
        ({"low": 0.028}, rows(True, False, False, True)),
        ({"low": 0.027}, rows(True, False, True, True)),
    ],
)
def test_geometric_by_hand(bounds: dict[str, float], expected: list[list[bool]]) -> None:
    assert kept_by("geometric", batch(), **bounds) == expected


def test_geometric_does_not_depend_on_the_length() -> None:
    # A ratio of 1.005 at each of 2 or of 6 tokens: the mean is 1.005 both times, the product 1.01 or 1.03.
    pi = [[0.5025] * 6, [0.5025] * 6]
    valid = [[True] * 2 + [False] * 4, [True] * 6]
    assert kept_by("geometric", batch(pi, [[0.5] * 6] * 2, valid)) == [[True] * 6] * 2


@pytest.mark.parametrize(
    ("low", "expected"),
    [
        (1e-4, rows(True, True, False, True)),  # 2e-5 in row 2
        (1e-5, rows(True, True, True, True)),
        (0.6, rows(False, True, False, True)),  # and 0.5 in row 0
    ],
)
def test_token_veto_by_hand(low: float, expected: list[list[bool]]) -> None:
    assert kept_by("token_veto", batch(), low=low) == expected


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        # Largest |π − μ|: 0.25 in row 0, 0.1 in row 1, 0.49999 in row 2.
        (0.15, rows(False, True, False, True)),
        (0.26, rows(True, True, False, True)),
        (0.09, rows(False, False, False, True)),
        (0.5, rows(True, True, True, True)),
    ],
)
def test_max_tv_by_hand(high: float, expected: list[list[bool]]) -> None:
    assert kept_by("max_tv", batch(), high=high) == expected


@pytest.mark.parametrize(
    ("bounds", "row_0", "row_2"),
    [
        ({"low": 0.4}, [True, True, True], [False, True, True]),
        ({"low": 0.6}, [True, False, True], [False, True, True]),
        ({"low": 0.4, "high": 1.9}, [False, True, True], [False, True, True]),
        ({"low": 1e-5}, [True, True, True], [True, True, True]),
    ],
)
def test_icepop_by_hand(bounds: dict[str, float], row_0: list[bool], row_2: list[bool]) -> None:
    assert kept_by("icepop", batch(), **bounds) == [row_0, [True] * 3, row_2, [True] * 3]


def test_binary_kl_by_hand() -> None:
    # P = 0.8, Q = 0.4: 0.8 ln 2 + 0.2 ln(0.2/0.6) = 0.5545 − 0.2197.
    # P = 0.4, Q = 0.8: 0.4 ln 0.5 + 0.6 ln 3 = −0.2773 + 0.6592.
    log_p, log_q = torch.tensor([0.8, 0.4, 0.4]).log(), torch.tensor([0.4, 0.8, 0.4]).log()
    torch.testing.assert_close(binary_kl(log_p, log_q), torch.tensor([0.33480, 0.38191, 0.0]), atol=1e-5, rtol=0)


def test_binary_kl_at_the_ends_is_finite_or_infinite_but_never_nan() -> None:
    logs = torch.tensor([0.0, -1e-9, -1e-3, -50.0, -1e4, -math.inf])
    divergence = binary_kl(logs.unsqueeze(0), logs.unsqueeze(1))  # P along the columns, Q along the rows
    assert not divergence.isnan().any() and (divergence >= 0).all()
    assert (divergence.diagonal() == 0).all()
    # Certain against all but certain: the difference is below the resolution of a float32.
    assert divergence[0, 1] < 1e-8 and divergence[1, 0] < 1e-8
    # P impossible, Q 0.999: (1 − 0) ln(1 / (1 − 0.999)) = 6.9. The other way round it is without bound.
    assert divergence[2, 5] == pytest.approx(-math.log(-math.expm1(-1e-3)), rel=1e-5)
    assert divergence[5, 2] > 1e30
    # Certain against even odds: ln 2; even odds against certain: 0.5 ln 0.5 + 0.5 ln(0.5 / floor).
    even = torch.tensor(0.5).log()
    assert float(binary_kl(torch.tensor(0.0), even)) == pytest.approx(math.log(2), rel=1e-5)
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / COMPLEMENT_FLOOR)
    assert float(binary_kl(even, torch.tensor(0.0))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("high", "expected"), [(0.39, True), (0.36, False), (0.33, False)])
def test_kpop_takes_the_larger_direction(high: float, expected: bool, swapped: bool) -> None:
    # Between 0.8 and 0.4 the two directions are 0.335 and 0.382, whichever engine has which.
    pi, mu = ([[0.4]], [[0.8]]) if swapped else ([[0.8]], [[0.4]])
    assert kept_by("kpop", batch(pi, mu, [[True]]), high=high) == [[expected]]


def test_kpop_by_default_rejects_the_impossible_token() -> None:
    # 1e-5 against 0.5: 0.5 ln(0.5/1e-5) + 0.5 ln(0.5/0.99999) = 5.410 − 0.347 = 5.06 > 2.
    assert kept_by("kpop", batch())[2] == [False, True, True]


# π − μ: 0.25, −0.2, 0 in row 0.
@pytest.mark.parametrize(
    ("advantage", "high", "expected"),
    [
        (2.0, 0.15, [False, True, True]),  # π is above μ, and A would raise it
        (-2.0, 0.15, [True, False, True]),  # π is below μ, and A would lower it
        (0.0, 0.15, [True, True, True]),
        (2.0, 0.26, [True, True, True]),
        (-2.0, 0.21, [True, True, True]),
        (-2.0, 0.19, [True, False, True]),
    ],
)
def test_dppo_tv_by_hand(advantage: float, high: float, expected: list[bool]) -> None:
    inputs = batch(PI[:1], MU[:1], VALID[:1], [advantage])
    assert kept_by("dppo_tv", inputs, high=high) == [expected]


@pytest.mark.parametrize(
    ("advantage", "high", "expected"),
    [
        # Token 0, π = 0.8, μ = 0.4: KL(μ‖π) = 0.382, KL(π‖μ) = 0.335. Token 1 the other way round: 0.335 and 0.382.
        (1.0, 0.36, [False, True]),
        (1.0, 0.39, [True, True]),
        (-1.0, 0.36, [True, True]),
        (-1.0, 0.33, [True, False]),
        (0.0, 0.05, [True, True]),
    ],
)
def test_dppo_kl_by_hand(advantage: float, high: float, expected: list[bool]) -> None:
    inputs = batch([[0.8, 0.4]], [[0.4, 0.8]], [[True, True]], [advantage])
    assert kept_by("dppo_kl", inputs, high=high) == [expected]


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_takes_a_sign_per_token(name: str) -> None:
    inputs = batch([[0.8, 0.8]], [[0.4, 0.4]], [[True, True]], [[1.0, -1.0]])
    assert kept_by(name, inputs) == [[False, True]]


def test_dppo_reads_the_policy_of_this_update() -> None:
    # Scored alike before the first update, so that there is no discrepancy; now at 0.9 against μ = 0.5.
    before, now = torch.tensor([[0.5]]).log(), torch.tensor([[0.9]]).log()
    inputs = RejectionInputs(now, before, before, torch.tensor([[True]]), torch.tensor([1.0]))
    for name in NAMES:
        assert kept_by(name, inputs) == [[not name.startswith("dppo")]]


# Together


def test_rules_combine_and_are_reported_apart() -> None:
    names = ["max_tv", "icepop"]
    kept, by_rule = reject(names, resolve_bounds(names, {"icepop": {"low": 0.4, "high": 1.1}}), batch())
    assert by_rule["max_tv"].tolist() == rows(False, True, False, True)
    assert by_rule["icepop"].tolist() == [[False, True, True], [False, False, True], [False, True, True], [True] * 3]
    assert kept.tolist() == [[False] * 3, [False, False, True], [False] * 3, [True] * 3]

    # 8 valid tokens in 3 sequences. max_tv: 6 tokens, 2 sequences. icepop: 1 + 2 + 1 tokens, of 3 sequences.
    counts = rejection_counts(by_rule | {"any": kept}, batch().valid)
    assert counts.tolist() == [8, 3, 6, 2, 4, 3, 8, 3]
    assert {key: float(value) for key, value in rejection_metrics(counts, [*names, "any"]).items()} == pytest.approx(
        {
            "rejection/max_tv/tokens": 6 / 8,
            "rejection/max_tv/sequences": 2 / 3,
            "rejection/icepop/tokens": 4 / 8,
            "rejection/icepop/sequences": 1.0,
            "rejection/any/tokens": 1.0,
            "rejection/any/sequences": 1.0,
        }
    )


def test_counts_of_micro_batches_add_up() -> None:
    inputs, names = batch(), ["icepop"]
    bounds = resolve_bounds(names, {})
    whole = rejection_counts(reject(names, bounds, inputs)[1], inputs.valid)
    halves = [RejectionInputs(*(x[part] for x in inputs)) for part in (slice(2), slice(2, 4))]
    parts = [rejection_counts(reject(names, bounds, half)[1], half.valid) for half in halves]
    assert torch.equal(sum(parts, torch.zeros_like(whole)), whole)


def test_without_rules_everything_is_kept() -> None:
    kept, by_rule = reject([], resolve_bounds([], {}), batch())
    assert kept.all() and by_rule == {}
    assert rejection_counts(by_rule, batch().valid).tolist() == [8, 3]
    assert rejection_metrics(torch.tensor([8, 3]), []) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_an_empty_batch_or_mask_rejects_nothing(name: str, shape: tuple[int, int]) -> None:
    logps = torch.full(shape, -1.0)
    inputs = RejectionInputs(logps, logps, logps - 5, torch.zeros(shape, dtype=torch.bool), torch.ones(shape[0]))
    kept, by_rule = reject([name], resolve_bounds([name], {}), inputs)
    assert kept.all() and kept.shape == shape
    counts = rejection_counts(by_rule, inputs.valid)
    assert counts.tolist() == [0, 0, 0, 0]
    assert all(value.isnan() for value in rejection_metrics(counts, [name]).values())


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_token_that_cannot_be_judged_is_rejected(name: str) -> None:
    inputs = batch([[0.5, 0.5]], [[0.5, 0.5]], [[True, True]])
    bad = torch.tensor([[math.nan, 0.0]])
    inputs = inputs._replace(current_logps=inputs.current_logps + bad, train_logps=inputs.train_logps + bad)
    expected = [False, False] if name in SEQUENCE_RULES else [False, True]
    assert kept_by(name, inputs) == [expected]


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_reads_no_more_than_it_says(name: str) -> None:
    expected = kept_by(name, batch())
    unread = {"current_logps", "train_logps", "sampling_logps", "advantages"} - set(RULES[name].needs)
    poisoned = batch()._replace(**{field: torch.full_like(getattr(batch(), field), math.nan) for field in unread})
    assert kept_by(name, poisoned) == expected


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_judged_in_single(name: str) -> None:
    inputs = batch()
    halves = [x.bfloat16() for x in inputs[:3]]
    rounded = RejectionInputs(*halves, *inputs[3:])
    again = RejectionInputs(*(x.float() for x in halves), *inputs[3:])
    assert kept_by(name, rounded) == kept_by(name, again)


# On generated batches, the same ones in every run. Bounds are odd numbers, so that no statistic falls on an edge.

GENERATE = settings(max_examples=40, deadline=None, derandomize=True, database=None)
PROBABILITIES = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1e-30, 0.5, 1.0]))


@st.composite
def generated(draw: st.DrawFn) -> RejectionInputs:
    size, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def matrix(values: st.SearchStrategy[Any]) -> Tensor:
        row = st.lists(values, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=size, max_size=size)))

    current, train, sampling = (matrix(PROBABILITIES).float().log() for _ in range(3))
    close = draw(st.booleans())  # the usual case: engines that nearly agree
    train = sampling + 0.1 * train.tanh() if close else train
    return RejectionInputs(current, train, sampling, matrix(st.booleans()), matrix(st.floats(-2, 2)).float())


def with_bounds(name: str, wide: float = 1.0) -> dict[str, float]:
    """Bounds of a rule at a distance from agreement that grows with `wide`."""
    bounds = {}
    for bound, spec in RULES[name].bounds.items():
        if bound == "low":
            bounds[bound] = 0.9137**wide
        elif spec.minimum == 1.0:
            bounds[bound] = 1.0931**wide
        else:
            bounds[bound] = min(0.0437 * wide, spec.maximum)
    return bounds


@pytest.mark.parametrize("name", NAMES)
@GENERATE
@given(inputs=generated(), value=st.sampled_from(POISON))
def test_what_is_not_valid_changes_nothing(name: str, inputs: RejectionInputs, value: float) -> None:
    bounds = with_bounds(name)
    poisoned = [torch.where(inputs.valid, x, value) for x in inputs[:3]]
    advantages = torch.where(inputs.valid, inputs.advantages, value)
    assert kept_by(name, RejectionInputs(*poisoned, inputs.valid, advantages), **bounds) == kept_by(
        name, inputs, **bounds
    )


@pytest.mark.parametrize("name", NAMES)
@GENERATE
@given(inputs=generated(), data=st.data())
def test_order_and_padding_change_nothing(name: str, inputs: RejectionInputs, data: st.DataObject) -> None:
    bounds = with_bounds(name)
    kept = torch.tensor(kept_by(name, inputs, **bounds))
    order = data.draw(st.permutations(range(len(kept))))
    shuffled = RejectionInputs(*(x[order] for x in inputs))
    assert torch.equal(torch.tensor(kept_by(name, shuffled, **bounds)), kept[order])

    def padded(x: Tensor) -> Tensor:
        left, right = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
        return torch.cat([left, x, right], dim=1)

    wider = torch.tensor(kept_by(name, RejectionInputs(*(padded(x) for x in inputs)), **bounds))
    assert torch.equal(wider[:, 1:-1], kept)


@pytest.mark.parametrize("name", NAMES)
@GENERATE
@given(inputs=generated(), factor=st.floats(1.0, 20.0))
def test_wider_bounds_keep_more(name: str, inputs: RejectionInputs, factor: float) -> None:
    narrow = torch.tensor(kept_by(name, inputs, **with_bounds(name)))
    wide = torch.tensor(kept_by(name, inputs, **with_bounds(name, factor)))
    assert (wide | ~narrow).all()


@pytest.mark.parametrize("name", NAMES)
@GENERATE
@given(inputs=generated())
def test_the_widest_bounds_keep_everything(name: str, inputs: RejectionInputs) -> None:
    widest = {bound: spec.minimum if bound == "low" else spec.maximum for bound, spec in RULES[name].bounds.items()}
    assert all(map(all, kept_by(name, inputs, **widest)))


@pytest.mark.parametrize("name", NAMES)
@GENERATE
@given(inputs=generated())
def test_the_narrowest_bounds_keep_what_the_engines_agree_on(name: str, inputs: RejectionInputs) -> None:
    narrowest = {bound: spec.maximum if bound == "low" else spec.minimum for bound, spec in RULES[name].bounds.items()}
    agreeing = inputs._replace(current_logps=inputs.sampling_logps, train_logps=inputs.sampling_logps)
    assert all(map(all, kept_by(name, agreeing, **narrowest)))


@pytest.mark.parametrize("name", NAMES)
@GENERATE
@given(inputs=generated())
def test_a_sequence_goes_as_a_whole_and_a_token_only_if_valid(name: str, inputs: RejectionInputs) -> None:
    kept = torch.tensor(kept_by(name, inputs, **with_bounds(name)))
    if name in SEQUENCE_RULES:
        assert torch.equal(kept.all(-1), kept.any(-1))
        assert kept.all(-1)[~inputs.valid.any(-1)].all()
    else:
        assert kept[~inputs.valid].all()


# The table and its validation


def test_defaults_are_in_range_and_named_low_or_high() -> None:
    assert set(NAMES) == {"geometric", "token_veto", "max_tv", "kpop", "icepop", "dppo_tv", "dppo_kl"}
    for rule in RULES.values():
        assert set(rule.bounds) <= {"low", "high"} and rule.bounds
        assert rule.level in ("token", "sequence")
        assert set(rule.needs) <= set(RejectionInputs._fields) - {"valid"}
        for bound in rule.bounds.values():
            assert bound.minimum <= bound.default <= bound.maximum and bound.source


def test_given_bounds_replace_defaults_one_by_one() -> None:
    bounds = resolve_bounds(["icepop", "kpop"], {"icepop": {"high": 2}})
    assert bounds == {"icepop": {"low": 0.5, "high": 2.0}, "kpop": {"high": 2.0}}
    assert list(resolve_bounds(["kpop", "icepop"], {})) == ["kpop", "icepop"]


@pytest.mark.parametrize(
    ("rejection", "bounds", "message"),
    [
        (["icepopp"], {}, r"`rejection` has 'icepopp'.*use any of .*'icepop'"),
        (["kpop", "icepop", "kpop"], {}, r"`rejection` has 'kpop' twice"),
        (["kpop"], {"icepop": {"low": 0.5}}, r"`rejection_bounds` has bounds of 'icepop', which is not in"),
        (["icepop"], {"icepop": [0.5, 2.0]}, r"`rejection_bounds\['icepop'\]` is \[0.5, 2.0\].*Use e.g. \{'low': 0.5"),
        (["kpop"], {"kpop": {"low": 0.5}}, r"`rejection_bounds\['kpop'\]` has 'low'.*Use \('high',\)"),
        (["icepop"], {"icepop": {"low": 1.5}}, r"\['low'\]` is 1.5, which is no number from 0 to 1"),
        (["icepop"], {"icepop": {"high": 0.5}}, r"\['high'\]` is 0.5, which is no number from 1 to inf"),
        (["max_tv"], {"max_tv": {"high": -0.1}}, r"is -0.1.*Use e.g. 0.15"),
        (["max_tv"], {"max_tv": {"high": math.nan}}, r"is nan"),
        (["max_tv"], {"max_tv": {"high": True}}, r"is True"),
        (["max_tv"], {"max_tv": {"high": "a tenth"}}, r"is 'a tenth'"),
        (["max_tv"], {"max_tv": {"high": None}}, r"is None"),
    ],
)
def test_what_cannot_work_is_named(rejection: list[str], bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_bounds(rejection, bounds)


def test_a_number_may_come_as_text_as_yaml_gives_it() -> None:
    assert resolve_bounds(["token_veto"], {"token_veto": {"low": "1e-5"}}) == {"token_veto": {"low": 1e-5}}


def test_a_rule_of_ones_own_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def rare(inputs: RejectionInputs, *, low: float) -> Tensor:
        return tokens(inputs.sampling_logps.exp() >= low, inputs.valid)

    bounds = {"low": Bound(0.3, 0.0, 1.0, "mine")}
    rule = RejectionRule(rare, bounds, level="token", keeps="μ ≥ low", needs=("sampling_logps",), source="mine")
    monkeypatch.setitem(RULES, "rare", rule)
    assert kept_by("rare", batch(), low=0.35)[0] == [False, True, False]
    without_the_first = [[False, True, True]]
    assert kept_by("rare", batch(PI[:1], MU[:1], without_the_first), low=0.35) == [[True, True, False]]


def test_the_page_on_the_method_has_every_rule() -> None:
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    cells = [line.replace("\\|", "¦").strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): [cell.strip().replace("¦", "|") for cell in row] for row in cells if len(row) == 7}
    assert list(table) == list(RULES)
    symbols = {"train_logps": "π", "current_logps": "current π", "sampling_logps": "μ", "advantages": "A"}
    for name, rule in RULES.items():
        _, level, keeps, default, needs, _, _ = table[name]
        assert (level, keeps) == (rule.level, rule.keeps)
        assert needs == ", ".join(symbols[field] for field in rule.needs)
        values = ", ".join(f"{bound} {spec.default:.6g}" for bound, spec in rule.bounds.items())
        assert default.split(" (")[0] == values


# Valid tokens, sequences, then tokens and sequences that two rules and all of them reject, of each rank.
FULL, EMPTIED, WITHOUT = [8, 3, 1, 1, 2, 1, 3, 2], [6, 2, 6, 2, 3, 1, 6, 2], [0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("ranks", "topic", "says"),
    [
        ([FULL], None, ""),
        ([WITHOUT], None, ""),
        ([FULL, WITHOUT], None, ""),
        ([EMPTIED], "rejected", "every token of a batch"),
        ([EMPTIED, WITHOUT], "rejected", "every token of a batch"),
        ([FULL, EMPTIED], "rejected on a rank", "every token of process 1 (of 0 to 1)"),
        ([EMPTIED, FULL, EMPTIED, WITHOUT], "rejected on a rank", "every token of process 0, 2 (of 0 to 3)"),
    ],
)
def test_a_rank_without_a_kept_token_is_named(ranks: list[list[int]], topic: str | None, says: str) -> None:
    notices = emptied_notices(torch.tensor(ranks, dtype=torch.float64), ["icepop", "max_tv"])
    assert [name for name, _ in notices] == ([topic] if topic else [])
    for _, message in notices:
        # Of 6 tokens, or of 12 on two ranks, icepop rejects all and max_tv half.
        assert says in message and "icepop 100%, max_tv 50% of these tokens" in message
        assert "`rejection_bounds`" in message
