"""Mamba language models' checkpoints, as mamba_ssm and transformers write them, under ``SequenceModel``'s names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from espalier.errors import EspalierError

# Mixers bear the same names everywhere; around them, mamba_ssm has `backbone.embedding`, transformers
# `backbone.embeddings`, and their bare backbones (MambaModel, Mamba2Model) no prefix.
_KNOWN = re.compile(
    r"embedding\.weight|norm_f\.weight|lm_head\.weight|layers\.\d+\.norm\.weight"
    r"|layers\.\d+\.mixer\.(A_log|D|dt_bias|(in_proj|x_proj|dt_proj|out_proj|conv1d|norm)\.(weight|bias))"
)


def convert_mamba_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Mamba or Mamba-2 language model's weights under the names of ``SequenceModel``; tensors are shared.

    ====================================================== ==============================
    mamba_ssm, transformers                                here
    ====================================================== ==============================
    ``backbone.embedding.weight``, ``….embeddings.weight`` ``embedding.weight``
    ``backbone.layers.{i}.norm.weight``                    ``layers.{i}.norm.weight``
    ``backbone.layers.{i}.mixer.…``                        ``layers.{i}.mixer.…``
    ``backbone.norm_f.weight``                             ``norm_f.weight``
    ``lm_head.weight``                                     ``lm_head.weight``
    ====================================================== ==============================

    A head that is absent because it is tied becomes the embedding. Names that are already ours stay, so converting
    twice changes nothing.

    Args:
        state_dict: weights by name; ``torch.load(file, weights_only=True)`` or safetensors give it.

    Raises:
        EspalierError: a name that belongs to no Mamba language model, two names for one weight, or no embedding.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        new = re.sub(r"^embeddings\.", "embedding.", str(name).removeprefix("backbone."))
        if not _KNOWN.fullmatch(new):
            raise EspalierError(f"checkpoint names {name!r}: give a mamba_ssm or transformers Mamba model's")
        if new in converted:
            raise EspalierError(f"checkpoint names {new!r} twice, with and without a prefix: keep one of them")
        converted[new] = tensor
    if "embedding.weight" not in converted:
        raise EspalierError("checkpoint has no embedding: give the whole language model's weights, not a part of them")
    converted.setdefault("lm_head.weight", converted["embedding.weight"])
    return converted
