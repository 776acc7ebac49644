# SPDX-License-Identifier: Apache-2.0
"""What of a configuration may be shown: in logs, cards, reports, recipes, results, file names and messages.

Two rules, because there are two kinds of places:

- `shown` says what is *allowed*, for whatever this package writes of a configuration. A list of names that look like
  secrets misses the next one, and `vllm_engine_kwargs` takes any of some two hundred arguments; what a reader needs
  are numbers, switches and the words of a few closed lists.
- `without_secrets` says what is *forbidden*, for what others make of the whole configuration and which must stay
  whole: the saved arguments, and what transformers hands to trackers. It hides texts under names of secrets, and
  the credentials in an address.

Addresses of servers may hold no credentials at all (`check_address`): TRL's client and `requests` print them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

HIDDEN = "(not shown)"

# Fields, and arguments of engines, whose values are words of a list that somebody published.
WORDS = frozenset(
    {
        "advantage_estimator",
        "architectures",
        "attention_backend",
        "backend",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "config_format",
        "constraint",
        "convert",
        "discrepancy_average",
        "discrepancy_level",
        "discrepancy_metric",
        "distributed_executor_backend",
        "dtype",
        "kv_cache_dtype",
        "linear_backend",
        "load_format",
        "log_format",
        "logprobs_mode",
        "loss_type",
        "lr_scheduler_type",
        "mamba_backend",
        "mamba_cache_dtype",
        "mamba_ssm_cache_dtype",
        "method",
        "model_impl",
        "moe_backend",
        "prompt_format",
        "quant_algo",
        "quant_method",
        "quantization",
        "rejection",
        "rollout_backend",
        "rollout_precision",
        "runner",
        "sync_rounding",
        "tokenizer_mode",
        "vllm_importance_sampling_mode",
        "vllm_mode",
        "weight_sync",
        "zero_variance_groups",
    }
)
# Shorter than any token of the Hub's, of Weights & Biases' or of a cloud's.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,31}")

_SECRET = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|credentials?|auth|authorization|cookie|(api|access|private)?_?key)$",
    re.IGNORECASE,
)
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")


def shown(name: str, value: Any) -> Any:
    """A setting as it may be shown: numbers, switches, null, and words under a name of `WORDS`; all else is `HIDDEN`.

    Args:
        name: of the field, or of the argument within one.
        value: of any type. Mappings keep their keys, and lists their length.

    Returns:
        A value of JSON's types.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): shown(str(key), member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [shown(name, member) for member in value]
    return value if isinstance(value, str) and name in WORDS and _WORD.fullmatch(value) else HIDDEN


def mark(name: str, value: Any) -> str | None:
    """Ten hexadecimal digits that tell settings apart which look alike when shown; None where nothing is hidden.

    What a name calls a secret is not in it: a token decides nothing about what is sampled.
    """
    if shown(name, value) == value:
        return None
    text = json.dumps(without_secrets(name, value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:10]


def without_secrets(name: str, value: Any) -> Any:
    """A setting as it is, except for texts under the name of a secret and credentials in addresses.

    Args:
        name: of the field, or of the argument within one.
        value: of any type; what is neither a text nor holds any is returned as it is.
    """
    if isinstance(value, str):
        if _SECRET.search(name) and value:
            return HIDDEN
        return _CREDENTIALS.sub("", value)
    if type(value) is dict:
        return {key: without_secrets(str(key), member) for key, member in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(name, member) for member in value)
    return value


def shown_address(address: str) -> str:
    """Scheme, host and port of an address, and nothing that stands before or behind them."""
    scheme, place = _split(address)
    return scheme + place.rpartition("@")[2]


def check_address(name: str, address: str) -> None:
    """Refuses credentials in the address of a server, which its clients would print and record.

    Args:
        name: of the setting that holds it.
        address: with or without scheme and path.

    Raises:
        ValueError: there are some; the message leaves them out.
    """
    if "@" in _split(address)[1]:
        raise ValueError(
            f"`{name}` has a user or password before {shown_address(address)}, which TRL's client would print and "
            "trackers would record. Leave them out, and write them into ~/.netrc, where the client looks for them."
        )


def _split(address: str) -> tuple[str, str]:
    """The scheme with its `://`, or nothing, and what stands between it and the path."""
    before, separator, after = address.partition("://")
    scheme, rest = (before + separator, after) if separator else ("", before)
    return scheme, re.split(r"[/?#]", rest, maxsplit=1)[0]
