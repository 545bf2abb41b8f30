"""A finished run for other programs: ONNX, torch.export or safetensors, with the normalisation inside, and checked."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, require, require_known
from espalier.files import target_of, write_bytes, write_tensors
from espalier.nn.kernels.backend import use_backend
from espalier.nn.orthogonal.spectrum.cache import constant_operators
from espalier.randomness import derive_generator
from espalier.train.image_input import ImageInput
from espalier.train.predict import pixel_model
from espalier.train.run import MODEL, Run, read_part

Net = Callable[[Tensor], Tensor]
Format = Literal["onnx", "torch-export", "safetensors"]
_SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
METADATA = "espalier"
"""Key under which an exported file says, in JSON, what the net expects and how it is built."""
# Batch sizes that the file is tried with, none of them that of the example it was made from.
_CHECKED, _EXAMPLE = (1, 3, 4), 2
_TOLERANCE = 1e-3


def export_run(run: Run, to: Format, out: Path | None = None) -> Path:
    """Write a run's final network to one file that maps images in [0, 1], ``(B, C, H, W)`` for any B, to logits.

    ``onnx`` is read by ONNX Runtime and others, ``torch-export`` by ``torch.export.load``; neither needs this library,
    and both are tried here on batches of three sizes. ``safetensors`` holds the weights under the model's own names,
    for ``espalier audit`` and for programs that build the model. Every file says which classes, size and normalisation
    belong to it: in the metadata under ``espalier``, as JSON.

    Args:
        run: a finished run on images.
        to: the format.
        out: the file; beside the run folder, with its name, by default.

    Returns:
        The file.

    Raises:
        EspalierError: an unfinished run, or one whose data are no images; a model that the format cannot hold; a file
            that does not give the same logits.
        MissingExtraError: ONNX or its runtime is not installed.
    """
    require_known("format", to, _SUFFIXES)
    expected = ImageInput.load(run.path)
    folder = run.path.resolve()
    out = folder.with_name(folder.name + _SUFFIXES[to]) if out is None else Path(out)
    about = {**read_part(run.path, MODEL), "input": asdict(expected), "recipe": run.recipe.name}
    if to == "safetensors":
        return write_tensors(out, run.model().state_dict(), {METADATA: json.dumps(about)})
    net = pixel_model(run)
    shape = (expected.channels, expected.height, expected.width)
    target_of(out)  # which refuses folders, pipes and devices before the work begins
    try:
        with warnings.catch_warnings(), torch.no_grad(), use_backend("torch"):
            # Exporters warn of themselves, and log which of torchvision's operators they would know.
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            program = _trace(net, torch.rand(_EXAMPLE, *shape, generator=derive_generator(0, "export")))
            content, loaded = {"onnx": _to_onnx, "torch-export": _to_archive}[to](program, about)
            _check(net, loaded, shape)
    except EspalierError:
        raise
    except Exception as error:  # exporters raise whatever their parts do
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise EspalierError(f"model {run.recipe.model!r} cannot be exported to {to}: {reason.strip()[:300]}") from error
    finally:
        logging.disable(logging.NOTSET)
    write_bytes(out, content)
    return out


def _trace(net: nn.Module, images: Tensor) -> Any:
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net(images)  # orthogonal layers keep the operators that the graph will hold
    with constant_operators():
        return torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _to_archive(program: Any, about: dict[str, Any]) -> tuple[bytes, Net]:
    """Return the content of a file of ``torch.export``, and the net that it holds when it is read again."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(about)})
    return file.getvalue(), torch.export.load(file).module()


def _to_onnx(program: Any, about: dict[str, Any]) -> tuple[bytes, Net]:
    """Return the content of an ONNX file, and the net that it holds when it is read again."""
    runtime = require("onnxruntime", "export")
    for needed in ("onnx", "onnxscript"):
        require(needed, "export")
    # With weights inside: a second file would have to travel along.
    made = torch.onnx.export(program, input_names=["image"], output_names=["logits"], dynamo=True, verbose=False)
    assert made is not None
    model = made.model_proto
    model.metadata_props.add(key=METADATA, value=json.dumps(about))
    content = model.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])


def _check(net: nn.Module, loaded: Net, shape: tuple[int, ...]) -> None:
    generator = derive_generator(0, "export", "check")
    for batch in _CHECKED:
        images = torch.rand(batch, *shape, generator=generator)
        wanted, found = net(images), loaded(images)
        error = (found - wanted).abs().max().item() if found.shape == wanted.shape else float("inf")
        if not error <= _TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise EspalierError(
                f"the exported net's logits differ by {error:.3g} on a batch of {batch}: nothing is kept"
            )
