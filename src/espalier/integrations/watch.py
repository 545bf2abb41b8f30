"""What every callback shares, and plain PyTorch uses as it is: look at a model when its weights may have gone wrong."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from espalier.doctor import Diagnosis, Finding, diagnose
from espalier.errors import EspalierError
from espalier.files import read_tensors, write_tensors
from espalier.init import LayerReport, StructureReport, audit, structure_
from espalier.init.sharded import is_distributed

OnProblem = Literal["fail", "warn"]
Stage = Literal["start", "checkpoint loaded", "end"]


@dataclass(frozen=True)
class WatchCheck:
    """What a ``StructureWatch`` saw at one stage; prints as one line when nothing is wrong.

    Attributes:
        stage: ``start``, ``checkpoint loaded`` or ``end``.
        diagnosis: of the doctor.
        structure: of the audit; ``None`` for a model without a layer that any layout recognises.
    """

    stage: Stage
    diagnosis: Diagnosis
    structure: StructureReport | None

    @property
    def problems(self) -> tuple[str, ...]:
        """One line a problem: the doctor's errors, layers that failed, and layers that lost their structure.

        At the end a lost structure is no problem: training may move weights wherever the loss is lower.
        """
        lines = [f"{f.layer or 'model'}: {f.check}: {f.measured}; {f.remedy}" for f in self.diagnosis.errors]
        for row in self._rows("failed") if self.stage == "end" else self._rows("lost", "failed"):
            lines.append(f"{row.layer or 'model'}: structure {row.status}: {row.note or 'it no longer stands out'}")
        return tuple(lines)

    @property
    def clean(self) -> bool:
        """Whether there is nothing to tell: no finding of any severity, no layer lost or failed."""
        return not self.diagnosis.findings and (self.structure is None or self.structure.ok)

    def __str__(self) -> str:
        counts = Counter(row.status for row in self.structure.layers) if self.structure else {}
        words = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no layer recognised"
        first, *table = str(self.diagnosis).splitlines()
        rows = [f"structure {r.status}: {r.layer or '(model)'}  {r.note}" for r in self._rows("lost", "failed")]
        return "\n".join([f"espalier, {self.stage}: {first}; structure: {words}", *table, *rows])

    def _rows(self, *statuses: str) -> list[LayerReport]:
        return [row for row in self.structure.layers if row.status in statuses] if self.structure else []


class UnhealthyModelError(EspalierError):
    """A model that cannot train as meant, or a checkpoint whose structure did not arrive; ``problems`` lists all."""

    def __init__(self, stage: Stage, problems: tuple[str, ...]) -> None:
        more = f" (and {len(problems) - 1} more: see the table above)" if len(problems) > 1 else ""
        super().__init__(f"{stage}: {problems[0]}{more}; on_problem='warn' goes on")
        self.stage = stage
        self.problems = problems


class StructureWatch:
    """Doctor and audit at the start of a run, after a checkpoint is loaded, and at the end.

    A context manager for a training loop of one's own, with or without accelerate::

        with StructureWatch(model, optimizer, initial_weights="init.safetensors") as watch:
            train(model, optimizer)

    A run that goes on from a checkpoint loads it **before** the ``with`` block and then says so, by ``loaded()`` or by
    ``load_state_dict`` with what ``state_dict`` gave when the checkpoint was saved (accelerate calls both after
    ``register_for_checkpointing``). Then nothing is written, and the initial weights that the first run kept stay.

    A watch begins once with a model: a second ``with`` block or ``start`` looks and writes nothing, for the weights are
    trained by then. ``attach(model, anew=True)`` says that they are fresh ones.

    A clean run prints one line, on rank 0. Of several ranks every one makes every call, and a problem of one is raised
    on all.

    Attributes:
        checks: every check so far, as a ``WatchCheck``.
        report: what later checks are held against: the structure that was written, given, or found at the start.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        structure: bool | Mapping[str, Any] = False,
        seed: int = 0,
        against: StructureReport | None = None,
        on_problem: OnProblem = "fail",
        initial_weights: bool | str | Path = True,
    ) -> None:
        """Remember what to do; nothing is written yet.

        Args:
            model: the module; a wrapped one (DDP, ``torch.compile``) is fine. ``None``: ``attach`` names it later.
            optimizer: the optimiser that trains it: does it hold the model's parameters?
            structure: call ``structure_`` at the start of a run that does not go on from a checkpoint: ``True``, or its
                specs as ``{"attention": Mimetic(…)}``.
            seed: of what is written, the same on every rank: the weights are those of
                ``structure_(model, generator=torch.Generator().manual_seed(seed))``.
            against: the report of a ``structure_`` call made before.
            on_problem: raise ``UnhealthyModelError`` (``"fail"``), or warn and go on (``"warn"``).
            initial_weights: keep the weights from before the first step: in memory on the CPU, in a safetensors file
                of this name, or (``False``) not at all.

        Raises:
            EspalierError: ``on_problem`` is neither, ``structure`` is neither a bool nor a mapping, it and ``against``
                are both given, or the name of ``initial_weights`` does not end in ``.safetensors``.
        """
        if on_problem not in ("fail", "warn"):
            raise EspalierError(f"on_problem {on_problem!r}: choose 'fail' or 'warn'")
        if not isinstance(structure, bool | Mapping):
            raise EspalierError(f"structure {structure!r}: give True, False, or specs as {{'attention': Mimetic(…)}}")
        if isinstance(initial_weights, str | Path) and Path(initial_weights).suffix != ".safetensors":
            # Whoever reads weights goes by the end of the name.
            raise EspalierError(f"initial_weights {str(initial_weights)!r}: give a name that ends in .safetensors")
        if structure is not False and against is not None:
            raise EspalierError("structure and against: give one: against is the report of what was written before")
        self._structure, self._seed, self._against = structure, seed, against
        self._on_problem, self._keep = on_problem, initial_weights
        self._kept: dict[str, Tensor] | None = None
        self._resumed = False
        # Weakly: a search over many models would otherwise keep them all in memory.
        self._begun: WeakSet[nn.Module] = WeakSet()
        self._left: StructureReport | None = None
        self.checks: list[WatchCheck] = []
        self.report = against
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if model is not None:
            self.attach(model, optimizer)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, anew: bool = False) -> None:
        """Name the model, and note what structure it carries now, before anything is loaded into it.

        Args:
            model: the module; one that this watch has begun with goes on, with another optimiser if need be.
            optimizer: the optimiser that trains it.
            anew: its weights are fresh ones, though the watch has begun with it before: ``start`` may write over them.
        """
        if anew:
            self._begun.discard(unwrapped(model))
        other = self.model is None or unwrapped(self.model) is not unwrapped(model)
        self.model, self.optimizer, self._resumed = model, optimizer, False
        if other or unwrapped(model) not in self._begun:
            self.report, self._left = self._against or _audit(model, None), None

    def start(self) -> None:
        """Write structure where asked, look at the weights, and keep them.

        After a checkpoint was loaded nothing of it is done; with a model that the watch has begun with before, it only
        looks: weights that were trained are never written over.

        Raises:
            UnhealthyModelError: something is wrong, and ``on_problem="fail"``.
            EspalierError: structure was asked for and the model has no layer for it.
        """
        if self._resumed:
            self._resumed = False
            return
        model = self._model()
        if unwrapped(model) in self._begun:
            self._look()
            return
        if self._structure is not False:
            specs = {} if self._structure is True else dict(self._structure)
            self.report = structure_(model, generator=torch.Generator().manual_seed(self._seed), **specs)
        elif self._against is None:
            self.report = None  # what was found when the watch was made may have been rewritten since
        check = self._check("start", _audit(model, self.report))
        self.report = self.report or check.structure
        if self._keep is not False:
            self._keep_weights(unwrapped(model))
        self._begun.add(unwrapped(model))  # last: a start that was refused may be tried again

    def loaded(self, state: Mapping[str, Any] | None = None) -> WatchCheck:
        """Look at a model into which a checkpoint was just loaded.

        Args:
            state: what ``state_dict`` gave when the checkpoint was saved, so that what training itself had changed by
                then is no loss. Without it the check is held against what the model carried before, and where that
                says nothing of a layer without structure, a warning does.

        Raises:
            UnhealthyModelError: something is wrong, structure that did not arrive included, and ``on_problem="fail"``.
        """
        model = self._model()
        self._resumed, self._left = True, None
        self._begun.add(unwrapped(model))
        measured = None if state is None else state.get("structure")
        if measured is not None:
            self.report = StructureReport.from_dict(measured)
        found = _audit(model, self.report)
        doubts = self._unwritten(found, "a checkpoint was loaded", "call structure_ on it, or start from no checkpoint")
        absent = [] if found is None else [row for row in found.layers if row.status == "absent"]
        if measured is None and self._against is None and found and (absent or state is not None):
            words = "nothing was measured at this checkpoint: it cannot be said whether the structure arrived"
            doubts.append(_doubt(words, "give against=, the report of what was written before it was saved"))
        return self._check("checkpoint loaded", found, doubts)

    def _look(self) -> None:
        """Look at weights that are trained further."""
        model = self._model()
        # What training moved away is no loss. Where it broke off, nothing says what it left.
        found = _audit(model, self._left or _audit(model, self.report))
        remedy = "if its weights are fresh, call the watch's attach(model, anew=True) before"
        self._check("start", found, self._unwritten(found, "the watch had begun with this model", remedy))

    def _unwritten(self, found: StructureReport | None, why: str, remedy: str) -> list[Finding]:
        """Return what is to be told where structure was asked for, none was written, and the model has none."""
        if self._structure is False:
            return []
        asked = None if self._structure is True else [kind for kind, spec in self._structure.items() if spec]
        rows = [row for row in found.layers if asked is None or row.kind in asked] if found else []
        if any(row.status in ("written", "present", "changed") for row in rows):
            return []
        return [_doubt(f"structure was asked for, none was written ({why}), and no layer shows any", remedy)]

    def finish(self) -> WatchCheck:
        """Look at the trained weights; structure that training moved away is told, and is no problem.

        Raises:
            UnhealthyModelError: the weights cannot work (NaN, say), and ``on_problem="fail"``.
        """
        self._resumed = False
        check = self._check("end", _audit(self._model(), self.report))
        self._left = check.structure
        return check

    def state_dict(self) -> dict[str, Any]:
        """Measure the structure of the weights that are about to be saved, as plain values for the checkpoint."""
        found = _audit(self._model(), self.report)
        return {"structure": None if found is None else found.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check the loaded model against what was measured when it was saved; call it after the weights are loaded."""
        self.loaded(state)

    @property
    def initial_weights(self) -> dict[str, Tensor]:
        """The weights from before the first step, by the names of the unwrapped model's state dictionary.

        Raises:
            EspalierError: none were kept, or the run went on from a checkpoint and there is no file.
        """
        if isinstance(self._keep, str | Path):
            return read_tensors(Path(self._keep))
        if self._kept is None:
            raise EspalierError("initial_weights: none kept: a run that goes on from a checkpoint needs a file's name")
        return self._kept

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resumed = False
        if kind is None:
            self.finish()

    def __getstate__(self) -> dict[str, Any]:
        # Lightning sends callbacks to the processes that it starts, and weak references cannot be sent.
        return {**self.__dict__, "_begun": list(self._begun)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _begun=WeakSet(state["_begun"]))

    def _model(self) -> nn.Module:
        if self.model is None:
            raise EspalierError("model None: give StructureWatch a model, or attach(model) before")
        return self.model

    def _check(self, stage: Stage, found: StructureReport | None, doubts: Sequence[Finding] = ()) -> WatchCheck:
        diagnosis = diagnose(self._model(), optimizer=self.optimizer)
        milder = [finding for finding in diagnosis.findings if finding.severity != "error"]
        diagnosis = replace(diagnosis, findings=(*diagnosis.errors, *doubts, *milder))
        check = WatchCheck(stage, diagnosis, found)
        self.checks.append(check)
        problems = _of_all_ranks(check.problems)
        if _rank() == 0 and (stage != "end" or not check.clean):
            print(check, flush=True)
        if problems and self._on_problem == "fail":
            raise UnhealthyModelError(stage, problems)
        if problems and _rank() == 0:
            warnings.warn(f"{stage}: {'; '.join(problems[:3])}", UserWarning, stacklevel=3)
        return check

    def _keep_weights(self, model: nn.Module) -> None:
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        if lazy := [name for name, value in tensors.items() if nn.parameter.is_lazy(value)]:
            raise EspalierError(f"initial_weights: {lazy[0]} has no shape yet: run one batch before the start")
        # Gathering a shard is collective: every rank does it, though rank 0 alone writes.
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()
        }
        if isinstance(self._keep, str | Path):
            if _rank() == 0:
                try:
                    Path(self._keep).parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(Path(self._keep), whole)
                except OSError as error:
                    raise EspalierError(
                        f"initial_weights {self._keep}: cannot be written ({error.strerror})"
                    ) from error
        else:
            self._kept = {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _doubt(measured: str, remedy: str) -> Finding:
    return Finding("warning", "", "structure", measured, "structure that stands out", remedy)


def _audit(model: nn.Module, against: StructureReport | None) -> StructureReport | None:
    try:
        return audit(model, against=against)
    except EspalierError:  # no layer that any layout recognises, now or earlier
        return None


def _rank() -> int:
    return torch.distributed.get_rank() if is_distributed() else int(os.environ.get("RANK", "0"))


def _of_all_ranks(problems: tuple[str, ...]) -> tuple[str, ...]:
    """Return the problems of every rank, so that all raise together: one that goes on alone would wait for ever."""
    if not is_distributed():
        return problems
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, problems)
    own = set(everyone[0])
    return (*everyone[0], *(f"rank {r}: {p}" for r, found in enumerate(everyone) for p in found if p not in own))
