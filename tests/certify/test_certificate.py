"""A certificate as a file and as a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from espalier.certify import Certificate
from espalier.certify.certificate import in_255
from espalier.errors import EspalierError


def certificate() -> Certificate:
    return Certificate(
        radii=(0.5, 0.2, 0.0, 0.0, math.inf),
        labels=(0, 1, 2, 3, 4),
        predictions=(0, 1, 2, 0, 4),
        lipschitz=1.25,
        last_layer=True,
        rounding=3e-6,
        assumptions=("pixels in [0, 1]",),
    )


def test_accuracies_count_radii() -> None:
    assert certificate().clean_accuracy == 0.8
    assert [certificate().certified_accuracy(eps) for eps in (0.0, 0.1, 0.2, 0.3, 10.0)] == [0.6, 0.6, 0.4, 0.4, 0.2]
    with pytest.raises(EspalierError, match="eps nan"):
        certificate().certified_accuracy(float("nan"))


def test_certificate_survives_saving_and_loading(tmp_path: Path) -> None:
    path = certificate().save(tmp_path / "deep" / "certificate.json")
    assert Certificate.load(path) == certificate()
    assert [p.name for p in path.parent.iterdir()] == ["certificate.json"]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_certificate_with_another_digit_is_refused_and_one_without_a_digest_is_checked(tmp_path: Path) -> None:
    path = certificate().save(tmp_path / "certificate.json")
    values = json.loads(path.read_text())
    for changes in ({"lipschitz": 0.1}, {"radii": values["radii"][::-1]}, {"digest": "0" * 64}):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(EspalierError, match=r"certificate\.json is damaged"):
            Certificate.load(path)
    del values["digest"]  # as the oldest certificates are
    path.write_text(json.dumps(values))
    assert Certificate.load(path) == certificate()
    wrong = ({"radii": []}, {"radii": 1.0}, {"lipschitz": "1"}, {"labels": [0]}, {"slack": [1]}, {"assumptions": [2]},
             {"rounding": float("nan")}, {"radii": [-1.0] * len(certificate())})  # fmt: skip
    for changes in wrong:
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(EspalierError, match="is not a certificate"):
            Certificate.load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"radii": []}', "{"])
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(EspalierError, match=r"file\.json"):
        Certificate.load(path)
    with pytest.raises(EspalierError, match=r"nowhere\.json"):
        Certificate.load(tmp_path / "nowhere.json")


def test_the_table_says_accuracies_and_assumptions() -> None:
    text = certificate().table([36 / 255, 0.3])
    assert "80.00 %" in text
    assert "36/255" in text
    assert text.splitlines()[3].split()[-2:] == ["60.00", "%"]
    assert text.splitlines()[4].split() == ["0.3", "40.00", "%"]
    assert "pixels in [0, 1]" in text
    assert "108/255" in str(certificate())


def test_radii_are_named_in_255ths_where_they_are_that() -> None:
    assert [in_255(eps) for eps in (36 / 255, 1.0, 0.5, 0.1, 1 / 255)] == ["36/255", "255/255", "0.5", "0.1", "1/255"]
