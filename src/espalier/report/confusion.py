"""Which classes a run's network tells apart: accuracy class by class, and what is taken for what."""

from __future__ import annotations

from html import escape

from torch import Tensor

from espalier.errors import EspalierError, require
from espalier.report.curves import figure_of
from espalier.report.section import Context, Markup, Plot, Section, counted, folded, paragraph, table
from espalier.train import Run
from espalier.train.evaluate import confusion_matrix
from espalier.train.image_input import IMAGES, ImageInput
from espalier.train.run import FINAL

# More classes than these make a picture in which nothing can be read; the table names the worst pairs anyway.
_MOST_DRAWN = 100
_OPEN = 12


def confusion(run: Run, context: Context) -> Section | None:
    """Show the accuracy of every class over the test set with its 95 % interval, the worst first, and confusions."""
    if not (run.path / IMAGES).exists() or not (run.path / FINAL).exists():
        return None
    names = ImageInput.load(run.path).class_names
    model = run.model()
    try:
        source = run.source()
        split = source.eval_splits[0]
        counts_KK = confusion_matrix(model, source, split, len(names), run.recipe.eval_batch_size)
    except EspalierError as error:  # the data may have moved since, or a net of the user's own has more logits
        return Section("Class by class", (paragraph(f"Not counted: {error}", "note"),))
    listed = _table(counts_KK, names)
    parts: list[Markup | Plot] = [listed if len(names) <= _OPEN else folded(f"All {len(names)} classes", listed)]
    if len(names) <= _MOST_DRAWN:
        parts.insert(0, _picture(counts_KK, names, split))
    return Section("Class by class", tuple(parts))


def _table(counts_KK: Tensor, names: tuple[str, ...]) -> Markup:
    stats = require("scipy.stats", "train")
    rows: list[tuple[float, tuple[str, ...]]] = []
    for label, row_K in enumerate(counts_KK):
        right, total = int(row_K[label]), int(row_K.sum())
        if total == 0:
            rows.append((2.0, (names[label], "0", "no image in the test set", "")))
            continue
        # Wilson's interval is right for the few images that a class may have, where the normal one leaves [0, 1].
        span = stats.binomtest(right, total).proportion_ci(method="wilson")
        wrong_K = row_K.clone()
        wrong_K[label] = 0
        most = int(wrong_K.argmax())
        taken = f"{names[most]} ({counted(int(wrong_K[most]), 'image')})" if wrong_K[most] else "nothing"
        accuracy = f"{100 * right / total:.1f} % ({100 * span.low:.1f} to {100 * span.high:.1f})"
        rows.append((right / total, (names[label], str(total), accuracy, taken)))
    ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    return table(("class", "images", "accuracy, 95 % interval", "mostly taken for"), ordered, "numbers")


def _picture(counts_KK: Tensor, names: tuple[str, ...], split: str) -> Plot:
    graph = require("plotly.graph_objects", "train")
    share_KK = 100 * counts_KK / counts_KK.sum(1, keepdim=True).clamp(min=1)
    labels = [escape(name) for name in names]
    heat = graph.Heatmap(
        z=share_KK.tolist(), x=labels, y=labels, customdata=counts_KK.tolist(), zmin=0, zmax=100, colorscale="Viridis",
        colorbar={"title": "%"}, xgap=1, ygap=1,
        hovertemplate="%{y} taken for %{x}: %{z:.1f} %, %{customdata} images<extra></extra>",
    )  # fmt: skip
    figure = figure_of([heat], "taken for", "class")
    figure.update_layout(showlegend=False, height=min(900, 220 + 22 * len(names)))
    # Names are names, even where they are digits.
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return Plot(
        figure, f"Share of each class's images by what they are taken for: {int(counts_KK.sum())} {split} images."
    )
