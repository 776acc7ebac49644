# SPDX-License-Identifier: Apache-2.0
"""Kills training runs with SIGKILL at seeded moments, resumes each, and compares it with the run that nobody killed.

Two kinds of run: `replayed`, whose rollouts come from a `rollout_func` and whose completions surge, and `engine`, with
the in-process int4 engine and its weight syncs. A kill is aimed at a phase, and falls at one of the calls of functions
that Python makes in it, drawn evenly; or it falls at any time, by the clock of the parent. Everything that is random
follows from `--seed`, but for the clock's kills.

    python examples/benchmarks/kills.py                        # 20 kills, some minutes on two CPU cores
    python examples/benchmarks/kills.py --kills 3 --json -     # figures as JSON
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

CLOCK = "clock"
PHASES = ("starting", "training", "generation", "syncing", "writing the card", "saving")
# Of each round of ten kills. Saving comes most often, as that is where something can be left half-written.
AIMS = (
    ("replayed", "saving"),
    ("engine", "syncing"),
    ("engine", "saving"),
    ("replayed", "generation"),
    ("engine", CLOCK),
    ("replayed", "training"),
    ("engine", "generation"),
    ("replayed", CLOCK),
    ("engine", "training"),
    ("replayed", "saving"),
)
STEPS = {"replayed": 52, "engine": 12}
SAVE_STEPS = {"replayed": 8, "engine": 3}
DUAL_RATES = {"replayed": 0.1, "engine": 5.0}
SURGE_FROM = 36
COMPARED = ("multiplier", "tolerance", "rate", "surge", "step", "weights")
# TRL and transformers count these anew in a resumed run, or measure the clock.
NOT_COMPARED = ("num_tokens", "step_time")


class Moments:
    """Knows in which phase a process is, counts the calls made in each visit to one, and kills it at the chosen call.

    Args:
        aim: phase, number of the visit and of the call in it; None for no kill.
        counting: count the calls in all phases.
        place: shared memory that holds the number of the phase.
    """

    def __init__(self, aim: tuple[str, int, int] | None, place: Any, counting: bool) -> None:
        self.aim, self.place, self.counting = aim, place, counting
        self.phases = ["starting"]
        self.visits: dict[str, list[int]] = defaultdict(list)

    def counts(self, phase: str) -> bool:
        """Whether the calls in a phase are wanted. Counting slows them down."""
        return self.counting if self.aim is None else self.aim[0] == phase

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The time in a phase. One within another counts for the inner one."""
        self.visits[phase].append(0)
        self._enter([*self.phases, phase])
        try:
            yield
        finally:
            self._enter(self.phases[:-1])

    def _enter(self, phases: list[str]) -> None:
        sys.setprofile(None)
        self.phases, self.place.value = phases, PHASES.index(phases[-1])
        if len(phases) > 1 and self.counts(phases[-1]):
            sys.setprofile(self._count)

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        if event.endswith("return"):
            return
        phase = self.phases[-1]
        self.visits[phase][-1] += 1
        if self.aim == (phase, len(self.visits[phase]), self.visits[phase][-1]):
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, as a phase."""

        @wraps(method)  # a checkpoint keeps the name of its run's `rollout_func`
        def announced(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return method(*args, **kwargs)

        return announced


def replayed(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions and log-probs that depend on prompt, place and step alone; longer from `SURGE_FROM` on."""
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    length = 12 if trainer.state.global_step >= SURGE_FROM else 3
    completions = [[3 + (7 * len(ids) + 3 * i + t) % 50 for t in range(length)] for i, ids in enumerate(prompt_ids)]
    logps = [[-4.1 - 0.05 * (t % 4) for t in range(length)] for _ in completions]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logps}


