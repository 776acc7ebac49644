# SPDX-License-Identifier: Apache-2.0
"""What the trainer adds to TRL's model card: the constraint, what was measured, scores, and a picture of the run."""

import math
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import SchedulerType

from dc_trl.config import DCGRPOConfig
from dc_trl.records.card.model_index import model_index_results
from dc_trl.records.card.series import DISCREPANCY, series
from dc_trl.records.results import newest_results, read_results, score
from dc_trl.records.text import markdown, visible
from dc_trl.rollouts.engines import engine_name
from dc_trl.rollouts.shown import shown

CARD = "README.md"
CURVES = "curves.png"

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

# The tail and the entropy stand beside the mean: a small mean |π − μ| alone does not prove that the engines agree.
MEASURED = (
    DISCREPANCY,
    "dc/discrepancy/p50",
    "dc/discrepancy/p90",
    "dc/discrepancy/p99",
    "dc/discrepancy/max",
    "dc/abs_log_ratio/p50",
    "dc/abs_log_ratio/p90",
    "dc/abs_log_ratio/p99",
    "dc/differs",
    "dc/chi2_token",
    "dc/ess",
    "dc/importance_ratio/min",
    "dc/importance_ratio/max",
    "dc/log_ppl_abs_diff",
    "dc/penalty_share",
    "dc/penalty_only",
    "dc/rejection/any/tokens",
    "dc/multiplier",
    "dc/sync/update_seen",
    "dc/sync/update_seen_since_start",
    "entropy",
    "completions/mean_length",
    "reward",
)

# What TRL's template says where the base model is not on the Hub, or nothing is pushed, and what is true then.
_UNKNOWN = {
    "fine-tuned version of [None](https://huggingface.co/None)": "fine-tuned version of a model not on the Hub",
    'model="None"': 'model="."',
}
# The quick start of TRL's template, which sends a message, and what runs on a model without a chat template.
_MESSAGES = '[{"role": "user", "content": question}]'
_PLAIN = "question"
_QUICK_START = "## Quick start\n"

# How TRL's template writes a name that the header has under this key, and how it is written where it is no plain name.
_NAMES = {
    "model_name": ("# Model Card for {0}", "# Model Card for {0}"),
    "base_model": ("[{0}](https://huggingface.co/{0})", "{0}"),
    "datasets": ("[{0}](https://huggingface.co/datasets/{0})", "{0}"),
}


def complete(
    folder: Path,
    args: DCGRPOConfig,
    tolerance: float | None,
    multiplier: float,
    rounding: str | None,
    log_history: Sequence[dict[str, Any]],
    chats: bool = True,
) -> None:
    """Completes the card that TRL has just written to `folder`, and draws `curves.png` beside it.

    The section comes before the citations. Benchmark scores that `dc-trl evaluate` left in `folder/evaluation` go into
    the section, and into `model-index` in the card's header, from which the Hub shows them.

    Args:
        folder: the trainer's output_dir.
        args: the run's configuration.
        tolerance: in units of the discrepancy metric; None while calibrating.
        multiplier: λ now.
        rounding: of the weight syncs, see `dc_trl.rollouts.sync_rounding.rounding_in_force`.
        log_history: the Trainer's.
        chats: whether the model has a chat template, without which the quick start must send plain text.
    """
    # Loads matplotlib, which a trainer that never writes a card does not need.
    from dc_trl.records.card.curves import save_curves

    card = ModelCard.load(folder / CARD)
    results = newest_results(read_results(folder))
    parts = [_settings(args, tolerance, multiplier, rounding), _measurements(log_history)]
    if save_curves(log_history, tolerance, folder / CURVES):
        parts.append(f"![Curves]({CURVES})\n")
    parts += [_evaluation(log_history), _benchmarks(results)]
    text = _quick_start(card.text, chats)
    for wrong, right in _UNKNOWN.items():
        text = text.replace(wrong, right)
    text = _names_as_text(text, card.data.to_dict())
    card.text = with_section(text, "\n".join(part for part in parts if part))
    if entries := model_index_results(results):
        card.data.eval_results = entries
        card.data.model_name = card.data.get("model_name") or visible(folder.resolve().name)
    card.save(folder / CARD)


def _quick_start(text: str, chats: bool) -> str:
    """TRL's card with a quick start that runs as it stands: on this model, and where the card says."""
    head, found, rest = text.partition(_QUICK_START)
    snippet, end, tail = rest.partition("\n## ")
    if not found:
        return text
    if not chats:
        snippet = snippet.replace(_MESSAGES, _PLAIN)
    where = "\nIn this folder:\n" if 'model="None"' in snippet else ""
    return f"{head}{found}{where}{snippet}{end}{tail}"


def _names_as_text(text: str, header: dict[str, Any]) -> str:
    """TRL's card with names that hold markup written as text; its template takes them as they are."""
    for key, (taken, written) in _NAMES.items():
        names = header.get(key)
        for name in names if isinstance(names, list) else [names]:
            if isinstance(name, str) and markdown(name) != name:
                text = text.replace(taken.format(name), written.format(markdown(name)))
    return text


