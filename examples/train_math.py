# SPDX-License-Identifier: Apache-2.0
"""Train on mathematical problems with DC-GRPO; the script form of `dc-trl train`.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml examples/train_math.py \
        --config examples/configs/qwen3_8b_bf16.yaml

Any option of the YAML file can be given as a flag, which wins. Add `--dry_run` to see the plan and train nothing.
"""

import sys

from dc_trl.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
