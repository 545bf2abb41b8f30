"""The training loop written out plainly: torch's reference optimisers, one parameter group a parameter, no tricks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.data.source import Source
from espalier.recipes.base import Recipe

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "nadam": torch.optim.NAdam}


def plain_loss(recipe: Recipe, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the batch of what each formula says for one example at a time."""
    classes = logits.shape[1]
    truths = targets if targets.is_floating_point() else torch.eye(classes)[targets]
    terms = []
    for scores, truth in zip(logits, truths, strict=True):
        arguments = dict(recipe.loss_args)
        if recipe.loss == "multi_margin":
            label = int(truth.argmax())
            others = [max(scores[j] * 0, 0.5 - scores[label] + scores[j]) for j in range(classes) if j != label]
            terms.append(sum(others) / classes)
            continue
        temperature = arguments.get("temperature", 1.0)
        logs = torch.log_softmax((scores - arguments.get("offset", 0.0) * truth) / temperature, 0)
        smoothed = (1 - recipe.label_smoothing) * truth + recipe.label_smoothing / classes
        if recipe.loss == "logit_annealing":
            smoothed = truth * (1 - logs.exp()) ** arguments["beta"]
        terms.append(-temperature * (smoothed * logs).sum())
    return sum(terms) / len(terms)


def plain_training(
    model: nn.Module, source: Source, recipe: Recipe, rates: list[float]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Train ``model`` as a recipe says, at the rates given, and return weights, averages and losses."""
    exempt = model.no_weight_decay()
    trained = {name: p for name, p in model.named_parameters() if not (recipe.freeze and name == "depthwise.weight")}
    groups = [
        {"params": [p], "weight_decay": 0.0 if name in exempt else recipe.weight_decay} for name, p in trained.items()
    ]
    kind = OPTIMIZERS[recipe.optimizer]
    optimizer = kind(groups, lr=1.0, betas=recipe.betas, eps=recipe.eps, foreach=False)
    averages = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    losses, updates = [], 0
    model.train()
    for epoch in range(recipe.epochs):
        for step in range(source.steps_per_epoch(recipe.batch_size)):
            images, labels = source.train_batch(recipe.seed, epoch, step, recipe.batch_size)
            for group in optimizer.param_groups:
                group["lr"] = rates[updates]
            optimizer.zero_grad()
            loss = plain_loss(recipe, model(images), labels)
            loss.backward()
            norm = torch.sqrt(sum((p.grad**2).sum() for p in trained.values()))
            if recipe.clip_norm and norm > recipe.clip_norm:
                for p in trained.values():
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
