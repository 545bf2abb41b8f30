"""The built-in checks; importing this registers them."""

from espalier.doctor.checks import (  # noqa: F401
    clones,
    constant,
    direction,
    earlier,
    memory,
    noise,
    norms,
    positions,
    ranks,
    scale,
    ssm,
    tied,
    training,
)
