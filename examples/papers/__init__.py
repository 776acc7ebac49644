# SPDX-License-Identifier: Apache-2.0
"""The study: what the papers claim, and what makes discrepancy, on small models with real engine discrepancy."""
