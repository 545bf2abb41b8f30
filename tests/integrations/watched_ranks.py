"""Two ranks train a ViT inside DDP under the watch; then rank 1 alone has a fault."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from small_runs import train, vit
from torch import nn

from espalier.cli.main import leave_process_group
from espalier.integrations import StructureWatch, UnhealthyModelError

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
# Ranks keep running statistics of their own between forward passes.
net = nn.Sequential(vit(), nn.BatchNorm1d(10))
ddp = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
with StructureWatch(ddp, optimizer, structure=True) as watch:
    train(ddp, optimizer, shift=float(rank))
assert watch.checks[-1].stage == "end"
if rank == 0:
    print("second part", flush=True)
torch.distributed.barrier()

single = vit()
with StructureWatch(single, initial_weights=folder / "init.safetensors", on_problem="fail"):
    pass
if rank == 1:
    torch.nn.init.constant_(single.head.bias, float("nan"))
try:
    StructureWatch(single).start()
    raised = "nothing"
except UnhealthyModelError as error:
    raised = str(error)
(folder / f"rank{rank}.txt").write_text(raised)
leave_process_group()