def copy_card(output_dir: Path, checkpoint: Path) -> None:
    """Copies the card and its picture from `output_dir` into a checkpoint; what is not there is not copied."""
    for name in (CARD, CURVES):
        if (output_dir / name).is_file():
            shutil.copyfile(output_dir / name, checkpoint / name)


def with_section(card: str, section: str) -> str:
    """The card's text with the section before its citations, and the second paper's citation at its end."""
    marker = "\n## Citations"
    head, found, tail = card.partition(marker)
    citations = f"{marker}{tail.rstrip() if found else ''}\n\nCite length-decay as:\n\n{LENGTH_DECAY_CITATION}"
    return f"{head.rstrip()}\n\n{section}{citations}"


def _settings(args: DCGRPOConfig, tolerance: float | None, multiplier: float, rounding: str | None) -> str:
    corrected, mode = args.vllm_importance_sampling_correction, args.vllm_importance_sampling_mode
    rows = {
        "constraint": args.constraint,
        "discrepancy metric, level, average": f"{args.discrepancy_metric}, {args.discrepancy_level}, "
        f"{args.discrepancy_average}",
        "tolerance": _tolerance(args, tolerance),
        "multiplier: initial, now, maximum": f"{args.multiplier_init}, {_number(multiplier)}, {args.multiplier_max}",
        "dual learning rate": args.dual_lr,
        "rollout engine": engine_name(vars(args)),
        "rounding at the weight sync": _rounding(args, rounding),
        "importance sampling": shown("vllm_importance_sampling_mode", mode) if corrected else "none",
        "rejection": ", ".join(args.rejection or ["none"]),
        "length-decay, ESS-scaled rate": f"{args.length_decay}, {args.ess_rate}",
        "advantage estimator, groups without variance": f"{args.advantage_estimator}, {args.zero_variance_groups}",
        "learning rate, schedule": f"{args.learning_rate}, {SchedulerType(args.lr_scheduler_type).value}",
    }
    written = [(name, markdown(value)) for name, value in rows.items()]
    return f"## Discrepancy constraint\n\n{_table(('setting', 'value'), written)}"


def _measurements(log_history: Sequence[dict[str, Any]]) -> str:
    """The final value of each of `MEASURED`: its mean over the last tenth of the log, and its last value."""
    rows = []
    for key in MEASURED:
        values = series(log_history, key).values
        tenth = values[-math.ceil(len(values) / 10) :]
        if values:
            rows.append((f"`{key}`", _number(sum(tenth) / len(tenth)), _number(values[-1])))
        elif key == DISCREPANCY:
            rows.append((f"`{key}`", "not measured", "not measured"))
    step = f", step {log_history[-1]['step']}" if log_history else ""
    return f"### Final values{step}\n\n{_table(('metric', 'mean of the last tenth of the log', 'last'), rows)}"


def _evaluation(log_history: Sequence[dict[str, Any]]) -> str:
    last: dict[str, Any] = next(
        (entry for entry in reversed(log_history) if any(key.startswith("eval_") for key in entry)), {}
    )
    rewards = [key for key in last if key.startswith("eval_rewards/") and key.endswith("/mean")]
    keys = [f"eval_{key}" for key in ("reward", "entropy", "completions/mean_length", DISCREPANCY)]
    rows = [(_key(key), _number(last[key])) for key in [*rewards, *keys] if last.get(key) is not None]
    if not rows:
        return ""
    return f"### Evaluation during training, step {last['step']}\n\n{_table(('metric', 'value'), rows)}"


def _benchmarks(results: Iterable[dict[str, Any]]) -> str:
    rows = [
        (
            markdown(f"{result['title']}, {result['metric']}"),
            score(result["mean"], result["stderr"]),
            markdown(f"first {result['problems']}" if result["limit"] else result["problems"]),
            markdown(f"{result['temperature']}, {result['top_p']}, {result['max_tokens']}"),
            markdown(f"{result['engine']}, {result['precision']}"),
            markdown(result["time"][:10]),
        )
        for result in results
    ]
    titles = ("benchmark", "score, %", "problems", "temperature, top-p, max tokens", "engine, precision", "evaluated")
    return f"### Benchmarks\n\n{_table(titles, rows)}" if rows else ""


def _tolerance(args: DCGRPOConfig, tolerance: float | None) -> str:
    if tolerance is None:
        return "still being calibrated"
    if args.discrepancy_tolerance is not None:
        return f"{_number(tolerance)} (given)"
    batches = args.tolerance_calibration_batches
    floor = f"the mean of the first {batches} generation batches"
    return f"{_number(tolerance)} (calibrated: {args.tolerance_slack} × {floor})"


def _rounding(args: DCGRPOConfig, rounding: str | None) -> str:
    if rounding is None:
        return "none: no engine of dc-trl rounds them"
    words = {"dither": f"dithered, with seed {args.seed}", "nearest": "to nearest"}[rounding]
    return f"{words} ({args.sync_rounding})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _key(key: str) -> str:
    """The name of a metric as code; one that holds more than a name, as a reward function's may, as text."""
    return f"`{key}`" if re.fullmatch(r"[\w/.@ -]+", key, re.ASCII) else markdown(key)


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are Markdown already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
