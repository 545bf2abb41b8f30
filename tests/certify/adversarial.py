"""The generator of adversarial models, which the long run in ``experiments/`` shares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from hypothesis import Phase

_FILE = Path(__file__).parents[2] / "experiments" / "adversarial_models.py"
_SPEC = importlib.util.spec_from_file_location("adversarial_models", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
_module = importlib.util.module_from_spec(_SPEC)
sys.modules["adversarial_models"] = _module
_SPEC.loader.exec_module(_module)

# A network is named by its draws already: shrinking would take minutes and make it no plainer.
DRAW = (Phase.explicit, Phase.reuse, Phase.generate)

Draw, attack, steepness = _module.Draw, _module.attack, _module.steepness
