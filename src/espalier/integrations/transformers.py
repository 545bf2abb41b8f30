"""For the ``Trainer`` of transformers, which trains with accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, require
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
    what was measured when it was saved: a resumed run, and the best model that ``load_best_model_at_end`` loads, are
    held against that. ``train`` of one model called again, by whichever Trainer, or tried again with smaller batches,
    goes on with the model as it is: nothing is written over what was trained.

    Args:
        options: as of ``StructureWatch``: ``structure``, ``seed``, ``against``, ``on_problem``, ``initial_weights``.

    Attributes:
        watch: the ``StructureWatch`` with its ``checks`` and ``initial_weights``.
        measured: what was measured when the last checkpoint was saved.

    Raises:
        UnhealthyModelError: something is wrong, and ``on_problem="fail"``.
        EspalierError: an option does not fit, or ``structure`` is asked for under DeepSpeed, whose optimiser keeps
            copies of the weights from before.
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure what is about to be saved; on every rank, where ``state`` is asked of rank 0 alone."""
        if control.should_save:
            self.measured = self.watch.state_dict()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure what may be saved as the best so far: the Trainer decides that after this event."""
        if args.save_strategy == "best" and self.watch.model is not None:
            self.measured = self.watch.state_dict()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the trained weights, and first at the best ones where those were just loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = f"{state.best_model_checkpoint}/trainer_state.json"
            self.watch.loaded(_stored(type(state).load_from_json(path), type(self).__name__))
        self.watch.finish()


def _stored(state: TrainerState, name: str) -> dict[str, Any] | None:
    """Return what the callback of this name had measured when the Trainer's state was saved."""
    callbacks: Any = state.stateful_callbacks or {}  # a mapping by name, though its annotation says a list
    found = callbacks.get(name)
    if isinstance(found, list):
        found = found[-1]
    return None if found is None else found["attributes"].get("measured")
