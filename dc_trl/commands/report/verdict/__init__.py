# SPDX-License-Identifier: Apache-2.0
"""The strip on top of the report: what is in range, what is not, and where to read on."""
