# SPDX-License-Identifier: Apache-2.0
"""`dc-trl export`: the policy as it samples, as a model directory in the sampler's precision."""
