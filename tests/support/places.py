# SPDX-License-Identifier: Apache-2.0
"""Where things lie in the checkout, for tests in whatever room."""

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
