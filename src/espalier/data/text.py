"""Text, one token a character, as a source of windows: the control on which recall is not the point."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from espalier.data.arguments import find_data, read_arguments
from espalier.data.sequences import TokenBatches
from espalier.data.source import contents_digest, require_step
from espalier.errors import EspalierError
from espalier.files import open_regular
from espalier.randomness import derive_generator
from espalier.sizes import whole_number

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe


class TextSource(TokenBatches):
    """A ``Source`` of windows of a text; the target of every character is the next one.

    The vocabulary is the set of characters of the whole text, in the order of their code points. The first nine tenths
    train, at places drawn at random; the rest is the test, in windows side by side (a ragged rest is dropped).

    Args:
        text: the text.
        length: characters of a window.
        steps_per_epoch: batches called an epoch; as many as the training text has windows for if none is given.
        eval_examples: windows of the test, spread evenly over it; all if none is given.

    Raises:
        EspalierError: a text too short for one window in either part.
    """

    def __init__(
        self, text: str, length: int = 256, *, steps_per_epoch: int | None = None, eval_examples: int | None = None
    ) -> None:
        self.length = whole_number("length", length)
        self._steps = None if steps_per_epoch is None else whole_number("steps_per_epoch", steps_per_epoch)
        codes_N = torch.tensor([ord(character) for character in text], dtype=torch.long)
        points_V, tokens_N = codes_N.unique(return_inverse=True)
        self.characters = "".join(map(chr, points_V.tolist()))
        self.model_args = {"vocab_size": len(self.characters)}
        cut = len(text) * 9 // 10
        windows = (len(text) - cut - 1) // length
        if windows < 1:
            raise EspalierError(
                f"length {length} is too long for a text of {len(text)} characters, a tenth of which is the test: "
                f"give at most {max(0, len(text) - cut - 1)}, or a longer text"
            )
        self._train_N = tokens_N[:cut]
        test_WL = tokens_N[cut : cut + windows * length].view(windows, length)
        next_WL = tokens_N[cut + 1 : cut + windows * length + 1].view(windows, length)
        if eval_examples is not None:
            kept_E = torch.linspace(0, windows - 1, min(whole_number("eval_examples", eval_examples), windows)).long()
            test_WL, next_WL = test_WL[kept_E], next_WL[kept_E]
        self._splits = {"test": (test_WL, next_WL)}

    @property
    def digest(self) -> str:
        """Digest of the text that trains and tests."""
        return contents_digest(self.characters, *(part.cpu() for part in (self._train_N, *self._splits["test"])))

    def to(self, device: torch.device | str) -> Self:
        """Move the text to ``device`` and return the source."""
        self._train_N = self._train_N.to(device)
        return super().to(device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches called an epoch."""
        return self._steps or len(self._train_N) // (batch_size * self.length)

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step`` of ``epoch``: windows (B, L) at random places and the characters that follow each.

        Raises:
            IndexError: the epoch has no such step.
        """
        require_step(step, self.steps_per_epoch(batch_size), batch_size)
        device = self._train_N.device
        generator = derive_generator(seed, "train", epoch, step, device=device)
        starts_B = torch.randint(len(self._train_N) - self.length, (batch_size,), generator=generator, device=device)
        window_BL = self._train_N[starts_B[:, None] + torch.arange(self.length + 1, device=device)]
        return window_BL[:, :-1], window_BL[:, 1:]


def text_source(recipe: Recipe) -> TextSource:
    """Return a text file, or the ``input.txt`` of a folder (arguments: ``length``, and the counts).

    ``steps_per_epoch`` and ``eval_examples`` default to the whole text. The file is ``data_path``, else what
    ``$ESPALIER_DATA`` holds under the name of the dataset.
    """
    defaults = {"length": 256, "steps_per_epoch": None, "eval_examples": None}
    return TextSource(read_text(find_data(recipe, recipe.dataset)), **read_arguments(recipe, defaults))


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, or the ``input.txt`` of a folder.

    Raises:
        EspalierError: there is none, it cannot be read, or it is not UTF-8 text.
    """
    file = path / "input.txt" if path.is_dir() else path
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8") as opened:
            return opened.read()
    except FileNotFoundError:
        raise EspalierError(f"{path} holds no input.txt: name the text file itself with --data") from None
    except OSError as error:
        raise EspalierError(f"cannot read {file} ({error.strerror}): name a text file with --data") from None
    except UnicodeDecodeError as error:
        raise EspalierError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