def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def build_trainer(kind: str, folder: str) -> Any:
    """The trainer of a run: a random two-layer Qwen3 under the constraint, with length-decay."""
    from datasets import Dataset
    from step_time import build_policy
    from transformers import PrinterCallback

    from dc_trl import DCGRPOConfig, DCGRPOTrainer

    model, tokenizer = build_policy(argparse.Namespace(vocab=64, hidden=64, layers=2, tokens=64, bf16=False))
    engine = {"rollout_backend": "transformers", "rollout_precision": "int4", "length_decay_period": 5}
    surge = {"length_decay_factor": 0.3}
    args = DCGRPOConfig(
        folder,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        learning_rate=3e-3,
        max_steps=STEPS[kind],
        logging_steps=1,
        save_steps=SAVE_STEPS[kind],
        disable_tqdm=True,
        dual_lr=DUAL_RATES[kind],
        tolerance_calibration_batches=2,
        length_decay=True,
        **(engine if kind == "engine" else surge),
    )
    data = Dataset.from_dict(
        {"prompt": [" ".join("a" * (1 + i % 7)) for i in range(128)]}
    )  # one epoch, see docs/quickstart.md
    rollouts = {"rollout_func": replayed} if kind == "replayed" else {}
    trainer = DCGRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer, **rollouts)
    trainer.remove_callback(PrinterCallback)
    return trainer


def announce(trainer: Any, moments: Moments) -> None:
    """Has a trainer's phases told to `moments`."""
    trainer.training_step = moments.wrapped("training", trainer.training_step)
    # By far the most calls of a save, before there is anything of the checkpoint.
    trainer.create_model_card = moments.wrapped("writing the card", trainer.create_model_card)
    trainer._save_checkpoint = moments.wrapped("saving", trainer._save_checkpoint)
    if trainer.rollout_func is not None:
        trainer.rollout_func = moments.wrapped("generation", trainer.rollout_func)
    else:
        engine = trainer.vllm_generation
        engine.generate = moments.wrapped("generation", engine.generate)
        engine.sync_weights = moments.wrapped("syncing", engine.sync_weights)


def train(kind: str, folder: str, resume: bool, aim: Any, counting: bool, place: Any, began: Any) -> None:
    """A run, in a process of its own: writes what it came to beside its folder, if it lives to do so."""
    import torch

    from dc_trl.records.whole_files import write_whole

    torch.set_num_threads(1)
    trainer, moments = build_trainer(kind, folder), Moments(aim, place, counting=counting)
    announce(trainer, moments)
    began.set()
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    result = outcome(trainer) | {"visits": moments.visits, "seconds": time.monotonic() - start}
    write_whole(Path(f"{folder}.json"), json.dumps(result))


def outcome(trainer: Any) -> dict[str, Any]:
    """What a run came to: what the constraint and the rate hold, weights as a digest, and each logged value."""
    from dc_trl.records.run_reader import read_run

    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    logged = [
        {key: value for key, value in entry.items() if key not in NOT_COMPARED}
        for entry in read_run(Path(trainer.args.output_dir)).entries
        if "train_runtime" not in entry  # a summary of this process alone
    ]
    return {
        "multiplier": trainer.dual.value,
        "tolerance": trainer.discrepancy_tolerance,
        "rate": trainer.optimizer.param_groups[0]["lr"],
        "surge": trainer._length_decay.state()["attributes"]["progress"],
        "step": trainer.state.global_step,
        "weights": digest.hexdigest(),
        "logged": logged,
    }


def start(kind: str, folder: Path, resume: bool = False, aim: Any = None, counting: bool = False) -> tuple[Any, ...]:
    """Starts a run. Returns its process, the shared number of its phase, and the event that it has begun to train."""
    context = multiprocessing.get_context("forkserver")  # each run is a fork of one that has loaded the libraries
    context.set_forkserver_preload(["dc_trl.trainer", "datasets", "transformers.models.qwen3"])
    place, began = context.Value("i", 0), context.Event()
    process = context.Process(target=train, args=(kind, str(folder), resume, aim, counting, place, began))
    process.start()
    return process, place, began


def finish(kind: str, folder: Path, resume: bool, counting: bool = False) -> dict[str, Any]:
    """Runs to the end, and returns the outcome.

    Raises:
        RuntimeError: the run failed.
    """
    process, *_shared = start(
        kind, folder, resume, counting=counting
    )  # shared memory is there for as long as it has a name here
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the {kind} run in {folder} ended with {process.exitcode}: see its output above.")
    return dict(json.loads(Path(f"{folder}.json").read_text()))


