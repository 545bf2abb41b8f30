"""A packager: the wheel with torch alone. The command is there, the library works, nothing optional is missed."""

import subprocess
import sys

import torch

import espalier

assert "site-packages" in espalier.__file__, espalier.__file__
for words in (["--version"], ["--help"], ["recipes"], ["train", "--help"]):
    run = subprocess.run(["espalier", *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, (words, run.stderr)
    assert run.stdout.strip()
net = espalier.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3)
report = espalier.structure_(net, generator=torch.Generator().manual_seed(0))
assert all(row.status == "written" for row in report.layers), report
assert espalier.diagnose(net).ok
layer = espalier.nn.CayleyConv2d(3, 3, 3)
x = torch.randn(2, 3, 8, 8)
torch.testing.assert_close(layer(x).norm(), x.norm() if layer.bias is None else layer(x).norm())
print(espalier.nn.backend())
# What is an extra says which one, in one line and without a traceback.
run = subprocess.run(["espalier", "train", "digits_vit"], capture_output=True, text=True, check=False)
assert run.returncode == 2, run.stderr
assert "pip install 'torch-espalier[train]'" in run.stderr, run.stderr
assert run.stderr.count("\n") == 1, run.stderr
assert "transformers" not in sys.modules
