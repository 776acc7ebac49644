# SPDX-License-Identifier: Apache-2.0
"""What tests read of a calibration.json."""

from typing import Any


def statuses(found: dict[str, Any]) -> dict[str, str]:
    """Status of each check in calibration.json."""
    return {check["name"]: check["status"] for check in found["checks"]}
