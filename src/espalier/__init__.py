"""Espalier: networks whose weights carry structure from the first step."""

__version__ = "0.1.0"
