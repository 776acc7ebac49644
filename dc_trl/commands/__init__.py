# SPDX-License-Identifier: Apache-2.0
"""The command line: `cli` finds a command, each sub-package is the command of its name."""
