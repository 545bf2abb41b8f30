"""For the ``Trainer`` of transformers, which trains with accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, require
from espalier.files import read_object, write_bytes
from espalier.integrations.watch import StructureWatch

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
else:
    TrainerCallback = require("transformers", "transformers").TrainerCallback
    ExportableState = require("transformers.trainer_callback", "transformers").ExportableState


class StructureCallback(TrainerCallback, ExportableState):
    """Doctor and audit when ``Trainer.train`` starts, after it loaded a checkpoint, and when it ends.

    The first check comes before the first step, of a resumed run too. Each checkpoint's ``trainer_state.json`` carries
    what was measured when it was saved, whichever callback asked for it: a resumed run, and the best model that
    ``load_best_model_at_end`` loads, are held against that, and told where there is no such measurement. ``train`` of
    one model called again, by whichever Trainer, or tried again with smaller batches, goes on with the model as it is:
    nothing is written over what was trained.

    Args:
        options: as of ``StructureWatch``: ``structure``, ``seed``, ``against``, ``on_problem``, ``initial_weights``.

    Attributes:
        watch: the ``StructureWatch`` with its ``checks`` and ``initial_weights``.
        measured: what was measured when the last checkpoint was saved, and at which ``step`` that was.

    Raises:
        UnhealthyModelError: something is wrong, and ``on_problem="fail"``.
        EspalierError: an option does not fit, a checkpoint's ``trainer_state.json`` cannot be written, or ``structure``
            is asked for under DeepSpeed, whose optimiser keeps copies of the weights from before.
    """

    def __init__(self, **options: Any) -> None:
        self.watch = StructureWatch(**options)
        self.measured: dict[str, Any] | None = None
        self._options = options

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves of a callback; plain values, so no specs: a resumed run writes nothing."""
        plain: dict[str, Any] = {name: self._options[name] for name in ("seed", "on_problem") if name in self._options}
        keep = self._options.get("initial_weights", True)
        plain["initial_weights"] = keep if isinstance(keep, bool) else str(keep)
        return {"args": plain, "attributes": {"measured": self.measured}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Note what the model carries before a checkpoint is loaded into it."""
        if model is not None:
            self.watch.attach(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Look at the weights that training starts from."""
        resumed = state.global_step > 0
        if self._options.get("structure", False) is not False and not resumed and args.deepspeed:
            raise EspalierError("structure under DeepSpeed: call structure_ before the Trainer is made instead")
        if resumed:
            # Not attach: that would take what the checkpoint brought for what the model was built with.
            self.watch.model, self.watch.optimizer = model, optimizer
            self.watch.loaded(_stored(state, type(self).__name__))
        else:
            self.watch.attach(model, optimizer)
        self.watch.start()
        # A checkpoint that was saved without this callback has no place for its state, and the Trainer expects one.
        places: Any = state.stateful_callbacks
        places.setdefault(type(self).__name__, self.state())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure what was just saved, and put that into the checkpoint.

        Not before the save: callbacks behind this one may still ask for it. Not in ``state``: rank 0 alone is asked
        for that, and to gather a shard takes every rank.
        """
        self.measured = {**self.watch.state_dict(), "step": state.global_step}
        if args.should_save:
            _store(self.measured, args, state, type(self).__name__)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the trained weights, and first at the best ones where those were just loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = f"{state.best_model_checkpoint}/trainer_state.json"
            self.watch.loaded(_stored(type(state).load_from_json(path), type(self).__name__))
        self.watch.finish()


def _store(measured: dict[str, Any], args: TrainingArguments, state: TrainerState, name: str) -> None:
    """Put what was measured into the newest checkpoint; the Trainer wrote there what had been measured before."""
    # A search gives every trial a folder of its own, and tells no callback which.
    room = "*/" if state.is_hyper_param_search else ""
    paths = Path(str(args.output_dir)).glob(f"{room}checkpoint-{state.global_step}/trainer_state.json")
    path = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if path is None:  # another callback has moved it
        return
    try:
        content = read_object(path)
        if (found := _entry(content.get("stateful_callbacks"), name)) is None:
            return
        found["attributes"]["measured"] = measured
        # As the Trainer writes it: its losses may be NaN.
        write_bytes(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    except (OSError, ValueError) as error:
        raise EspalierError(f"output_dir: {path} cannot be written again ({error}): mend that and resume") from error


def _stored(state: TrainerState, name: str) -> dict[str, Any] | None:
    """Return what the callback of this name measured when the Trainer's state was saved, if it did so then."""
    found = _entry(state.stateful_callbacks, name)
    if found is None:
        return None
    measured: dict[str, Any] = found["attributes"].get("measured") or {}
    return measured if measured.get("step") == state.global_step else {}


def _entry(callbacks: Any, name: str) -> dict[str, Any] | None:
    """Return the state of the last callback of this name; a mapping by name, though its annotation says a list."""
    found: Any = (callbacks or {}).get(name)
    return found[-1] if isinstance(found, list) else found
