"""The training loop written out plainly: torch's reference optimiser, one parameter group a parameter, no tricks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.data.source import Source
from espalier.recipes.base import Recipe


def plain_training(
    model: nn.Module, source: Source, recipe: Recipe, rates: list[float]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Train ``model`` with AdamW and cross-entropy, the rates given, and return weights, averages and losses."""
    exempt = model.no_weight_decay()
    groups = [
        {"params": [p], "weight_decay": 0.0 if name in exempt else recipe.weight_decay}
        for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=recipe.betas, eps=recipe.eps, foreach=False)
    averages = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    losses, updates = [], 0
    model.train()
    for epoch in range(recipe.epochs):
        for step in range(source.steps_per_epoch(recipe.batch_size)):
            images, labels = source.train_batch(recipe.seed, epoch, step, recipe.batch_size)
            for group in optimizer.param_groups:
                group["lr"] = rates[updates]
            optimizer.zero_grad()
            loss = -torch.log_softmax(model(images), 1)[torch.arange(len(labels)), labels].mean()
            loss.backward()
            norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
            if recipe.clip_norm and norm > recipe.clip_norm:
                for p in model.parameters():
                    p.grad *= recipe.clip_norm / norm
            optimizer.step()
            updates += 1
            losses.append(loss.item())
            decay = min(recipe.ema_decay, (1 + updates) / (10 + updates))
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    averages[name] = decay * averages[name] + (1 - decay) * tensor
                else:
                    averages[name] = tensor.clone()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, averages, losses
