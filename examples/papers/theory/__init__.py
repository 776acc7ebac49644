# SPDX-License-Identifier: Apache-2.0
"""The papers' theory, calculated: nothing here trains."""
