"""The built-in checks; importing this registers them."""

from espalier.doctor.checks import (  # noqa: F401
    constant,
    earlier,
    memory,
    noise,
    norms,
    ranks,
    scale,
    ssm,
    tied,
    training,
)
