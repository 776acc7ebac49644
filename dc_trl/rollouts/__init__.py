# SPDX-License-Identifier: Apache-2.0
"""Engines that sample completions; each offers TRL's two methods, `sync_weights` and `generate`."""
