"""A certificate: what was proved about a network on some images, to read, to print and to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from espalier.errors import EspalierError
from espalier.files import read_sealed, write_sealed
from espalier.tables import plain_table

EPSILONS = (36 / 255, 72 / 255, 108 / 255)
"""The radii of the literature, in [0, 1] pixel units."""


@dataclass(frozen=True)
class Certificate:
    """Radii within which the predictions on some images cannot change; made by ``espalier.certify.certify``."""

    radii: tuple[float, ...] = field(repr=False)
    """ℓ2 radius of every image in [0, 1] pixel units; 0 where the prediction is wrong or nothing is proved."""
    labels: tuple[int, ...] = field(repr=False)
    """Class of every image."""
    predictions: tuple[int, ...] = field(repr=False)
    """Class that the network gives it."""
    lipschitz: float
    """Constant of the network below its last layer if ``last_layer``, else of the whole network."""
    last_layer: bool
    """Whether the rows of the last layer were used pair by pair."""
    rounding: float
    """Largest bound, over the images, on how far rounding moves a difference of two scores."""
    assumptions: tuple[str, ...] = field(repr=False)
    """What the certificate rests on, in words."""
    arithmetic: str = "unstated"
    """In which the certified scores are computed: ``"float64"`` or ``"float32"``; 0.1.0 did not state it."""
    slack: tuple[tuple[str, float, float], ...] = field(default=(), repr=False)
    """Per module, in the order of the forward pass: path and class, Lipschitz constant, and the largest bound on the
    rounding error that it adds to its own result."""
    weights: str = field(default="", repr=False)
    """SHA-256 of the file of weights that a run was certified with; empty where it was no run."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.radii)

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are classified correctly, unperturbed."""
        return sum(y == p for y, p in zip(self.labels, self.predictions, strict=True)) / len(self)

    def certified(self, eps: float) -> list[bool]:
        """Return for every image whether its prediction is right and provably stays so within ``eps``."""
        if not eps >= 0:
            raise EspalierError(f"eps {eps}: give a radius from 0, in [0, 1] pixel units")
        return [radius > eps for radius in self.radii]

    def certified_accuracy(self, eps: float) -> float:
        """Return the share of the images whose prediction is right and provably stays so within ``eps``."""
        return sum(self.certified(eps)) / len(self)

    def table(self, eps: Sequence[float] = EPSILONS) -> str:
        """Return clean and certified accuracy as plain text, and what they rest on."""
        rows = [("ε", "certified accuracy"), ("0 (clean)", f"{100 * self.clean_accuracy:.2f} %")]
        rows += [(in_255(value), f"{100 * self.certified_accuracy(value):.2f} %") for value in eps]
        median = sorted(self.radii)[len(self) // 2]
        summary = (
            f"{len(self)} images; median radius {median:.4g}; Lipschitz constant {self.lipschitz:.6g}; "
            f"arithmetic {self.arithmetic}, rounding of score differences at most {self.rounding:.3g}"
        )
        return "\n".join([plain_table(rows), "", summary, *(f"- {text}" for text in self.assumptions)])

    def slack_table(self) -> str:
        """Return for every module its constant and the rounding that it adds, as plain text."""
        rows = [(path, f"{constant:.9g}", f"{added:.2e}") for path, constant, added in self.slack]
        return plain_table([("module", "constant", "rounding"), *rows])

    def __str__(self) -> str:
        """Return the table at the radii of the literature."""
        return self.table()

    def save(self, path: Path | str) -> Path:
        """Write the certificate as JSON, whole or not at all, and return the path."""
        radii = [radius if math.isfinite(radius) else None for radius in self.radii]
        return write_result(path, {**asdict(self), "radii": radii})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a certificate that ``save`` wrote.

        Raises:
            EspalierError: missing file, damaged, or not a certificate.
        """
        found: Self = read_result(cls, path, "a certificate")
        if not len(found.radii) == len(found.labels) == len(found.predictions) > 0:
            raise EspalierError(f"{path} is not a certificate: it lacks values of its images: make it again")
        return found


def in_255(eps: float) -> str:
    """Return a radius as text, as k/255 where it is that."""
    if not math.isfinite(eps):
        return f"{eps:g}"
    share = Fraction(eps * 255).limit_denominator(100)
    whole = share.denominator == 1 and share.numerator > 0 and math.isclose(eps * 255, share.numerator, rel_tol=1e-9)
    return f"{share.numerator}/255" if whole else f"{eps:g}"


def write_result(path: Path | str, values: dict[str, Any]) -> Path:
    """Write the fields of a result as JSON, whole or not at all, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, values)
    return path


def read_result(cls: Any, path: Path | str, what: str) -> Any:
    """Return a result that ``write_result`` wrote.

    Args:
        cls: a dataclass.
        path: the file.
        what: it is, with its article.

    Raises:
        EspalierError: missing file, damaged, or with other fields or values than the dataclass can have.
    """
    values, kinds = read_sealed(Path(path), what.partition(" ")[2]), get_type_hints(cls)
    needed = {each.name for each in fields(cls) if each.default is MISSING}
    if not needed <= values.keys() <= kinds.keys():
        raise EspalierError(f"{path} is not {what}: its fields must be {', '.join(sorted(kinds))}")
    try:
        return cls(**{name: _as_kind(value, kinds[name]) for name, value in values.items()})
    except ValueError as error:
        raise EspalierError(f"{path} is not {what}: it holds {error}, which none can: make it again") from None


def _as_kind(value: Any, kind: Any) -> Any:
    """Return a value of JSON as one of an annotated kind: tuples for lists, numbers from 0, infinity for None.

    Raises:
        ValueError: it is of another kind.
    """
    if get_origin(kind) is tuple and isinstance(value, list):
        inside = get_args(kind)
        each = inside[:1] * len(value) if Ellipsis in inside else inside
        if len(each) == len(value):
            return tuple(map(_as_kind, value, each))
    distance = kind in (float, float | None)
    if distance and value is None:
        return math.inf if kind is float else None
    if type(value) not in ((int, float) if distance else (kind,)) or ((distance or kind is int) and not value >= 0):
        raise ValueError(f"{value!r}"[:60])
    return value
