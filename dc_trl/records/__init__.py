# SPDX-License-Identifier: Apache-2.0
"""What a run writes down and reads back: its log, its tokens, scores, and the card of its model."""
