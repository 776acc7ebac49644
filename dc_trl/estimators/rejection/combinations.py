# SPDX-License-Identifier: Apache-2.0
"""What rejection cannot be combined with: whatever would keep a rejected token in the loss or in its divisor."""

from typing import Any

from dc_trl.estimators.combinations import refuse, steps_in_backward
from dc_trl.estimators.importance import DRPO
from dc_trl.estimators.rejection import RULES
from dc_trl.estimators.rejection.normaliser import TOKEN_MEAN_LOSSES


def is_settled_late(args: Any) -> bool:
    """Whether what is left of the divisor is known only when an optimizer step's last backward has ended.

    It is where a rule reads the policy of the update at hand, and where only the loss's forward scores rollouts. TRL
    scores them beforehand where they serve several updates, and for an importance-sampling correction of its own.

    Args:
        args: a `DCGRPOConfig`.
    """
    if any("current_logps" in RULES[name].needs for name in args.rejection):
        return True
    serves_several = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
    own = args.constraint == "none" and args.vllm_importance_sampling_mode != DRPO
    corrects = args.vllm_importance_sampling_correction and (args.use_vllm or args.rollout_backend == "transformers")
    return not (serves_several or (own and corrects))


def check_rejection(args: Any) -> None:
    """Refuses options beside which what is rejected could not leave the loss and its divisor exactly.

    Args:
        args: a `DCGRPOConfig` with rules in `rejection`.

    Raises:
        ValueError: names field, value, reason and remedy.
    """
    by_token = [name for name in args.rejection if RULES[name].level == "token"]
    still = "its term of the loss would still be averaged over what is rejected"
    rules = "rules of whole sequences (`geometric`, `token_veto`, `max_tv`)"
    refused = {
        "loss_type": (
            args.loss_type == "vespo",
            "its weight of a sequence is made of all tokens, rejected ones too",
            "a loss such as 'dapo'",
        ),
        "beta": (args.beta != 0, still, "0"),
        "entropy_coef": (args.entropy_coef != 0, still, "0"),
        "use_adaptive_entropy": (args.use_adaptive_entropy, still, "False"),
        "top_entropy_quantile": (
            args.top_entropy_quantile < 1.0,
            "its quantile is over all tokens, rejected ones too",
            "1.0",
        ),
        "importance_sampling_level": (
            args.importance_sampling_level == "sequence" and bool(by_token),
            f"a sequence has one ratio, through which tokens that {by_token} rejects would still be trained",
            f"'token', or {rules}",
        ),
        "off_policy_mask_threshold": (
            args.off_policy_mask_threshold is not None and bool(by_token),
            f"its mask is a sequence's, by all tokens, those that {by_token} rejects too",
            f"None, or {rules}",
        ),
    }
    if is_settled_late(args):
        refused |= _refused_late(args)
    refuse(args, refused, f"`rejection={args.rejection}` and `loss_type={args.loss_type!r}`", "no `rejection`")


def _refused_late(args: Any) -> dict[str, tuple[bool, str, str]]:
    rollout = args.steps_per_generation * args.num_iterations
    return {
        "gradient_accumulation_steps": (
            args.loss_type in TOKEN_MEAN_LOSSES and rollout % args.gradient_accumulation_steps != 0,
            "an optimizer step spans several generation batches, which divide by the number of their own tokens, and "
            "one sum of gradients cannot be divided by several numbers",
            f"a divisor of steps_per_generation × num_iterations = {rollout}, or a loss such as 'grpo'",
        ),
        "optim": (
            steps_in_backward(args),
            "it steps within the backward, before it is known how much of the batch is left to divide by",
            "another optimizer, such as 'adamw_torch_fused'",
        ),
    }
