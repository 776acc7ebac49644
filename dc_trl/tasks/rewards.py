# SPDX-License-Identifier: Apache-2.0
"""Accuracy of mathematical answers by math-verify, judged in worker processes that can be killed.

math-verify limits its time with `signal.alarm`, which works in the main thread of POSIX systems only and does not
interrupt a long C call. Here each worker is a Python process of its own (`dc_trl.tasks.judge`).
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

from dc_trl.tasks import judge
from dc_trl.tasks.workers import Workers

# None excludes a completion from its group's baseline and from the gradient (TRL's convention).
REWARDS: dict[str, float | None] = {
    "right": 1.0,
    "wrong": 0.0,
    "error": 0.0,
    "timeout": 0.0,
    "unparsable_gold": None,
}
COUNTED = ("error", "timeout", "unparsable_gold")


class GoldAnswerError(ValueError):
    """No gold answer of a batch can be used: every reward would be None, and nothing would be learnt."""


class MathAccuracyReward:
    r"""Reward 1.0 where the completion's final answer equals the gold answer, else 0.0; None without a usable gold.

    The answer must be in `\boxed{}` or announced ("Answer: 42", "the final answer is 42"); a box counts before an
    announcement, two different boxes are a wrong answer, and text up to the last `</think>` is not read. An answer
    that takes too long or breaks the parser earns 0.0. A gold answer that cannot be parsed, or is None, gives None.

    The workers start at construction, which waits until one of them has judged a known answer. The training thread
    waits for the verdicts but computes none of them: at most `(timeout + start) * ceil(completions / workers)`
    seconds, where `start` is what a worker takes to load (1 to 2 s on an idle core). The successor of a worker that
    was killed starts at once and one more worker is kept, so `start` is waited for only where answers time out in
    quick succession. `counts` holds totals per verdict; the shares of errors, timeouts and unparsable golds are logged
    at each call.

    Args:
        timeout: seconds for one completion, gold included.
        workers: processes that judge at once; each rank of a distributed run has its own.

    Raises:
        ImportError: math-verify is not installed, does not work, or is too old to judge without its own time limit.
    """

    __name__ = "accuracy"

    def __init__(self, timeout: float = 5.0, workers: int = 4) -> None:
        if timeout <= 0 or workers < 1:
            raise ValueError(f"`timeout` is {timeout} and `workers` {workers}: use a positive time and 1 or more.")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("The accuracy reward needs math-verify: pip install 'dc-trl[math]'.")
        self.timeout = timeout
        self.workers = workers
        self.counts: Counter[str] = Counter()
        self._workers: Workers | None = self._start()
        try:
            self._workers.wait()
        except RuntimeError as error:
            self.close()
            raise ImportError(
                f"{error} Before 0.8.0 math-verify judges nothing without its own time limit: pip install "
                f"'math-verify>=0.8.0'. Check too that `{sys.executable} -c 'import math_verify'` works."
            ) from error

    def __call__(
        self,
        completions: list[Any],
        solution: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of `completions` (texts, or message lists) against the gold answers in `solution`.

        `log_extra` gets the answers that were found in the completions, as `answer`; None where none was.

        Raises:
            GoldAnswerError: none of the gold answers can be used, and there are several, or none ever could.
            TypeError, ValueError: `solution` is no list of texts, numbers and Nones, one for each completion.
            RuntimeError: a worker did not start.
        """
        judgements = self._judge(completions, solution)
        verdicts = [verdict for verdict, _ in judgements]
        if log_extra is not None:
            log_extra("answer", [answer for _, answer in judgements])
        found = Counter(verdicts)
        for name in COUNTED:
            if log_metric is not None:  # each name at each call on each rank, because TRL gathers the values
                log_metric(f"math_verify/{name}", found[name] / max(len(verdicts), 1))
        if found["unparsable_gold"] == len(verdicts) > 0:
            self._refuse_golds(solution)
        return [REWARDS[verdict] for verdict in verdicts]

    def verdicts(self, completions: Sequence[Any], solution: Sequence[Any]) -> list[str]:
        """The verdict on each completion, a key of `REWARDS`; a batch without usable gold answers is no error here.

        Raises:
            TypeError, ValueError, RuntimeError: as for a call.
        """
        return [verdict for verdict, _ in self._judge(completions, solution)]

    def _judge(self, completions: Sequence[Any], solution: Sequence[Any]) -> list[tuple[str, str | None]]:
        """The verdict on each completion, and the answer that was found in it."""
        if isinstance(solution, str) or len(solution) != len(completions):
            count = "is a text" if isinstance(solution, str) else f"has {len(solution)} entries"
            raise ValueError(
                f"`solution` {count} for {len(completions)} completions: give a list with one gold answer for each "
                "completion, as TRL makes it of the data set's column `solution`."
            )
        golds = [_gold(value, place) for place, value in enumerate(solution)]
        if self._workers is None:
            self._workers = self._start()
        with ThreadPoolExecutor(self.workers) as threads:
            judgements = list(threads.map(self._ask, golds, map(_text, completions)))
        self.counts += Counter(verdict for verdict, _ in judgements)
        return judgements

    def _ask(self, gold: str | None, text: str) -> tuple[str, str | None]:
        assert self._workers is not None
        if gold is None:
            return "unparsable_gold", None
        reply, late = self._workers.ask([gold, text])
        if not reply:
            return "timeout" if late else "error", None
        verdict, _, answer = reply.partition("\t")
        return verdict, (json.loads(answer) or None) if answer else None

    def _start(self) -> Workers:
        return Workers(str(judge.__file__), self.workers, self.timeout)

    def _refuse_golds(self, solution: Sequence[Any]) -> None:
        """Raises, unless the batch has a single gold answer and others were usable: then it is one bad row."""
        golds = list(dict.fromkeys(map(repr, solution)))
        if len(golds) == 1 and self.counts.total() > self.counts["unparsable_gold"]:
            return
        raise GoldAnswerError(
            f"math-verify can use none of the gold answers of a batch ({len(solution)} completions): "
            f"{', '.join(golds[:3])}{', …' if len(golds) > 3 else ''}. Every reward would be None, and nothing would "
            "be learnt. `solution` must hold final answers, such as '34' or '\\frac{1}{3}': choose another "
            "`answer_column`, or correct the data."
        )

    def close(self) -> None:
        """Ends the workers; the next call starts new ones."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_workers": None}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()


def load_rewards(names: list[str], timeout: float, workers: int) -> list[Callable[..., Any]]:
    """Reward functions by name: `accuracy`, or the dotted path of a function or class instance of your own.

    Raises:
        ValueError: for a name that is neither, naming what was looked for.
    """
    return [MathAccuracyReward(timeout, workers) if name == "accuracy" else _imported(name) for name in names]


def _imported(path: str) -> Callable[..., Any]:
    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module beside the recipe, as TRL's scripts allow
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"Reward function {path!r} was not found ({error}). Use 'accuracy', or the dotted path of a function, "
            "such as 'my_rewards.brevity' for `brevity` in my_rewards.py in the current directory."
        ) from error


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _gold(value: Any, place: int) -> str | None:
    """A gold answer as text; None for what is no answer: None, NaN and the infinities.

    Raises:
        TypeError: it is neither text, nor number, nor None.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Rational) and not isinstance(value, bool):  # whole numbers are
        return str(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{Decimal(repr(float(value))):f}" if math.isfinite(value) else None
    raise TypeError(
        f"The gold answer {place} in `solution` is {value!r}, of type {type(value).__name__}: give a text or a "
        "number, or None where there is none."
    )
