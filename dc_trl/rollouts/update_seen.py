# SPDX-License-Identifier: Apache-2.0
"""How much of the training reaches the sampler: the weights' moves as trained and as deployed, over a fixed sample.

    seen = ⟨Δdeployed, Δtrained⟩ / ⟨Δtrained, Δtrained⟩

is 1 where the deployed weights follow the trained ones, or follow them in expectation; near 0 where rounding puts them
back where they were; and above 1 where rounding carries them further than the training did.
"""

import hashlib
from bisect import bisect
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

SAMPLE_LIMIT = 1_000_000
"""Most weights that are looked at. Six numbers of 4 bytes are kept for each."""

# Of a small model, a share of the weights that costs little beside the copy of all of them.
_SMALL_SHARE, _SMALL_LIMIT = 64, 1 << 16
# Tensors looked at, at most: what it costs to call operations on each does not grow with the depth.
_TENSORS = 32
# Neighbours that are taken together: a cache line of float32.
_RUN = 16


class UpdateSeen:
    """Compares, at every weight sync, the moves of a fixed sample of weights: as trained and as deployed.

    Between `begin` and `finish` each tensor is shown once to `observe`. The first sync is the reference for "since the
    start". That reference is what `state_dict` holds (8 MB at most): a run that resumes with it goes on counting from
    the start of the first run, one that resumes without it counts from its own first sync.

    Args:
        sizes: the number of elements of each tensor, by name, in any order that is the same on every rank.
        limit: most weights that are looked at; by default `SAMPLE_LIMIT`, and less of a small model.
    """

    def __init__(self, sizes: Mapping[str, int], limit: int | None = None) -> None:
        total = sum(sizes.values())
        if limit is None:
            limit = min(SAMPLE_LIMIT, max(total // _SMALL_SHARE, _SMALL_LIMIT))
        self._runs = _plan(sizes, limit)
        count = sum(runs.count for runs in self._runs.values())
        self._trained, self._deployed = torch.zeros(count), torch.zeros(count)
        self._last: tuple[Tensor, Tensor] | None = None
        self._start: tuple[Tensor, Tensor] | None = None

    def wants(self, name: str) -> bool:
        """Whether weights of this tensor are in the sample: `observe` ignores all others."""
        return name in self._runs

    def observe(self, name: str, trained: Tensor, deployed: Tensor) -> None:
        """Note the sampled weights of a tensor; both whole and of the same shape, on any device and of any dtype."""
        if name in self._runs:
            runs = self._runs[name]
            runs.read(trained, self._trained)
            runs.read(deployed, self._deployed)

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """The figures of a sync, after all its tensors were observed; none at the first, and no share without a move.

        Returns:
            `update_seen` since the last sync, `update_seen_since_start`, and `changed`, the fraction of the sampled
            weights that are deployed with another value than at the last sync.
        """
        now = (self._trained.clone(), self._deployed.clone())
        metrics: dict[str, float] = {}
        if self._last is not None:
            metrics["changed"] = float((now[1] != self._last[1]).float().mean())
            metrics |= _share("update_seen", now, self._last)
        if self._last is not None and self._start is not None:
            metrics |= _share("update_seen_since_start", now, self._start)
        self._last = now
        self._start = self._start or now
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The sample at the first sync, as trained and as deployed; empty before it."""
        return {} if self._start is None else {"trained": self._start[0], "deployed": self._start[1]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Count from the first sync of the run that saved this. A sample of another size is of another model: ignored.

        The share since the last sync begins anew.
        """
        if state and state["trained"].shape == self._trained.shape:
            self._start = (state["trained"], state["deployed"])


def _share(name: str, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> dict[str, float]:
    trained, deployed = now[0] - then[0], now[1] - then[1]
    moved = float(torch.dot(trained, trained))
    return {name: float(torch.dot(deployed, trained)) / moved} if moved > 0 else {}


class _Runs:
    """Runs of neighbours at a constant distance in a flattened tensor, and their place in the sample."""

    def __init__(self, first: int, rows: int, run: int, distance: int, place: int) -> None:
        self.first, self.rows, self.run, self.distance, self.place = first, rows, run, distance, place
        self.count = rows * run

    def read(self, tensor: Tensor, sample: Tensor) -> None:
        flat = tensor.detach().reshape(-1)  # detached, so that no graph grows behind the sample
        view = flat.as_strided((self.rows, self.run), (self.distance, 1), flat.storage_offset() + self.first)
        sample[self.place : self.place + self.count].view(self.rows, self.run).copy_(view)


def _plan(sizes: Mapping[str, int], limit: int) -> dict[str, _Runs]:
    """Equal shares of the sample for places that are equally far apart in the weights, laid end to end.

    They lie there by their size, so that each kind of tensor gets its share, and those of one size in an order that is
    as good as random. In the model's own order, every n-th tensor may be of one kind, such as the norm of each layer.
    """
    order = sorted((name for name, size in sizes.items() if size > 0), key=lambda name: (sizes[name], _shuffled(name)))
    ends = list(accumulate(sizes[name] for name in order))
    share = max(limit // _TENSORS - _RUN, _RUN)  # at most one run more comes of each
    hits = Counter(order[bisect(ends, (2 * i + 1) * ends[-1] // (2 * _TENSORS))] for i in range(_TENSORS) if ends)
    plan: dict[str, _Runs] = {}
    place = 0
    for name in sizes:
        if not hits[name]:
            continue
        run = min(_RUN, sizes[name])
        # A prime number of runs apart, and from another one on in each tensor, so that the runs do not stand in the
        # same few columns of matrices.
        every = _prime(-(-sizes[name] // max(hits[name] * share, run)))
        first = min(int.from_bytes(_shuffled(name), "little") % every * run, sizes[name] - run)
        rows = (sizes[name] - run - first) // (every * run) + 1
        plan[name] = _Runs(first, rows, run, every * run, place)
        place += plan[name].count
    return plan


def _shuffled(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _prime(least: int) -> int:
    """The smallest prime number that is not below `least`, or 1 for 1."""
    number = max(least, 1)
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
