"""The doctor finds no fault in a start that an arm of ours asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

import espalier
from espalier import data
from espalier.errors import EspalierError
from espalier.recipes import ARMS, get_recipe
from espalier.train.build import build_run_model

pytest.importorskip("sklearn", reason="no scikit-learn: pip install scikit-learn")

# What these arms ask for is unusual, and a warning may say so.
UNUSUAL = {"mlp-mean-shift": "off-centre", "mimetic-ssm-scaled": "state-space", "impulse": "equal-units"}


@pytest.mark.parametrize("name", ["digits_vit", "digits_convmixer", "copy_mamba1", "recall_hybrid"])
def test_no_arm_starts_ill(name: str) -> None:
    recipe = get_recipe(name)
    source = data.build_source(recipe)
    batch = next(iter(source.eval_batches("test", 8)))
    tried = 0
    for arm, changes in ARMS.items():
        try:
            net, report = build_run_model(replace(recipe, **changes), source)
        except EspalierError:
            continue  # an arm for layers that this net does not have
        tried += 1
        for example in (None, batch):
            found = espalier.diagnose(net, example, against=report).findings
            assert [f for f in found if f.severity == "error"] == [], arm
            assert {f.check for f in found if f.severity == "warning"} <= {UNUSUAL.get(arm)}, arm
    assert tried > 2
