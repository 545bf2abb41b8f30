"""The built-in checks; importing this registers them."""

from espalier.doctor.checks import constant, equality, memory, noise, norms, scale, ssm, training  # noqa: F401
