"""The built-in checks; importing this registers them."""

from espalier.doctor.checks import (  # noqa: F401
    constant,
    equality,
    memory,
    noise,
    norms,
    scale,
    ssm,
    training,
)
