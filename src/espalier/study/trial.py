"""What a study consists of: arms × learning rates × seeds, each a run folder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from espalier.errors import EspalierError
from espalier.files import lock_at, lock_of, read_regular, read_sealed, write_sealed
from espalier.lookup import is_reference, without_pin
from espalier.recipes import Recipe, apply_arm
from espalier.recipes.validation import (
    MACHINE_FIELDS,
    from_values,
    recipe_to_dict,
    refuse_unpinned,
    resolve_recipe,
)
from espalier.study.grid import Rates, learning_rates, listed, seed_numbers
from espalier.study.own_training import OwnTraining, shortened
from espalier.study.record import Record, known_digests, record_from_line, record_run
from espalier.study.records import by_trial, read_records
from espalier.study.same_data import refuse_two_data
from espalier.study.statistics import is_share
from espalier.train import load_run
from espalier.train.run import RESULT

STUDY, TRIALS, FAILURE = "study.json", "trials", "failure.txt"
RECORD, FILES = "record.json", "files"
"""What a trial of the user's own training leaves, and the folder that is the user's."""
RECORDS = "records.jsonl"
"""Records in a study folder: trials that need not be run again, whether or not their run folders are here."""

_NO_FOLDER = set('<>:"/\\|?*\0')
"""Characters that some system refuses in the name of a folder."""
_LONGEST_ARM = 200
"""Bytes: a file system takes 255, and the lock of a trial bears its rate and seed, too."""

Arms = Sequence[str] | Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One run of a study: its resolved recipe, or the user's own training, and its folder."""

    recipe: Recipe | OwnTraining
    arm: str
    lr: float
    seed: int
    path: Path
    record: Record | None = field(default=None, repr=False)
    """What it left behind, if it ran elsewhere or its folder was cleared away."""

    @property
    def finished(self) -> bool:
        """Whether the trial has a record or its folder what a finished one leaves."""
        return self.record is not None or self.has_folder

    @property
    def has_folder(self) -> bool:
        """Whether its own folder holds what a finished trial leaves (a diverged run has a result, too)."""
        return (self.path / (RESULT if isinstance(self.recipe, Recipe) else RECORD)).exists()

    def outcome(self, study: str) -> Record | None:
        """Return the trial's record, or one made from its run folder; None while it is not finished.

        Raises:
            EspalierError: a damaged run folder, or one that contradicts the record.
        """
        found = self.records(study)
        by_trial(found)
        return found[0] if found else None

    def records(self, study: str) -> tuple[Record, ...]:
        """Return the trial's record and one made from its own folder, as far as they are there.

        Raises:
            EspalierError: a damaged run folder.
        """
        told = () if self.record is None else (self.record,)
        return (*told, self._from_folder(study)) if self.has_folder else told

    def _from_folder(self, study: str) -> Record:
        where = self.path if isinstance(self.recipe, Recipe) else self.path / RECORD
        if isinstance(self.recipe, Recipe):
            record = record_run(load_run(where), study, self.arm)
        else:
            try:
                record = replace(record_from_line(read_regular(where).decode()), study=study)
            except (OSError, ValueError) as error:
                raise EspalierError(f"{where} is damaged ({error}): delete it and run the trial again") from error
        self.refuse_another(record, where)
        return record

    @property
    def digests(self) -> tuple[str, ...]:
        """What a record of this trial may say that it is of, the present version's first."""
        own = self.recipe
        return known_digests(own) if isinstance(own, Recipe) else (own.digest(self.lr, self.seed),)

    def refuse_another(self, record: Record, where: Path) -> None:
        """Refuse a record that is not one of this trial: a run that was copied here would count as one more seed.

        Args:
            record: the record.
            where: it comes from, for the message.

        Raises:
            EspalierError: its arm, rate, seed, metric or recipe is not the trial's.
        """
        # The data say which split a recipe is scored on, by its share of right answers; or it is one of its extras.
        metric = record.metric if is_share(record.metric) or record.metric in record.extra else "an accuracy"
        if isinstance(self.recipe, OwnTraining):
            metric = self.recipe.metric
        # Last, as it says least of what differs: the epochs, say, or the code of a training function.
        digest = record.digest if record.digest in self.digests else self.digests[0]
        wanted = {"arm": self.arm, "lr": self.lr, "seed": self.seed, "metric": metric, "digest": digest}
        for name, value in wanted.items():
            if (found := getattr(record, name)) != value:
                raise EspalierError(
                    f"{where}: the record of {self} has {name} {found!r}, and the trial {value!r}: delete it and run "
                    "the trial again"
                )

    @property
    def failure(self) -> str | None:
        """The text of the error that ended the last attempt, if one did."""
        if self.finished:
            return None
        try:
            return read_regular(self.path / FAILURE).decode(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:  # it failed all the same
            return f"{self.path / FAILURE} cannot be read ({error.strerror})"

    def __str__(self) -> str:
        return f"{self.arm} lr={self.lr:g} seed={self.seed}"


@dataclass(frozen=True)
class Study:
    """A plan: every arm at every rate and seed; the first arm is the baseline.

    ``arms`` maps each arm to the recipe fields that it changes, so that a study folder explains itself.
    """

    path: Path
    recipe: Recipe | OwnTraining
    arms: Mapping[str, Mapping[str, Any]]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    arm_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Seeds of the arms that do not have them all."""
    records: Mapping[tuple[str, str], Record] = field(default_factory=dict, repr=False)
    """Trials that are finished elsewhere, by arm and digest of the recipe."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def trials(self) -> tuple[Trial, ...]:
        """Return every trial, seed by seed: a study that is cut short has compared all arms on its first seeds."""
        return tuple(
            self.trial(arm, lr, seed)
            for seed in self.seeds
            for lr in self.lrs
            for arm in self.arms
            if seed in self.arm_seeds.get(arm, self.seeds)
        )

    def trial(self, arm: str, lr: float, seed: int) -> Trial:
        """Return one trial."""
        recipe = self.recipe
        if isinstance(recipe, Recipe):
            recipe = from_values(Recipe, {**recipe_to_dict(recipe), **self.arms[arm], "lr": lr, "seed": seed})
        trial = Trial(recipe, arm, lr, seed, self.path / TRIALS / arm / f"lr={lr:g}" / f"seed={seed}")
        if not self.records:
            return trial
        for record in (self.records[arm, digest] for digest in trial.digests if (arm, digest) in self.records):
            trial.refuse_another(record, self.path / RECORDS)
            return replace(trial, record=record)
        return trial

    def outcomes(self) -> dict[Path, Record]:
        """Return what every finished trial left behind, by its folder.

        Raises:
            EspalierError: a damaged run folder, a run folder and a record of one trial that contradict each other,
                scores of two metrics, or trials on other data than those that they would be compared with.
        """
        trials = self.trials()
        every = {trial.path: records for trial in trials if (records := trial.records(self.name))}
        refuse_two_data(self.path, [(trial, record) for trial in trials for record in every.get(trial.path, ())])
        by_trial(record for records in every.values() if len(records) > 1 for record in records)
        found = {path: records[0] for path, records in every.items()}
        metrics = {record.metric: f"{record.arm} lr={record.lr:g} seed={record.seed}" for record in found.values()}
        if len(metrics) > 1:
            named = " and ".join(f"{metric!r} ({trial})" for metric, trial in metrics.items())
            raise EspalierError(f"{self.path} holds scores of several metrics, {named}: they cannot be compared")
        return found

    def with_records(self, records: Iterable[Record]) -> Study:
        """Return the study with these records, too, counted as finished trials, whatever study they name.

        Raises:
            EspalierError: two records of one trial contradict each other.
        """
        return replace(self, records=by_trial([*self.records.values(), *records]))


def plan_study(
    recipe: Recipe | OwnTraining,
    arms: Arms,
    lrs: Sequence[float] | Literal["auto"],
    seeds: int | Sequence[int],
    out: Path | str,
) -> Study:
    """Write the plan of a study into ``out``, or extend the one that is there by new arms, rates and seeds.

    Nothing is trained. The recipe's own ``lr`` is the centre of an ``"auto"`` grid and its ``seed`` is not used.
    Trials that the folder already has stay part of the study; the first arm named here is the baseline.

    Args:
        recipe: what all arms share.
        arms: names of ``espalier.recipes.ARMS``, or the recipe fields that each of your own arms changes, by its name;
            the baseline first.
        lrs: peak learning rates, or ``"auto"`` (see ``learning_rates``).
        seeds: how many, from 0, or the seeds themselves: every arm shares them, so that differences are paired.
        out: the study folder; made when missing.

    Raises:
        EspalierError: an unknown arm, a bad rate or seed, or a folder that holds something else.
    """
    return save_study(draft_study(recipe, arms, lrs, seeds, out))


def draft_study(
    recipe: Recipe | OwnTraining, arms: Arms, lrs: Rates, seeds: int | Sequence[int], out: Path | str
) -> Study:
    """Return what ``plan_study`` would write, writing nothing."""
    out, recipe = Path(out), resolve_recipe(recipe) if isinstance(recipe, Recipe) else recipe
    rates, numbers = learning_rates(recipe.lr, lrs), seed_numbers(seeds)
    study = _joined(Study(out, recipe, arm_changes(recipe, arms), tuple(sorted(rates)), tuple(sorted(numbers))))
    for trial in study.trials():
        if isinstance(trial.recipe, Recipe):
            resolve_recipe(trial.recipe)
    return study


def _joined(study: Study) -> Study:
    """Return the study with the arms, rates, seeds and records that its folder has already."""
    out = study.path
    if (out / STUDY).exists():
        there = load_study(out)
        _refuse_another(there, study.recipe, study.arms)
        arms = {**study.arms, **there.arms}
        rates, seeds = sorted({*study.lrs, *there.lrs}), sorted({*study.seeds, *there.seeds})
        study = replace(study, arms=arms, lrs=tuple(rates), seeds=tuple(seeds))
    elif out.exists() and (not out.is_dir() or any(not f.name.startswith(f".{STUDY}.") for f in out.iterdir())):
        raise EspalierError(f"out {out} exists and is not a study folder: choose another folder")
    return replace(study, records=_records(out))


def load_study(path: Path | str) -> Study:
    """Read the plan of a study folder.

    Raises:
        EspalierError: there is none, or it is damaged.
    """
    path = Path(path)
    file = path / STUDY
    if not file.is_file():
        raise EspalierError(f"{path} is not a study folder: it has no {STUDY}")
    plan = read_sealed(file, "study")
    try:
        if plan.keys() - {"recipe", "train", "arms", "lrs", "seeds"}:
            raise KeyError("fields that no study has")
        recipe: Recipe | OwnTraining
        if "recipe" in plan:
            recipe = from_values(Recipe, plan["recipe"], where=f"{file}: recipe")
        else:
            recipe = from_values(OwnTraining, plan["train"], where=f"{file}: train")
            if not recipe.lr > 0:
                raise TypeError("a training that no study has")
            if any(changes != {} for changes in plan["arms"].values()):
                raise KeyError("arms that change fields of a recipe")
        if not plan["arms"]:
            raise ValueError("arms is empty")
        rates, seeds = learning_rates(1.0, plan["lrs"]), seed_numbers(plan["seeds"])
        study = Study(path, recipe, dict(plan["arms"]), tuple(sorted(rates)), tuple(sorted(seeds)))
        for arm in study.arms:
            _check_arm(arm)
            trial = study.trial(arm, study.lrs[0], study.seeds[0])
            if isinstance(trial.recipe, Recipe):
                refuse_unpinned(trial.recipe, f"{file}, arm {arm!r}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise EspalierError(f"{file} is damaged ({error}): plan the study in another folder") from error
    return replace(study, records=_records(path))


def arm_changes(recipe: Recipe | OwnTraining, arms: Arms) -> dict[str, Mapping[str, Any]]:
    """Return the fields that every arm changes in ``recipe``, as plain JSON values, by arm.

    Args:
        recipe: what all arms share, resolved.
        arms: names of ``espalier.recipes.ARMS``, or the fields that each of your own arms changes, by its name.

    Raises:
        EspalierError: an unknown arm or field, a value that the recipe refuses, or a name that is no name of a folder.
    """
    own, wanted = isinstance(recipe, OwnTraining), "a list of names, the baseline first"
    if isinstance(arms, Set) or (own and isinstance(arms, Mapping)):  # a set has no first
        raise EspalierError(f"arms {arms!r}: give {wanted}")
    changes: dict[str, Mapping[str, Any]] = {}
    for spec in listed("arms", list(arms) if isinstance(arms, Mapping) else arms, wanted):
        if not isinstance(spec, str):
            raise EspalierError(f"arms: {spec!r} is no name: give {wanted}")
        # An initialisation of the user's own: the arm bears the function's name.
        arm = without_pin(spec).rpartition(":")[2] if is_reference(spec) and not own else spec
        if arm in changes:
            raise EspalierError(f"arms: {arm!r} is named twice: give every arm a name of its own")
        _check_arm(arm)
        changes[arm] = {}
        if isinstance(recipe, OwnTraining):
            continue
        after = apply_arm(recipe, spec) if not isinstance(arms, Mapping) else _with_fields(recipe, spec, arms[spec])
        before, values = recipe_to_dict(recipe), recipe_to_dict(resolve_recipe(after))
        changes[arm] = {name: value for name, value in values.items() if value != before[name]}
    return changes


def _check_arm(arm: str) -> None:
    odd = not arm.isprintable() or set(arm) & _NO_FOLDER or arm.startswith(".")
    if not arm or odd or len(arm.encode()) > _LONGEST_ARM:
        raise EspalierError(f"arm {shortened(arm)}: choose a name that a folder can bear")


def _with_fields(recipe: Recipe, arm: str, values: Mapping[str, Any]) -> Recipe:
    for name in values.keys() & {"lr", "seed"}:
        raise EspalierError(f"arm {arm!r} changes {name}: every arm gets the same rates and seeds")
    return from_values(Recipe, {**recipe_to_dict(recipe), **values}, where=f"arm {arm!r}")


def _records(path: Path) -> Mapping[tuple[str, str], Record]:
    file = path / RECORDS
    return by_trial(read_records(file)) if file.exists() else {}


def _refuse_another(there: Study, recipe: Recipe | OwnTraining, changes: Mapping[str, Mapping[str, Any]]) -> None:
    old, difference, remedy = there.recipe, None, ""
    if isinstance(old, Recipe) != isinstance(recipe, Recipe):
        kinds = {True: "a recipe", False: "a function of your own"}
        difference = f"{kinds[isinstance(old, Recipe)]} there, {kinds[isinstance(recipe, Recipe)]} here"
    else:
        # The rate, which is the centre of a grid, and the seed belong to the trials.
        free = {"lr", "seed"}
        if isinstance(recipe, Recipe):  # data of one's own do not say what they hold: the path tells which they are
            free |= MACHINE_FIELDS - ({"data_path"} if is_reference(recipe.dataset) else set())
        for name in [each.name for each in fields(old) if each.compare and each.name not in free]:
            if (before := getattr(old, name)) != (now := getattr(recipe, name)):
                difference = f"{name} is {before!r} there and {now!r} here"
                if isinstance(old, OwnTraining) and isinstance(recipe, OwnTraining) and name == "code":
                    difference = old.difference(recipe)
                    remedy = "say keep_trials=True if its trials would end as they did, or "
                break
    if difference is not None:
        raise EspalierError(f"{there.path} holds another study: {difference}; {remedy}choose another folder")
    for arm in changes:
        if arm in there.arms and there.arms[arm] != changes[arm]:
            raise EspalierError(
                f"{there.path} holds a study whose arm {arm!r} changes {there.arms[arm]}, not {changes[arm]}: "
                "choose another folder"
            )


def save_study(study: Study) -> Study:
    """Write the plan into the study's folder, with what others have planned there meanwhile, and return it."""
    study.path.mkdir(parents=True, exist_ok=True)
    with lock_at(lock_of(study.path / STUDY), seconds=60):
        study = _joined(study)
        recipe = study.recipe
        what = {"recipe": recipe_to_dict(recipe)} if isinstance(recipe, Recipe) else {"train": asdict(recipe)}
        arms = {arm: dict(changes) for arm, changes in study.arms.items()}
        write_sealed(study.path / STUDY, {**what, "arms": arms, "lrs": study.lrs, "seeds": study.seeds})
    return study
