# SPDX-License-Identifier: Apache-2.0
"""What the trainer is put together from, beside the maths and the engines."""
