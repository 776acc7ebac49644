# SPDX-License-Identifier: Apache-2.0
"""Which sampling options leave the sampling distribution, and the log-prob that is read as μ, as they are.

The trainer scores a token under softmax(logits / temperature). An option that makes the engine draw from anything else
gives the discrepancy a floor that no agreement of the engines removes; one that makes the engine report several
log-probs a token makes TRL read the likeliest token's. `OPTIONS` names the options that are known not to, with the
values at which they do nothing. It was decided from the fields of vLLM's `SamplingParams` (0.31), from how TRL
(1.15, 1.16) reads its output (`extract_logprobs`), and from transformers' `GenerationConfig` (5.17). What it does not
name is refused: an option of a later vLLM is harmful until somebody has looked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dc_trl.rollouts.versions import TRUNCATION_CORRECTED, trl_is, trl_version

# The engine that is to take an option: vLLM, the copy of the policy in this process, or a `rollout_func`'s own.
VLLM, IN_PROCESS, ANY_ENGINE = "vllm", "transformers", "any"

_RESHAPES = (
    "it truncates or shifts the sampling distribution, so the engines' probabilities of a token differ even when they "
    "agree"
)
_READS = "TRL would read the first log-prob that comes back, which need no longer be the sampled token's"
_UNKNOWN = "it is not among the options that are known to leave sampling distribution and log-probs as they are"


@dataclass(frozen=True)
class Option:
    """What is known of one sampling option.

    Attributes:
        neutral: values at which it does nothing, so that every engine can take them.
        free: whether an engine that follows it may take any value, since none changes the distribution or the
            log-prob that is read. The in-process engine does not follow it.
        same_as: field of the config whose value is neutral, too.
        truncates: whether it samples from a part of the distribution, which depends on the version of TRL.
        vllm: whether vLLM knows it; otherwise it is one of transformers' alone.
        unset_by_none: whether None does nothing, too, except to vLLM, which fails on it.
        reason: why another value is refused.
        instead: what to set in its place, for `same_as` and `free`.
    """

    neutral: tuple[Any, ...] = ()
    free: bool = False
    same_as: str | None = None
    truncates: bool = False
    vllm: bool = True
    unset_by_none: bool = False
    reason: str = _RESHAPES
    instead: str = ""


OPTIONS: dict[str, Option] = {
    "temperature": Option(
        same_as="temperature",
        reason="the trainer scores at `temperature` = {temperature}: the discrepancy would measure the temperature",
        instead="Set `temperature` alone",
    ),
    "top_p": Option((1.0,), unset_by_none=True, truncates=True),
    "top_k": Option((0, -1), unset_by_none=True, truncates=True),
    "min_p": Option((0.0,), unset_by_none=True, truncates=True),
    "repetition_penalty": Option((1.0,), unset_by_none=True),
    "presence_penalty": Option((0.0,)),
    "frequency_penalty": Option((0.0,)),
    "logit_bias": Option((None, {})),
    "bad_words": Option((None, [])),
    "allowed_token_ids": Option((None,)),
    "structured_outputs": Option((None,)),
    "min_tokens": Option((0,)),  # above 0, the end-of-sequence token is masked until then
    "thinking_token_budget": Option((None, -1)),  # forces the end of thinking
    "trace_decode_token_ids": Option((None,)),  # forces tokens
    "watermarking": Option((False,)),
    "extra_args": Option((None, {})),  # for sampling code that nobody here knows
    "n": Option(reason="TRL asks for `num_generations` completions itself", instead="Set `num_generations`"),
    # How log-probs come back
    "logprobs": Option((0,), reason=_READS),
    "logprob_token_ids": Option((None, []), reason=_READS),
    "flat_logprobs": Option((False,), reason=_READS),
    # When a completion ends: the tokens before that are drawn as ever
    "max_tokens": Option(free=True, same_as="max_completion_length", instead="Set `max_completion_length`"),
    "stop": Option((None, []), free=True),
    "stop_token_ids": Option((None, []), free=True),
    "ignore_eos": Option((False,), free=True),
    "repetition_detection": Option((None,), free=True),
    # Randomness, text, prompt and caches
    "seed": Option((None,), free=True, instead="Its draws follow `seed` of the config"),
    "detokenize": Option((True, False), free=True),
    "skip_special_tokens": Option((True, False), free=True),
    "spaces_between_special_tokens": Option((True, False), free=True),
    "include_stop_str_in_output": Option((True, False), free=True),
    "prompt_logprobs": Option((None,), free=True),
    "skip_reading_prefix_cache": Option((None, False), free=True),
    "routed_experts_prompt_start": Option((0,), free=True),
    # transformers' own names
    "do_sample": Option((True,), vllm=False, reason="rollouts are drawn at random"),
    "max_new_tokens": Option(
        free=True, same_as="max_completion_length", vllm=False, instead="Set `max_completion_length`"
    ),
    "use_cache": Option((None, True), vllm=False),
    "num_beams": Option((None, 1), vllm=False),
    "typical_p": Option((None, 1.0), vllm=False),
    "top_h": Option((None,), vllm=False),
    "epsilon_cutoff": Option((None, 0.0), vllm=False),
    "eta_cutoff": Option((None, 0.0), vllm=False),
    "encoder_repetition_penalty": Option((None, 1.0), vllm=False),
    "no_repeat_ngram_size": Option((None, 0), vllm=False),
    "encoder_no_repeat_ngram_size": Option((None, 0), vllm=False),
    "min_length": Option((None, 0), vllm=False),
    "min_new_tokens": Option((None, 0), vllm=False),
    "bad_words_ids": Option((None, []), vllm=False),
    "suppress_tokens": Option((None, []), vllm=False),
    "begin_suppress_tokens": Option((None, []), vllm=False),
    "sequence_bias": Option((None, {}), vllm=False),
    "guidance_scale": Option((None, 1.0), vllm=False),
}


def objection(
    name: str, value: Any, engine: str, settings: Mapping[str, Any], without: str = "`constraint='none'`"
) -> str | None:
    """Why an engine must not be given a sampling option, and the way out; None if it may be.

    Args:
        name: of the option.
        value: of the option.
        engine: `VLLM`, `IN_PROCESS` or `ANY_ENGINE`.
        settings: `temperature` and `max_completion_length` of the run.
        without: the setting with which nothing compares the engines.

    Returns:
        Two sentences, the first without a capital, for an error that has named option and value.
    """
    option = OPTIONS.get(name)
    if option is None:
        return f"{_UNKNOWN}. {_way_out(engine, None, without)}"
    if engine == VLLM and not option.vllm:
        return "vLLM has no such option. Leave it unset."
    if value is None and option.unset_by_none:
        return "vLLM does not take None for it. Leave it unset." if engine == VLLM else None
    if (option.free and engine != IN_PROCESS) or value in option.neutral:
        return None
    if option.same_as is not None and value == settings[option.same_as]:
        return None
    reason = "this engine does not follow it" if option.free else option.reason.format(**settings)
    if option.truncates and engine != IN_PROCESS:
        reason += _truncation_in_trl()
    return f"{reason}. {_way_out(engine, option, without)}"


def _truncation_in_trl() -> str:
    """What the installed TRL makes of truncated sampling, to follow the reason."""
    if trl_is(TRUNCATION_CORRECTED):
        return f". TRL {trl_version()} corrects its importance sampling for that, but no constraint was tried with it"
    return f". TRL {trl_version()} scores under the whole softmax; it corrects for truncation from 1.17 on"


def _way_out(engine: str, option: Option | None, without: str) -> str:
    """The remedy: what to set, and which engine takes the option, under which constraint."""
    first = option.instead if option and option.instead else "Leave it unset"
    if engine != IN_PROCESS:
        return f"{first}, or use {without}."
    if option and option.free and option.vllm:
        return f"{first}, or leave `rollout_backend` unset and use vLLM (`use_vllm=True`), which follows it."
    return (
        f"{first}, or use {without} and leave `rollout_backend` unset: then TRL's own generation takes it, and so "
        "does vLLM with `use_vllm=True`."
    )


def check_decoding(temperature: float, max_completion_length: int) -> None:
    """Refuses what the in-process engine cannot decode with.

    Raises:
        ValueError: temperature not above 0, or no token to a completion.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}, but rollouts are drawn at random, so it must be above 0; for greedy "
            "decoding in evaluation call generate(..., greedy=True)."
        )
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length is {max_completion_length}; a completion has at least 1 token.")
