# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate`: the discrepancy of a model and an engine before training, and whether the engine is healthy.

From the bottom up: `scores` (statistics of what was sampled), `grid` (what rounding at the sync means for them),
`checks` (verdicts and the tolerance), `nudge` and `measure` (the passes, on the recipe's own trainer), `recipe` (one
value in a YAML file), `output`, `picture` and `command`.
"""
