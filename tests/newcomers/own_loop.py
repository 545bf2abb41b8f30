"""Somebody with a training loop of their own: compare any two settings of it (extras: train)."""

from pathlib import Path

import torch

import espalier
from espalier.study import text_table


def train(arm: str, lr: float, seed: int, folder: Path) -> list[tuple[int, float]]:
    """Fit a line by gradient descent, with or without momentum; larger is better."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 4, generator=generator)
    target = x @ torch.randn(4, generator=generator)
    weight = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr, momentum=0.9 if arm == "momentum" else 0.0)
    curve = []
    for step in range(1, 31):
        optimizer.zero_grad()
        loss = (x @ weight - target).square().mean()
        loss.backward()
        optimizer.step()
        curve.append((step, -float(loss)))
    return curve


if __name__ == "__main__":
    found = espalier.compare(train, arms=["plain", "momentum"], lrs=[1e-3, 1e-2], seeds=3, out="study", workers=2)
    print(text_table(found))
    again = espalier.compare(train, arms=["plain", "momentum"], lrs=[1e-3, 1e-2], seeds=3, out="study", workers=0)
    assert text_table(again) == text_table(found)
    assert list(Path("study").rglob("*"))
