"""To be imported before torchvision beside a CPU build of torch: declares two operators that its wheel lacks there."""

from __future__ import annotations

import torch

# Kept alive: the operators vanish with the library object.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
