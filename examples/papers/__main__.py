# SPDX-License-Identifier: Apache-2.0
"""`python examples/papers`: finds the demo's modules and the package around this file, then runs the command."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from papers.command import main  # noqa: E402

if __name__ == "__main__":
    main()
