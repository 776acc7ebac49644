# SPDX-License-Identifier: Apache-2.0
"""The study's command.

python examples/papers run                  # what has no line yet, in the protocol's order; stop and go on at will
python examples/papers run --only rounding  # of one block
python examples/papers run --quick          # a smoke of every regime and arm, kept apart and never counted
python examples/papers run --model Qwen/Qwen3-0.6B --engine vllm --results FOLDER  # elsewhere; not run by us
python examples/papers theory               # the calculations
python examples/papers write                # docs/results.md and its figures from the lines
python examples/papers list                 # how many lines there are of how many runs
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from papers.stack import Stack

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    from papers.blocks import BLOCKS, SEEDS
    from papers.results_file import RESULTS
    from papers.stack import ENGINES, Stack

    parser = argparse.ArgumentParser(
        prog="python examples/papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "theory", "write", "list"])
    parser.add_argument("--only", nargs="*", default=[], choices=list(BLOCKS), help="blocks; by default all")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--minutes", type=float, default=None, help="start no run after so many")
    parser.add_argument("--quick", action="store_true", help="two rollouts a run, one seed, results thrown away")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--starts", type=Path, default=Path("outputs/papers/starts"), help="warmed-up policies")
    parser.add_argument("--model", default=None, help="any causal model in place of the demo's policy")
    parser.add_argument("--engine", default=Stack.engine, choices=ENGINES, help="that samples; vllm needs --model")
    parser.add_argument("--learning_rate", type=float, default=Stack.learning_rate, help="with --model")
    parser.add_argument("--max_completion_length", type=int, default=Stack.max_completion_length, help="with --model")
    args = parser.parse_args(words)
    if args.engine != Stack.engine and args.model is None:
        parser.error("--engine vllm needs --model: the demo's policy is compared in the precisions of the protocol.")
    if args.model is not None and args.results == RESULTS and not args.quick:
        parser.error("--model needs --results: its lines are not those of the protocol's policy. Name another folder.")
    return args


def main(words: list[str] | None = None) -> None:
    """Does what the command line asks for."""
    args = parse_args(words)
    if args.what == "theory":
        from papers.theory.lines import write_lines

        write_lines(args.results)
    elif args.what == "write":
        from papers.page import write

        write(args.results)
    elif args.what == "list":
        from papers.blocks import count

        print(count(args.results))
    elif args.quick:
        from papers.quick import smoke

        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder), args.only, args.jobs, _stack(args))
    else:
        from papers import training  # noqa: F401 (loaded once, before the forks)
        from papers.runner import run_all

        until = None if args.minutes is None else time.time() + 60 * args.minutes
        run_all(args.results, args.starts, args.only, args.seeds, args.jobs, until, _stack(args))


def _stack(args: argparse.Namespace) -> "Stack":
    from papers.stack import Stack

    return Stack(args.model, args.engine, args.learning_rate, args.max_completion_length)
