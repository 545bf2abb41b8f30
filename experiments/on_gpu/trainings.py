"""Which trainings run on a GPU, in which order, and how many at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier.recipes import Recipe, get_recipe
from espalier.recipes.validation import recipe_to_dict
from espalier.train import load_run
from experiments.attention import CIFAR10

ROOT = Path(__file__).parents[2]

# What a training may take beyond its budget before it is stopped: its start, its last evaluation, its certificate.
_GRACE = 40.0


@dataclass(frozen=True)
class Plan:
    """One training: a recipe, what is changed of it, and the seconds that it may take."""

    study: str
    recipe: str
    arm: str = "default"
    seed: int = 0
    seconds: float = 120.0
    epochs: int = 0
    """The most epochs; 0 takes as many as fit the seconds."""
    changes: dict[str, Any] = field(default_factory=dict)
    certified: bool = False
    """Also certify the test images."""

    @property
    def name(self) -> str:
        """Return a name for its folder."""
        rate = f"-lr{self.changes['lr']:g}" if "lr" in self.changes else ""
        return f"{self.study}-{self.arm}{rate}-seed{self.seed}"


_FAST = {"precision": "bf16", "channels_last": True}
_COPY = {
    "data_args": {"vocab_size": 29, "length": 50, "steps_per_epoch": 100},
    "model_args": {"dim": 64, "pattern": "mamba1*2", "state_size": 64},
    "lr": 3e-3,
    "eval_every": 10,
}


def plans() -> list[Plan]:
    """Return every training in order of worth: what no committed record shows yet comes first."""
    nets = [
        Plan("certified_at_equal_time", recipe, recipe, 0, 420, certified=True)
        for recipe in ("kwlarge_cifar10", "orthogonal_cifar10")
    ]
    # The published number: its first seed is among the committed records.
    published = [
        Plan("convmixer_cifar10", "convmixer_cifar10", "default", seed, seconds=420, epochs=25, changes=_FAST)
        for seed in (1, 2, 0)
    ]
    recall = [
        Plan("copying_50", "copy_mamba1", arm, seed, 200, 100, _COPY)
        for seed in (0, 1)
        for arm in ("default", "mimetic-ssm")
    ]
    # Without RandAugment, which is drawn image by image and takes ten times the step of so small a network.
    vit = [
        Plan(
            CIFAR10.name,
            CIFAR10.recipe.name,
            arm,
            seed,
            150,
            CIFAR10.recipe.epochs,
            {**_changes(CIFAR10.recipe), "lr": lr},
        )
        for seed in range(CIFAR10.seeds)
        for lr in CIFAR10.lrs
        for arm in CIFAR10.arms
    ]
    return [nets[0], *published[:2], nets[1], *recall, *vit, published[2]]


def _changes(recipe: Recipe) -> dict[str, Any]:
    """Return the fields in which a recipe departs from the registered one of its name."""
    own, registered = recipe_to_dict(recipe), recipe_to_dict(get_recipe(recipe.name))
    return {name: value for name, value in own.items() if value != registered[name]}


def smallest_plans() -> list[Plan]:
    """Return trainings of seconds that take every path."""
    few = {"data_args": {"train_limit": 320, "test_limit": 100}}
    copy = {"data_args": {"vocab_size": 8, "length": 4, "steps_per_epoch": 5}, "eval_every": 1}
    return [
        Plan("smallest_vit", "digits_vit", "mimetic", 0, 20, 1, few),
        Plan("smallest_certified", "digits_robust", "digits_robust", 0, 20, 1, few, certified=True),
        Plan("smallest_copying", "copy_mamba1", "mimetic-ssm", 0, 20, 1, copy),
    ]


@dataclass
class _Running:
    plan: Plan
    process: subprocess.Popen[str]
    folder: Path
    stop_at: float


def train_all(job: Any) -> None:
    """Run the plans, up to ``job.parallel`` at a time, each in a process of its own, until the time is over.

    A training that was finished by an earlier call is not run again. One that does not fit the time left is not begun.
    """
    waiting = [plan for plan in (smallest_plans() if job.smallest else plans()) if not _done(job, plan)]
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < job.parallel:
            plan = waiting.pop(0)
            if job.clock.left() < plan.seconds + 10:
                job.results.add("not begun", study=plan.study, arm=plan.arm, seed=plan.seed)
                continue
            running.append(_start(job, plan))
        for one in list(running):
            if one.process.poll() is None and time.monotonic() < min(one.stop_at, job.clock.deadline):
                continue
            running.remove(one)
            _collect(job, one)
            job.results.write()
        time.sleep(0.2)


def _done(job: Any, plan: Plan) -> bool:
    outcome = job.work / plan.name / "outcome.json"
    return outcome.exists()


def _start(job: Any, plan: Plan) -> _Running:
    folder = job.work / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({**asdict(plan), "data": job.data and str(job.data.resolve())}))
    command = [sys.executable, "-m", "experiments.on_gpu.one_training", str(folder)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)
    print(f"began {plan.name}", flush=True)
    return _Running(plan, process, folder, time.monotonic() + plan.seconds + _GRACE)


def _collect(job: Any, one: _Running) -> None:
    """Record what a training left: its result, or how far it came and why it ended."""
    plan, row = one.plan, {"study": one.plan.study, "arm": one.plan.arm, "seed": one.plan.seed}
    stopped = one.process.poll() is None
    if stopped:
        one.process.kill()
    status = one.process.wait()
    outcome = one.folder / "outcome.json"
    if status == 0 and outcome.exists():
        more = json.loads(outcome.read_text())
        job.results.add_run(plan.study, plan.arm, load_run(one.folder / "run"), **more, shared_by=job.parallel)
        return
    why = "stopped at its deadline" if stopped else (one.folder / "log.txt").read_text()[-600:]
    rows = load_run(one.folder / "run").rows if (one.folder / "run" / "recipe.json").exists() else []
    job.results.add("unfinished", **row, why=why, last_row=str(rows[-1] if rows else ""))
