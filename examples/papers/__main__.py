# SPDX-License-Identifier: Apache-2.0
"""`python examples/papers`: finds the modules of demo and benchmarks and the package around this file, then runs."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[0:1] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]

from papers.command import main  # noqa: E402

if __name__ == "__main__":
    main()
