# SPDX-License-Identifier: Apache-2.0
"""What is trained on: problems, and the rewards that judge answers to them."""
