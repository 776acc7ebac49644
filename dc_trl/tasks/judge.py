# SPDX-License-Identifier: Apache-2.0
"""The verdict of math-verify on one answer, and the program of the processes that give it.

The program has the standard library alone at its top, and imports neither torch nor the training script: an answer
that makes sympy hang costs its time limit and nothing else.
"""

import contextlib
import faulthandler
import json
import logging
import signal
import sys
from typing import Any

# A gold answer, and a completion that is right by it.
KNOWN = ("4", r"\boxed{4}")

# Bytes a worker may map: 9^(9^9) would take the machine's memory before its time is up. POSIX only.
_MEMORY_LIMIT = 4 << 30
_LONGEST_ANSWER = 1_000  # characters of it that are handed back


def judge(gold: str, text: str) -> str:
    """The verdict on one completion, here and without a time limit: right, wrong, error or unparsable_gold."""
    return examine(gold, text)[0]


def examine(gold: str, text: str) -> tuple[str, str]:
    """The verdict, and the answer that was found in the completion, as math-verify reads it; "" where none was."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    announced = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    options: dict[str, Any] = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
    expected = parse(_boxed(gold), **options)
    if not expected:
        return "unparsable_gold", ""
    answer: list[Any] = []
    try:
        answer = parse(
            text.rpartition("</think>")[2], announced, extraction_mode="first_match", raise_on_error=True, **options
        )
        right = verify(expected, answer, timeout_seconds=None, raise_on_error=True)
        return "right" if right else "wrong", _written(answer)
    except Exception:  # sympy and antlr raise most of what Python has
        return "error", _written(answer)


def _written(answer: list[Any]) -> str:
    """The first reading of an answer as text; "" where there is none, or it has no text."""
    try:
        return str(answer[0])[:_LONGEST_ANSWER]
    except Exception:  # no answer; a number of too many digits; what sympy raises
        return ""


def _boxed(gold: str) -> str:
    """A bare answer, such as `34` or `\\frac{1}{3}`, put in a box: unmarked LaTeX is not recognised as such."""
    marked = any(mark in gold for mark in ("\\boxed", "$", "\\(", "\\["))
    return gold if marked or not gold.strip() else f"\\boxed{{{gold}}}"


def _serve(timeout: float) -> None:
    """Answers a line of JSON, [gold, text], by a line, the verdict, a tab and the answer that was found, as JSON.

    Until standard input ends.
    """
    # Ctrl-C and a notebook's interrupt reach the whole process group: the parent decides, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for a verdict
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    logging.disable(logging.ERROR)  # its warnings that the timeout is off, and of each failed parse
    verdict = judge(*KNOWN)  # also loads what math-verify loads when it first parses
    print("ready" if verdict == "right" else _broken(verdict), file=answers, flush=True)
    for line in sys.stdin:
        # A parent that was killed kills no workers: a hanging one ends itself.
        faulthandler.dump_traceback_later(2 * timeout + 60, exit=True)
        verdict, found = examine(*json.loads(line))
        print(verdict, json.dumps(found), sep="\t", file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()


def _broken(verdict: str) -> str:
    from importlib.metadata import version

    gold, text = KNOWN
    return f"math-verify {version('math-verify')} judges {text} against the gold answer {gold} as {verdict}"


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
