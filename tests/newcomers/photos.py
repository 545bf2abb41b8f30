"""Somebody with photos in folders: train on them, resume, look at them, take the model away (extras: train, export)."""

import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
for split, count in (("train", 16), ("val", 6)):
    for name, centre in (("ripe", (200, 40, 40)), ("green", (40, 180, 60))):
        folder = Path("photos", split, name)
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(rng.normal(centre, 30, (40, 56, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.jpg")
Path("photos/train/ripe/._0.jpg").write_bytes(b"left by another system")


def espalier(*words: str) -> str:
    """Run the command and return what it prints and says."""
    run = subprocess.run(["espalier", *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, (words, run.stderr)
    return run.stdout + run.stderr


train = ["train", "digits_vit", "--dataset", "folder", "--data", "photos", "--data-args.size", "16", "--epochs", "4"]
espalier(*train, "--batch-size", "8", "--out", "runs/photos", "--quiet")
assert json.loads(Path("runs/photos/result.json").read_text())["epochs"] == 4
assert "already finished" in espalier(*train, "--batch-size", "8", "--out", "runs/photos")
predicted = espalier("predict", "runs/photos", "photos/val/ripe/0.jpg", "photos/val/green/0.jpg")
assert "ripe" in predicted
espalier("export", "runs/photos", "--to", "onnx")
espalier("report", "runs/photos", "--out", "report.html")
assert Path("report.html").stat().st_size > 10_000
