# SPDX-License-Identifier: Apache-2.0
"""`dc-trl report`: one HTML file about one or several runs."""
