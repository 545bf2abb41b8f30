"""Values from a command line or a file against the annotations of the functions that get them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import numpy as np
import pytest

from espalier.annotations import refuse_misfits
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.models import MODELS, build_model

if TYPE_CHECKING:
    from nowhere import Unknown


def made(
    anything,
    flag: bool = False,
    count: int = 1,
    share: float = 0.5,
    word: str = "a",
    maybe: int | None = None,
    old: Optional[float] = None,  # noqa: UP045 — as users write it
    implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013
    either: bool | Literal["auto"] = "auto",
    pair: tuple[int, int] = (1, 2),
    many: Sequence[float] = (),
    plain: tuple = (),
    odd: Unknown = None,
    path: Path | None = None,
    **others: int,
) -> None: ...


class Made:
    def __init__(self, flag: bool = False, count: int = 1) -> None: ...


@pytest.mark.parametrize(
    ("name", "good", "bad", "said"),
    [
        ("flag", [True, False, np.True_], ["False", "no", 1, 0.0, None], "give true or false"),
        ("count", [1, -3, np.int64(3)], [True, "1", 1.5, (1,)], "give a whole number"),
        ("share", [1, 0.5, np.float64(3)], [True, "1"], "give a number"),
        ("word", ["", "b"], [1, True, None], "give text (in quotes"),
        ("maybe", [None, 2], ["None", 2.0, False], "give a whole number or null"),
        ("old", [None, 2], ["None", True], "give a number or null"),
        ("implicit", [None, 2], ["2"], "give a whole number"),
        ("either", ["auto", "no", True], [1, None], "give true or false or one of 'auto'"),
        ("pair", [(1, 2), [3, 4], (1, 2, 3)], [(1.5, 2), (True, 1), 3, "12"], "give a list"),
        ("many", [(), (1, 2.5), [3]], [(True,), ("a",), 3], "give a list"),
        ("plain", [(), ("a", 1)], [3], "give a list"),
        ("odd", [1, "a", None], [], ""),
        ("path", ["a", 1], [], ""),
        ("anything", [1, "a", None], [], ""),
        ("more", [1, "a"], [], ""),
    ],
)
def test_a_value_that_contradicts_its_annotation_is_refused(
    name: str, good: list[Any], bad: list[Any], said: str
) -> None:
    for value in good:
        refuse_misfits("made", made, {name: value})
    for value in bad:
        with pytest.raises(EspalierError) as caught:
            refuse_misfits("made", made, {name: value})
        assert str(caught.value).startswith(f"made: argument {name!r} is {value!r}: {said}")


@wraps(made)
def wrapped(*args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize("function", [Made, partial(Made, count=2), wrapped, partial(partial(made, 1), word="x")])
def test_classes_wrappers_and_partials_are_looked_through(function: Callable[..., Any]) -> None:
    refuse_misfits("it", function, {"flag": True, "count": 3})
    with pytest.raises(EspalierError, match="argument 'flag' is 'False': give true or false"):
        refuse_misfits("it", function, {"flag": "False"})


# Other tests add models of their own to the table.
@pytest.mark.parametrize("name", sorted(n for n, make in MODELS.items() if make.__module__.startswith("espalier.")))
def test_every_model_refuses_text_where_it_counts_classes(name: str) -> None:
    size = "vocab_size" if name == "sequence" else "num_classes"
    with pytest.raises(EspalierError, match=f"argument '{size}' is 'two': give a whole number"):
        build_model(name, **{size: "two"})


OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Sequential):
    def __init__(self, num_classes: int, bias: bool = True, hidden=8):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes, bias=bias))

def weak(model: nn.Module, generator: torch.Generator, loud: bool = False) -> None: ...

def noise(mixed: bool = False):
    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 2)
    return data, data
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model-args.qkv-bias", "maybe"], "model 'vit': argument 'qkv_bias' is 'maybe': give true or false"),
        (["--model-args.depth", "true"], "model 'vit': argument 'depth' is True: give a whole number"),
        (["--model", "own.py:Net", "--model-args.bias", "no"], "own.py:Net': argument 'bias' is 'no'"),
        (["--init", "own.py:weak", "--init-args.loud", "3"], "own.py:weak': argument 'loud' is 3"),
        (["--init", "covariance", "--init-args.wrap", "maybe"], "init 'covariance': argument 'wrap' is 'maybe'"),
        (["--dataset", "own.py:noise", "--data-args.mixed", "no"], "own.py:noise': argument 'mixed' is 'no'"),
        (["--loss", "multi_margin", "--loss-args.margin", "true"], "loss 'multi_margin': argument 'margin' is True"),
    ],
)
def test_models_data_inits_and_losses_alike(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    assert main(["train", "digits_vit", *words, "--threads", "1", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spelt", ["False", "false", "FALSE"])
def test_true_and_false_in_any_case_are_no_text(
    spelt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    words = ["--model", "own.py:Net", "--model-args.bias", spelt, "--model-args.hidden", "16", "--quiet"]
    words += ["--data-args.train-limit", "128", "--data-args.test-limit", "100", "--epochs", "1", "--threads", "1"]
    assert main(["train", "digits_vit", *words, "--out", "run"]) == 0
    assert json.loads((tmp_path / "run/recipe.json").read_text())["model_args"] == {"bias": False, "hidden": 16}
