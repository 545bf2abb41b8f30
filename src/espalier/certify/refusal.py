"""The refusal of a certificate: what cannot be bounded is named, and nothing is claimed about it."""

from __future__ import annotations

from espalier.errors import EspalierError


class UncertifiableError(EspalierError):
    """No Lipschitz constant or rounding bound can be stated for a part of a network; the message names it and says why.

    Args:
        reason: why not, and what to do.
        module: path and class of the module; a rule leaves it out, the analysis adds it.
    """

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(f"no Lipschitz constant for {module}: {reason}" if module else reason)
        self.module = module
