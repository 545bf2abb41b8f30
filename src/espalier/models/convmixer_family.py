"""The published ConvMixers by name, and timm's register of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from espalier.errors import require
from espalier.models.convmixer import ConvMixer

Constructor = Callable[..., ConvMixer]

# A partial keeps the signature of the class, so any argument can still be changed: num_classes=10.
CONVMIXERS: dict[str, Constructor] = {
    "convmixer_1536_20": partial(ConvMixer, dim=1536, depth=20, kernel_size=9, patch_size=7),
    "convmixer_768_32": partial(ConvMixer, dim=768, depth=32, kernel_size=7, patch_size=7, activation="relu"),
    "convmixer_1024_20_ks9_p14": partial(ConvMixer, dim=1024, depth=20, kernel_size=9, patch_size=14),
    "convmixer_512_16_ks8_p7": partial(ConvMixer, dim=512, depth=16, kernel_size=8, patch_size=7),
    "convmixer_1024_12_ks8_p7": partial(ConvMixer, dim=1024, depth=12, kernel_size=8, patch_size=7),
    # CIFAR-10: the accurate one, and that of the published script. All others are for ImageNet.
    "convmixer_256_8_ks9_p1": partial(ConvMixer, dim=256, depth=8, kernel_size=9, patch_size=1, num_classes=10),
    "convmixer_256_8_ks5_p2": partial(ConvMixer, dim=256, depth=8, kernel_size=5, patch_size=2, num_classes=10),
}
"""The published variants by name (arXiv 2201.09792, the checkpoints beside it and its CIFAR-10 script)."""


def register_with_timm() -> list[str]:
    """Make the variants known to timm as ``espalier_NAME``, so that ``timm.create_model`` and its tools find them.

    timm's own three names stay timm's. ``pretrained=True`` has no weights to load: convert a checkpoint instead.

    Returns:
        The names; calling again changes nothing.

    Raises:
        MissingExtraError: timm is not installed.
    """
    timm = require("timm", "timm")
    names = []
    for name, constructor in CONVMIXERS.items():
        entry = _timm_entry(timm, f"espalier_{name}", constructor)
        if not timm.is_model(entry.__name__):
            timm.models.register_model(entry)
        names.append(entry.__name__)
    return names


def _timm_entry(timm: Any, name: str, constructor: Constructor) -> Callable[..., Any]:
    def entry(pretrained: bool = False, **arguments: Any) -> Any:
        indices = arguments.pop("out_indices", 1)
        return timm.models.build_model_with_cfg(
            constructor,
            name,
            pretrained,
            feature_cfg={"out_indices": indices, "feature_cls": "getter"},
            **arguments,
        )

    entry.__name__ = name
    # timm lists a model under the module of its function and adds the name to that module's __all__.
    entry.__module__ = __name__
    return entry
