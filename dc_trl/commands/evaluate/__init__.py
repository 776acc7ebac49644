# SPDX-License-Identifier: Apache-2.0
"""`dc-trl evaluate`: the papers' benchmarks, sampled at the deployment precision, with a standard error and a resume.

Libraries do what they are best at: `datasets` loads, vLLM samples, math-verify judges, `huggingface_hub` writes the
model card. The loop between them is this package's. Evaluation libraries were read for it (docs/evaluation.md has the
findings): none of them samples with a low-precision copy of the policy in this process, and the ones that run on this
package's range of vLLM either do not keep finished samples of a stochastic run, or reach vLLM through a server only.
"""
