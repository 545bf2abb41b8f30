"""One thing that is wrong, or worth knowing, about a model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]

# Most severe first; the order of a printed diagnosis.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What one check found in one layer.

    Attributes:
        severity: ``error`` (training cannot work as meant), ``warning`` (it probably does not) or ``note``.
        layer: name of the parameter, buffer or module; empty for the whole model.
        check: name of the check, which is also its heading in the guide.
        measured: what is there.
        usual: what a healthy start has.
        remedy: what to do, in one line.
        page: where it is explained, relative to the documentation.
    """

    severity: Severity
    layer: str
    check: str
    measured: str
    usual: str
    remedy: str
    page: str = ""
