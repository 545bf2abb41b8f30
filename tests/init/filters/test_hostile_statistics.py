"""Files of statistics from strangers: what no measurement can give is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from espalier.errors import EspalierError
from espalier.files import write_tensors
from espalier.init.filters.statistics import FilterStatistics

_BAD = {
    "kernel_size": [[-5, -5], [5.5, 5.5], "55", [True, 25], [0, 25]],
    "filters": [-3, 0, 2.7, "8", math.inf, True],
    "sampling_variance": [math.nan, -1, math.inf, "0.1", None],
    "shrinkage": [math.nan, -0.1, 7, "0"],
}


def load(folder: Path, **changes: object) -> FilterStatistics:
    entry = {"name": "a", "kernel_size": [5, 5], "filters": 8, "sampling_variance": 0.1, "shrinkage": 0.0, **changes}
    metadata = {"format": "espalier.filter_statistics/1", "layers": json.dumps([entry])}
    return FilterStatistics.load(
        write_tensors(folder / "s.safetensors", {"0000": torch.eye(25, dtype=torch.float64)}, metadata)
    )


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in _BAD.items() for value in values])
def test_fields_that_nothing_measures_are_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(EspalierError, match="cannot be read: layer 'a' states") as caught:
        load(tmp_path, **{field: value})
    assert "\n" not in str(caught.value)


def test_the_bounds_are_among_what_is_read(tmp_path: Path) -> None:
    [layer] = load(tmp_path, filters=1, sampling_variance=0, shrinkage=1).layers
    assert (layer.filters, layer.sampling_variance, layer.shrinkage) == (1, 0.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [{"depth": value} for value in (math.nan, -0.1, 1.1, "0.5", [0.5], 10**400)]
    + [{"centre": value} for value in ("left", 5, [], {})],
)
def test_depths_and_centres_that_no_layer_has_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(EspalierError, match="cannot be read: ") as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)
