# SPDX-License-Identifier: Apache-2.0
"""How the policy gradient is estimated from samples of another engine: advantages of groups, weights, rejection."""
