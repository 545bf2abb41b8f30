"""Muon for the matrices inside a network, AdamW for everything else, both torch's own, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MUON_EPS = 1e-7
"""torch's default: what norms of gradients are kept above. AdamW's ε is added to root mean squares, a larger thing."""


class MuonAdamW(torch.optim.Optimizer):
    """Each group of parameters goes to ``torch.optim.Muon`` or to ``torch.optim.AdamW``, by its entry ``"muon"``.

    Muon's steps are scaled to the root mean square of AdamW's (``match_rms_adamw``, arXiv 2502.16982), so that one rate
    and one weight decay serve both.

    Args:
        params: groups; those with ``muon=True`` hold matrices.
        lr: learning rate.
        betas: AdamW's moment decays.
        eps: AdamW's denominator offset.
        weight_decay: decoupled, for both.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "muon": False})
        for group in self.param_groups:
            if group["muon"]:
                group["eps"] = _MUON_EPS
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take in what a state dict or a pickle brings, which are new groups and a new state."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        # Both work on these very groups and this very state, so that whoever sets a rate, saves or restores sees one
        # optimiser.
        self._parts: list[torch.optim.Optimizer] = []
        if matrices := [group for group in self.param_groups if group["muon"]]:
            self._parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others := [group for group in self.param_groups if not group["muon"]]:
            fused = not any(p.is_complex() for group in others for p in group["params"])
            self._parts.append(torch.optim.AdamW(others, fused=fused))
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights that Muon is for: of linear layers, without the classifier and tied tables.

    Args:
        model: whose ``get_classifier()``, if it has one, is left out.
    """
    find = getattr(model, "get_classifier", None)
    classifier = find() if callable(find) else None
    kept = {id(p) for p in classifier.parameters()} if isinstance(classifier, nn.Module) else set()
    kept |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {
        id(module.weight)
        for module in model.modules()
        if hasattr(module, "in_features") and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        if weight.ndim == 2
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in linear - kept}
