# SPDX-License-Identifier: Apache-2.0
"""The token logs of runs, cut to what a page can hold."""
