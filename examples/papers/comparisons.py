# SPDX-License-Identifier: Apache-2.0
"""What is claimed, by whom, and the comparison that tells: the protocol's tests as a table."""

from dataclasses import dataclass

from papers.intervals import MARGIN, Comparison, Side

H5 = "ours, H5"
DC = "DC-GRPO"
DECAY = "length-decay"
HELD_OUT = "held_out_accuracy"


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparison by which it holds or does not.

    Attributes:
        block: whose results it needs.
        text: the sentence.
        source: who claims it.
        comparison: see there; the claim is that it is above 0.
        equal: whether the claim is that there is no difference, which holds within the margin.
        first: whether it stands on the first page.
    """

    block: str
    text: str
    source: str
    comparison: Comparison
    equal: bool = False
    first: bool = False


def _discrepancy(regime: str, left: str, right: str) -> Comparison:
    return Comparison(Side(regime, left), Side(regime, right), "discrepancy_all", log=True)


def _accuracy(regime: str, left: str, right: str, outcome: str = "accuracy") -> Comparison:
    return Comparison(Side(regime, left), Side(regime, right), outcome, margin=MARGIN)


def _speed(regime: str, left: str, right: str) -> Comparison:
    return _accuracy(regime, left, right, "accuracy_all")


def _held_out(left: str, right: str) -> Comparison:
    return _accuracy(PUBLISHED, left, right, HELD_OUT)


FP8, BF16, OFF, CALM = "unseen-fp8", "unseen-bf16", "off-grid-fp8", "calm"
STRESSED, MILD, PUBLISHED = "stressed", "mild", "published-bf16"

ROUNDING = (
    Claim(
        "rounding",
        "fp8: a sync that rounds to nearest makes the discrepancy",
        H5,
        _discrepancy(FP8, "nearest", "dither"),
        first=True,
    ),
    Claim("rounding", "fp8: and slows learning down", H5, _speed(FP8, "dither", "nearest"), first=True),
    Claim(
        "rounding",
        "fp8: also at twice the rate, where it learns as fast, the discrepancy is larger",
        H5,
        _discrepancy(FP8, "nearest-x2", "dither"),
        first=True,
    ),
    Claim("rounding", "fp8: nearest at twice the rate learns as fast", H5, _speed(FP8, "nearest-x2", "dither"), True),
    Claim(
        "one-rounding",
        "bf16: a sync that rounds to nearest makes the discrepancy",
        H5,
        _discrepancy(BF16, "nearest", "dither"),
        first=True,
    ),
    Claim("one-rounding", "bf16: and slows learning down", H5, _speed(BF16, "dither", "nearest"), first=True),
    Claim(
        "one-rounding",
        "bf16: also at one and a half times the rate the discrepancy is larger",
        H5,
        _discrepancy(BF16, "nearest-x1.5", "dither"),
    ),
    Claim(
        "one-rounding",
        "bf16: nearest at one and a half times the rate learns as fast",
        H5,
        _speed(BF16, "nearest-x1.5", "dither"),
        equal=True,
    ),
    Claim(
        "one-rounding",
        "bf16: a trainer that rounds to nearest as well hides the discrepancy",
        H5,
        _discrepancy(BF16, "nearest", "one-nearest"),
        first=True,
    ),
    Claim(
        "one-rounding",
        "bf16: and still loses the updates: one dithered rounding for both learns faster",
        H5,
        _speed(BF16, "one-dither", "one-nearest"),
        first=True,
    ),
    Claim(
        "rounding-more",
        "fp8, start off the grid: to nearest the discrepancy is larger too",
        H5,
        _discrepancy(OFF, "nearest", "dither"),
    ),
    Claim("rounding-more", "fp8, start off the grid: and learning slower", H5, _speed(OFF, "dither", "nearest")),
)

_NAMED = {"tis": "TIS", "dc": "DC-GRPO", "dc-strong": "DC-GRPO with a penalty that bites", "decay": "length-decay"}


def _left_behind(block: str, sampler: str, regime: str, first: tuple[str, ...] = ()) -> tuple[Claim, ...]:
    """That a remedy under nearest leaves discrepancy and speed behind those of the plain dithered sync."""
    return tuple(
        claim
        for arm, name in _NAMED.items()
        for claim in (
            Claim(
                block,
                f"{sampler}, to nearest: {name} leaves a discrepancy above that of the dithered sync",
                H5,
                _discrepancy(regime, f"nearest-{arm}", "dither"),
                first=arm in first,
            ),
            Claim(
                block,
                f"{sampler}, to nearest: {name} leaves learning slower than the dithered sync",
                H5,
                _speed(regime, "dither", f"nearest-{arm}"),
            ),
        )
    )


REMEDIES = (
    *_left_behind("remedies", "fp8", FP8, first=("tis", "dc-strong")),
    *_left_behind("rounding-more", "bf16", BF16),
)

PUBLISHED_MODEL = (
    Claim(
        "published",
        "bf16, to nearest: the deployed model learns less than with the dithered sync",
        H5,
        _held_out("dither", "nearest"),
        first=True,
    ),
    Claim(
        "published",
        "bf16, to nearest: the discrepancy is larger",
        H5,
        _discrepancy(PUBLISHED, "nearest", "dither"),
        first=True,
    ),
    *(
        claim
        for arm, name in _NAMED.items()
        for claim in (
            Claim(
                "published",
                f"bf16, to nearest: {name} leaves the deployed model behind that of the dithered sync",
                H5,
                _held_out("dither", f"nearest-{arm}"),
                first=arm in ("tis", "dc-strong"),
            ),
            Claim(
                "published",
                f"bf16, to nearest: {name} leaves a discrepancy above that of the dithered sync",
                H5,
                _discrepancy(PUBLISHED, f"nearest-{arm}", "dither"),
            ),
        )
    ),
)


def _remedies(block: str, regime: str, prefix: str = "") -> tuple[Claim, ...]:
    """What each remedy is asked in a regime, in the words of the page."""
    asked = (
        ("TIS ends higher than plain GRPO", "Yao et al. 2025", "tis", "plain", False),
        ("DC-GRPO ends higher than plain GRPO", f"{DC}, table 1", "dc-alone", "plain", True),
        ("DC-GRPO with TIS ends higher than TIS", "the question that the paper left out", "dc", "tis", True),
        ("length-decay ends higher than a constant rate", f"{DECAY}, figures 7 and 8", "decay", "plain", True),
        ("a penalty that bites adds to TIS", "", "dc-strong", "tis", False),
    )
    return tuple(
        Claim(block, prefix + text, source, _accuracy(regime, left, right), first=first)
        for text, source, left, right, first in asked
    )


CAUSE = (
    Claim(
        "cause",
        "the stressed regime is unstable because of the discrepancy: without any it ends higher",
        "both papers",
        _accuracy(STRESSED, "exact", "plain"),
        first=True,
    ),
    Claim(
        "mild",
        "the mild regime, at half the rate, is unstable because of the discrepancy: without any it ends higher",
        "both papers",
        _accuracy(MILD, "exact", "plain"),
        first=True,
    ),
    *_remedies("mild", MILD, "mild: "),
)

STABILITY = (
    *_remedies("stability", STRESSED),
    Claim(
        "stability",
        "and more than its values shuffled over the tokens do",
        "control",
        _accuracy(STRESSED, "dc-strong", "dc-strong-placebo"),
    ),
    Claim("stability", "MIS by token ends higher than TIS", "", _accuracy(STRESSED, "mis-token", "tis")),
    Claim("stability", "MIS by sequence ends higher than TIS", "", _accuracy(STRESSED, "mis-sequence", "tis")),
    Claim(
        "stability",
        "length-decay adds to TIS",
        f"{DECAY}, figure 12",
        _accuracy(STRESSED, "decay-tis", "tis"),
        first=True,
    ),
    Claim(
        "stability",
        "an ESS-scaled rate adds to TIS",
        "VCPO, arXiv 2602.17616",
        _accuracy(STRESSED, "ess-rate", "tis"),
    ),
    Claim("stability", "a fifth of the rate adds to TIS", "control", _accuracy(STRESSED, "tis-rate-fifth", "tis")),
    Claim(
        "stability",
        "without any discrepancy, a fifth of the rate ends higher",
        "control",
        _accuracy(STRESSED, "exact-rate-fifth", "exact"),
    ),
)

FORMS = (
    Claim(
        "forms",
        "a penalty on |π − μ| that bites raises the entropy",
        "ours, H1",
        Comparison(Side(MILD, "relative"), Side(MILD, "tis"), "entropy"),
        first=True,
    ),
    Claim(
        "forms",
        "and more than its values shuffled over the tokens do",
        "ours, H1",
        Comparison(Side(MILD, "relative"), Side(MILD, "relative-placebo"), "entropy"),
    ),
    Claim(
        "forms",
        "an entropy bonus that is driven to the same entropy ends as it does",
        "ours, H1",
        _accuracy(MILD, "relative", "tis-entropy"),
        equal=True,
    ),
    Claim(
        "forms",
        "a penalty on the logit difference leaves the entropy where it is, within 0.05 nats",
        "ours, H2",
        Comparison(Side(MILD, "relative-logit"), Side(MILD, "tis"), "entropy", margin=MARGIN),
        equal=True,
    ),
    *(
        Claim("forms", f"{name} adds to TIS", source, _accuracy(MILD, arm, "tis"))
        for arm, name, source in (
            ("relative", "a relative penalty on |π − μ|", "ours, H4"),
            ("relative-logit", "a relative penalty on the logit difference", "ours, H2"),
            ("relative-ratio", "a relative penalty on the ratio", "ours, H4"),
            ("relative-logprob", "a relative penalty on log-probs", "ours, H4"),
            ("relative-to-go", "the cost to go of |π − μ|", "ours, H3"),
            ("relative-logit-to-go", "the cost to go of the logit difference", "ours, H3"),
            ("relative-to-go-centred", "the same of |π − μ|, centred in its group,", "ours, H3"),
            ("relative-logit-to-go-centred", "the same of the logit difference, centred in its group,", "ours, H3"),
            ("relative-capped", "a penalty on |π − μ| of at most 5 % of |A|", "ours"),
            ("rejection-geometric", "geometric rejection", "Liu et al. 2025"),
            ("rejection-dppo-tv", "DPPO-TV", "DPPO"),
        )
    ),
    Claim(
        "forms",
        "the logit difference does more than its values shuffled over the tokens",
        "control",
        _accuracy(MILD, "relative-logit", "relative-logit-placebo"),
    ),
)

_DIFFERENT = (
    ("a temperature of 1.3 ends higher than 1", f"{DC}, figure 2", "temperature-1.3", "plain"),
    ("a temperature of 1 ends higher than 0.7", f"{DC}, figure 2", "plain", "temperature-0.7"),
    ("|π − μ| as the penalty beats the ratio", f"{DC}, figure 2", "dc-alone", "dc-ratio"),
    ("|π − μ| as the penalty beats log-probs", f"{DC}, figure 2", "dc-alone", "dc-logprob"),
    ("a penalty by token beats one by sequence", f"{DC}, §4", "dc-alone", "dc-sequence"),
    ("Dual-GRPO ends higher than GRPO", f"{DC}, §4", "dual", "plain"),
    ("a threshold beats Dual-GRPO", f"{DC}, figure 3", "threshold", "dual"),
    ("DC-GRPO beats the threshold", f"{DC}, figure 3", "dc-alone", "threshold"),
    ("half the tolerance does worse", f"{DC}, table 5", "dc-alone", "dc-slack-0.6"),
    ("twice the tolerance does worse", f"{DC}, table 5", "dc-alone", "dc-slack-2.5"),
    ("a tenth of the rate ends higher", f"{DECAY}, figure 4", "rate-tenth", "plain"),
    ("a decay that comes early ends lower", f"{DECAY}, figures 9 and 10", "decay", "decay-early"),
    ("a decay that comes late ends lower", f"{DECAY}, figures 9 and 10", "decay", "decay-late"),
    ("length-decay adds to MIS", f"{DECAY}, figure 11", "decay-mis", "mis-token"),
    ("length-decay adds to an fp16 sampler", f"{DECAY}, figure 13", "fp16-decay", "fp16"),
    ("DC-GRPO adds to length-decay", "both", "decay-dc", "decay"),
)
_EQUAL = (
    ("λ0 of 0.05 does as well as 0.1", f"{DC}, table 3", "dc-init-0.05", "dc-alone"),
    ("λ0 of 0.2 does as well as 0.1", f"{DC}, table 3", "dc-init-0.2", "dc-alone"),
    ("a dual rate of 0.5 does as well as 1", f"{DC}, table 4", "dc-dual-lr-0.5", "dc-alone"),
    ("a dual rate of 1.5 does as well as 1", f"{DC}, table 4", "dc-dual-lr-1.5", "dc-alone"),
    ("an fp16 sampler alone does not end higher", f"{DECAY}, figure 13", "fp16", "plain"),
)

CLAIMS = (
    *(Claim("claims", text, source, _accuracy(STRESSED, left, right)) for text, source, left, right in _DIFFERENT),
    *(Claim("claims", text, source, _accuracy(STRESSED, left, right), True) for text, source, left, right in _EQUAL),
    # Where problems are repeated, what a run logs is of problems that it has seen.
    Claim(
        "claims",
        "a fortieth of the problems ends lower, held out",
        f"{DECAY}, figure 5",
        _accuracy(STRESSED, "plain", "data-fortieth", HELD_OUT),
    ),
    Claim(
        "claims",
        "a quarter of the problems ends no differently, held out",
        f"{DECAY}, figure 5",
        _accuracy(STRESSED, "data-quarter", "plain", HELD_OUT),
        equal=True,
    ),
    Claim(
        "claims",
        "at a tenth of the rate the discrepancy is smaller",
        f"{DECAY}, figure 4",
        _discrepancy(STRESSED, "plain", "rate-tenth"),
    ),
    Claim("claims", "calm: DC-GRPO ends higher than plain GRPO", f"{DC}, table 2", _accuracy(CALM, "dc", "plain")),
    Claim("claims", "calm: DC-GRPO with TIS ends higher than TIS", "", _accuracy(CALM, "dc", "tis")),
)

SECTIONS = {
    "Rounding at the weight sync": ROUNDING,
    "Do remedies make up for it?": REMEDIES,
    "On a published model of 135 million parameters": PUBLISHED_MODEL,
    "Is the discrepancy the cause?": CAUSE,
    "What is added to importance sampling": STABILITY,
    "Other forms of the penalty": FORMS,
    "The papers' claims": CLAIMS,
}

ALL = tuple(claim for claims in SECTIONS.values() for claim in claims)
