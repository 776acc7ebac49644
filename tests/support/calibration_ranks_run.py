# SPDX-License-Identifier: Apache-2.0
"""`dc-trl calibrate` on one rank of a job that shards with FSDP2; takes its arguments."""

import sys

from distributed_run import shard_with_fsdp2

from dc_trl.commands.cli import main

if __name__ == "__main__":
    shard_with_fsdp2()
    sys.exit(main(["calibrate", *sys.argv[1:]]))
