# SPDX-License-Identifier: Apache-2.0
"""What differs between versions of TRL, and from which one on: the only places where its number is asked for."""

from importlib.metadata import version

TORCH_HEAD = (1, 16)
"""The fused head that gives log-probs is in torch too; before, it was a Triton kernel alone."""
TRUNCATION_CORRECTED = (1, 17)
"""Importance sampling is "unbiased under top-k, top-p and min-p" (release notes of 1.17.0). Whether the log-probs then
mean one distribution under a constraint as well, nobody has tried."""


def trl_version() -> str:
    """The installed version of TRL, as `1.16.0`."""
    return version("trl")


def trl_is(since: tuple[int, int]) -> bool:
    """Whether the installed TRL is of a version or newer, given as (major, minor)."""
    major, minor = trl_version().split(".")[:2]
    return (int(major), int(minor)) >= since
