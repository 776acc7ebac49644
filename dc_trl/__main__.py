# SPDX-License-Identifier: Apache-2.0
"""`python -m dc_trl` is `dc-trl`; Accelerate's launcher starts it so."""

from dc_trl.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
