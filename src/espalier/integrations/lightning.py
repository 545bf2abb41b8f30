"""For Lightning: a callback for ``Trainer.fit`` of the package ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, require
from espalier.integrations.watch import StructureWatch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
else:
    # Both packages may be installed: the one that the script already uses is the one that it will call us from.
    _older = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    try:
        Callback = require("pytorch_lightning" if _older else "lightning.pytorch", "lightning").Callback
    except EspalierError:
        Callback = require("pytorch_lightning", "lightning").Callback

# Where a checkpoint of Lightning's keeps what the watch measured when it was saved.
_KEY = "espalier_structure"


class StructureCallback(Callback):
    """Doctor and audit when ``fit`` starts, after it restored a checkpoint, and when training ends.

    The first check comes before the first step and before Lightning's sanity check; under a strategy that restores
    checkpoints late (FSDP) it comes after the sanity check. Each checkpoint carries what was measured when it was
    saved, and a resumed run is held against that. A second ``fit`` of one module, by whichever trainer, goes on:
    nothing is written over what was trained. What ``LearningRateFinder`` and ``BatchSizeFinder`` save, try and put back
    is no resumed run.

    Args:
        options: as of ``StructureWatch``: ``structure``, ``seed``, ``against``, ``on_problem``, ``initial_weights``.

    Attributes:
        watch: the ``StructureWatch`` with its ``checks`` and ``initial_weights``.

    Raises:
        UnhealthyModelError: something is wrong, and ``on_problem="fail"``.
        EspalierError: an option does not fit, or ``structure`` is asked for under DeepSpeed, whose optimiser keeps
            copies of the weights from before.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.watch = StructureWatch(**options)
        self._writes = options.get("structure", False) is not False
        self._state: dict[str, Any] | None = None
        self._restored = False
        self._looked = False
        self._saved_before = False
        self._put_back: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what the module carries before a checkpoint is restored into it."""
        if stage == "fit":
            self._state, self._restored, self._looked = None, False, False
            self._saved_before, self._put_back = False, None
            self.watch.attach(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the checkpoint says of itself; one that this fit saved before it began brings nothing."""
        state = checkpoint.get(_KEY)
        if self._saved_before and state is not None and not state.get("begun", True):
            self._saved_before, self._put_back = False, trainer.ckpt_path
        else:
            self._state, self._restored = state, True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights that training starts from."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._look(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights that training starts from, where a checkpoint is restored after ``on_fit_start``."""
        if trainer.strategy.restore_checkpoint_after_setup:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the trained weights."""
        self.watch.finish()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put into the checkpoint what its weights carry."""
        if self.watch.model is None:
            return
        checkpoint[_KEY] = {**self.watch.state_dict(), "begun": self._looked}
        if not self._looked:
            # Lightning puts its finders first. Once they put back what they save here, the trainer names that file.
            self._saved_before = True
            self._restored = self._restored_by(trainer) and not trainer.strategy.restore_checkpoint_after_setup

    def _restored_by(self, trainer: Trainer) -> bool:
        # A checkpoint of weights alone calls no callback's on_load_checkpoint.
        return self._restored or trainer.ckpt_path not in (None, self._put_back)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._looked = self._restored_by(trainer), True
        if self._writes and not restored and type(trainer.strategy).__name__ == "DeepSpeedStrategy":
            raise EspalierError("structure under DeepSpeed: call structure_ at the end of __init__ instead")
        # Several optimisers share the parameters out: none of them holds all.
        optimizers = trainer.optimizers
        self.watch.model, self.watch.optimizer = pl_module, optimizers[0] if len(optimizers) == 1 else None
        if restored:
            self.watch.loaded(self._state)
        self.watch.start()
