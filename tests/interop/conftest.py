"""Runs before torchvision is imported, which would fail without the operators that this declares."""

from __future__ import annotations

import reference.torchvision_operators  # noqa: F401
