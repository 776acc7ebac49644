# SPDX-License-Identifier: Apache-2.0
"""The precisions of the in-process engine's copy of the policy, by the names that `rollout_precision` takes."""

CAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""Every floating-point weight is cast to this dtype of torch's."""

INTEGER_BITS = {"int8": 8, "int4": 4, "int3": 3}
"""Weights of the layers inside the blocks are rounded to integers of so many bits."""

QUANTIZED_PRECISIONS = ("fp8", *INTEGER_BITS)
"""Only weights inside the blocks are rounded; the rest stays in the dtype of the multiplication."""

PRECISIONS = (*CAST_DTYPES, *QUANTIZED_PRECISIONS)
