# SPDX-License-Identifier: Apache-2.0
"""What the estimators cannot be combined with. `args` is a `DCGRPOConfig` throughout.

Each raises ValueError that names field, value, reason and remedy.
"""

from collections.abc import Mapping
from typing import Any

from dc_trl.estimators.rejection.normaliser import MICRO_BATCH_MEAN_LOSSES, SEQUENCE_MEAN_LOSSES

# Optimizers that have stepped, layer by layer, when the backward ends; and those that move weights without a gradient.
_STEP_IN_BACKWARD = ("lomo", "layerwise")
_MOVES_WITHOUT_GRADIENT = ("schedule_free",)


def _optim(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def steps_in_backward(args: Any) -> bool:
    """Whether the optimizer has stepped when the backward ends."""
    return any(word in _optim(args) for word in _STEP_IN_BACKWARD)


def refuse(args: Any, refused: Mapping[str, tuple[bool, str, str | None]], beside: str, instead: str) -> None:
    """Refuses the first of these fields that applies.

    Args:
        args: the configuration.
        refused: by field whether it applies, the reason, and what to use; None to leave it unset.
        beside: with what the field does not go.
        instead: the way out that keeps the field.
    """
    for name, (applies, reason, remedy) in refused.items():
        if applies:
            way_out = "Leave it unset" if remedy is None else f"Use {remedy}"
            value = getattr(args, name)
            raise ValueError(f"`{name}` is {value!r} with {beside}: {reason}. {way_out}, or {instead}.")


def check_dropping(args: Any) -> None:
    """Terms of the loss that the advantage does not scale keep the dropped groups in their normaliser."""
    other_losses = args.loss_type in (*SEQUENCE_MEAN_LOSSES, *MICRO_BATCH_MEAN_LOSSES)
    reason = "its term of the loss would still be averaged over the dropped groups"
    refused = {
        "beta": (args.beta != 0 and other_losses, reason, "0, or a loss that divides by tokens, such as 'dapo'"),
        "entropy_coef": (args.entropy_coef != 0, reason, "0"),
        "use_adaptive_entropy": (args.use_adaptive_entropy, reason, "False"),
    }
    beside = f"`zero_variance_groups='drop'` and `loss_type={args.loss_type!r}`"
    refuse(args, refused, beside, "`zero_variance_groups='keep'`")


def check_penalty(args: Any) -> None:
    """What a (B, T) advantage would silently change is refused."""
    both = ["`discrepancy_level='sequence'`", "`importance_sampling_level='token'`"]
    levels = both if args.loss_type == "luspo" else both[::-1]  # LUSPO is a sequence's loss by its design
    refused = {
        "loss_type": (
            args.loss_type in ("sapo", "vespo"),
            "its weights depend on the sign of a sequence's advantage, which a token's penalty can flip",
            "a loss such as 'dapo', 'grpo', 'bnpo', 'dr_grpo' or 'cispo'",
        ),
        "importance_sampling_level": (
            args.importance_sampling_level == "sequence" and args.discrepancy_level == "token",
            "the objective has one ratio per sequence, but the penalty is per token",
            f"{levels[0]}, or {levels[1]}",
        ),
        "off_policy_mask_threshold": (
            args.off_policy_mask_threshold is not None,
            "the mask reads the sign of a sequence's advantage, which a token's penalty can flip",
            None,
        ),
    }
    refuse(args, refused, f"`constraint={args.constraint!r}`", "`constraint='none'`")


def check_drpo(args: Any) -> None:
    """Options beside which DRPO's weight would not be what it says, or would do nothing."""
    refused = {
        "vllm_importance_sampling_correction": (
            not args.vllm_importance_sampling_correction,
            "the weight is that of the correction, which is off",
            "True",
        ),
        "loss_type": (
            args.loss_type in ("sapo", "vespo"),
            "it has a weight of its own in the place of the ratio",
            "a loss such as 'dapo', 'grpo', 'bnpo', 'dr_grpo' or 'cispo'",
        ),
        "importance_sampling_level": (
            args.importance_sampling_level == "sequence",
            "the weight is a token's, and the objective would have one ratio for a sequence",
            "'token'",
        ),
        "use_bias_correction_kl": (
            args.beta != 0 and args.use_bias_correction_kl,
            "it takes the ratio to the policy before the update, which DRPO does not have",
            "False",
        ),
    }
    refuse(args, refused, "`vllm_importance_sampling_mode='drpo'`", "another mode, such as 'token_truncate'")


def check_guarding(args: Any) -> None:
    """Optimizers whose step cannot be left out when the gradient norm is known."""
    unmoved = any(word in _optim(args) for word in _MOVES_WITHOUT_GRADIENT)
    refused = {
        "optim": (
            steps_in_backward(args) or unmoved,
            "it averages weights in steps without a gradient too"
            if unmoved
            else "it steps within the backward, before the gradient norm is known",
            "another optimizer, such as 'adamw_torch_fused'",
        ),
    }
    refuse(args, refused, f"`gradient_guard={args.gradient_guard}`", "leave `gradient_guard` unset")