def draw_aim(kind: str, phase: str, visits: list[int], chance: random.Random) -> tuple[str, int, int]:
    """A call in a phase, of a visit after the first checkpoint. All but saving is visited once a step."""
    visit = chance.randrange(1 if phase == "saving" else SAVE_STEPS[kind], len(visits))
    return phase, visit + 1, chance.randint(1, visits[visit])


def whole(checkpoint: Path, reference: Path) -> bool:
    """Whether a checkpoint has every file of the one that nobody interrupted, judged without the library."""
    names = {path.name for path in checkpoint.iterdir()}
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return names >= {path.name for path in (reference / checkpoint.name).iterdir()}


def differences(result: dict[str, Any], reference: dict[str, Any], resumed_from: int) -> list[str]:
    """What a run came to that is not what the reference came to; of the log, the keys, with their first step."""
    found = [name for name in COMPARED if result[name] != reference[name]]
    if [entry["step"] for entry in result["logged"]] != [entry["step"] for entry in reference["logged"]]:
        found.append("logged steps")
    first: dict[str, int] = {}
    for ours, theirs in zip(result["logged"], reference["logged"], strict=False):
        for key in ours.keys() | theirs.keys():
            # The first sync of a process has none before it to be measured against.
            first_sync = key.startswith("dc/sync/") and theirs["step"] == resumed_from + 1
            if ours.get(key) != theirs.get(key) and not first_sync:
                first.setdefault(key, theirs["step"])
    return found + [f"{key} from step {step}" for key, step in sorted(first.items())]


def kill(kind: str, phase: str, folder: Path, reference: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Kills one run, resumes it, and says where it was killed and in what it differs from the reference."""
    aim = None if phase == CLOCK else draw_aim(kind, phase, reference["visits"][phase], chance)
    process, place, began = start(kind, folder, aim=aim)
    if phase == CLOCK:
        began.wait()
        process.join(0.5 * chance.random() * reference["seconds"])  # which counting has doubled, or nearly
        process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the {kind} run in {folder} ended with {process.exitcode}, not by a kill.")
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    good = [path for path in found if whole(path, reference["folder"])]
    # A run that had ended before the clock's kill is compared as it is.
    ended = process.exitcode == 0
    result = json.loads(Path(f"{folder}.json").read_text()) if ended else finish(kind, folder, resume=bool(good))
    starts = [json.loads(line)["start"]["step"] for line in (folder / "log.jsonl").open() if '{"start"' in line]
    return {
        "run": kind,
        "aimed_at": phase,
        "killed_in": PHASES[place.value] if process.exitcode else "not killed: it had ended",
        "checkpoints": len(found),
        "passed_over": len(found) - len(good),
        "resumed_from": starts[-1],
        "newest_whole": int(good[-1].name.split("-")[1]) if good and not ended else 0,
        "multiplier": round(result["multiplier"], 4),
        "differs_in": differences(result, reference, starts[-1]),
    }


def measure(kills: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """One entry for each kill."""
    chance, references, entries = random.Random(seed), {}, []
    for number in range(kills):
        kind, phase = AIMS[number % len(AIMS)]
        if kind not in references:
            references[kind] = finish(kind, folder / kind, resume=False, counting=True) | {"folder": folder / kind}
        entry = kill(kind, phase, folder / f"{kind}-{number}", references[kind], chance)
        print(json.dumps(entry), file=sys.stderr, flush=True)
        entries.append(entry)
    return entries


def main() -> int:
    """Prints the figures; the status is 1 if a resumed run differs, or did not go on from the newest whole one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default 20")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for the terminal")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entries = measure(options.kills, options.seed, Path(folder))
    bad = [e for e in entries if e["differs_in"] or e["resumed_from"] != e["newest_whole"]]
    figures = {
        "kills": len(entries),
        "killed_in": dict(Counter(entry["killed_in"] for entry in entries)),
        "half_written": sum(entry["passed_over"] for entry in entries),
        "started_anew": sum(e["newest_whole"] == 0 and e["killed_in"] in PHASES for e in entries),
        "bad": len(bad),
        "entries": entries,
    }
    write = partial(json.dumps, figures, indent=1)
    if options.json and options.json != "-":
        Path(options.json).write_text(write() + "\n", encoding="utf-8")
    else:
        print(write())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
