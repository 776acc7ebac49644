# SPDX-License-Identifier: Apache-2.0
"""The section that the trainer adds to TRL's model card: the constraint, and what it was measured to do."""

from typing import Any

from dc_trl.config import DCGRPOConfig

LENGTH_DECAY_CITATION = """\
```bibtex
@article{zhang2026beyond,
    title  = {{Beyond Precision: Training-Inference Mismatch is an Optimization Problem
               and Simple LR Scheduling Fixes It}},
    author = {Yaxiang Zhang and Yingru Li and Jiakai Liu and Jiawei Xu and Ziniu Li and Qian Liu and Haoyuan Li},
    year   = 2026,
    eprint = {arXiv:2602.01826},
}
```
"""


def constraint_section(
    args: DCGRPOConfig, tolerance: float | None, multiplier: float, log_history: list[dict[str, Any]]
) -> str:
    """Markdown: the constraint's settings, the tolerance in use, and the last measured values.

    Args:
        args: the run's configuration.
        tolerance: in units of the discrepancy metric; None while calibrating.
        multiplier: λ now.
        log_history: the trainer's, for the last value of each metric.
    """
    engine = "rollout_func or TRL's generation" if args.rollout_backend == "vllm" and not args.use_vllm else "vLLM"
    engine = "in-process transformers" if args.rollout_backend == "transformers" else engine
    if args.vllm_engine_kwargs:
        engine += f" with {args.vllm_engine_kwargs}"
    rows = {
        "constraint": args.constraint,
        "discrepancy metric, level, average": f"{args.discrepancy_metric}, {args.discrepancy_level}, "
        f"{args.discrepancy_average}",
        "tolerance": _tolerance(args, tolerance),
        "multiplier: initial, now, maximum": f"{args.multiplier_init}, {_number(multiplier)}, {args.multiplier_max}",
        "dual learning rate": args.dual_lr,
        "rollout engine": f"{engine}, precision: {args.rollout_precision or 'as trained or as the engine loads it'}",
        "importance sampling": args.vllm_importance_sampling_mode
        if args.vllm_importance_sampling_correction
        else "none",
        "length-decay": args.length_decay,
        "advantage estimator, groups without variance": f"{args.advantage_estimator}, {args.zero_variance_groups}",
    }
    for key in ("dc/discrepancy/mean", "dc/discrepancy/p99", "dc/chi2_token", "dc/penalty_share", "entropy", "reward"):
        rows[f"last `{key}`"] = _number(next((e[key] for e in reversed(log_history) if key in e), None))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"## Discrepancy constraint\n\n| setting or measurement | value |\n|---|---|\n{table}\n"


def with_section(card: str, section: str) -> str:
    """The card with the section before its citations, and the second paper's citation at its end."""
    marker = "\n## Citations"
    head, found, tail = card.partition(marker)
    if not found:
        return f"{card.rstrip()}\n\n{section}"
    return f"{head.rstrip()}\n\n{section}{marker}{tail.rstrip()}\n\nCite length-decay as:\n\n{LENGTH_DECAY_CITATION}"


def _tolerance(args: DCGRPOConfig, tolerance: float | None) -> str:
    if tolerance is None:
        return "still being calibrated"
    return f"{_number(tolerance)} ({'given' if args.discrepancy_tolerance is not None else 'calibrated'})"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
