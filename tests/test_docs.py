"""Every block of code on every page: Python runs, page by page, and each shell line is one that the command accepts."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import espalier
from espalier.cli.commands import COMMANDS
from espalier.cli.parse import parse
from espalier.recipes import ARMS, Recipe, recipe_functions
from espalier.recipes.validation import recipe_to_dict

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Kept as they were written: their commands are those of version 0.1.0.
ARCHIVE = ROOT / "docs" / "results" / "archive"


def _without_links(paragraph: str) -> str:
    return re.sub(r"\]\([^)]*\)|`[^`]*`", "", paragraph)


def _numbers(text: str) -> list[str]:
    """Return the numbers with a decimal point or thousands; short whole numbers prove nothing."""
    return re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])|\d{5,}", re.sub(r"(?<=\d),(?=\d{3})", "", text))


_SMALL_VIT = "espalier.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2)"
# What a page says the reader has: a model, a batch, a loop.
GIVEN = {
    "guides/after-training.md": """
from dataclasses import replace
import PIL.Image
from espalier.recipes import get_recipe
from espalier.train import train
train(replace(get_recipe("digits_vit"), epochs=1, data_args={"train_limit": 100}), "runs/photos", progress=False)
PIL.Image.new("RGB", (20, 30)).save("new.jpg")
""",
    "guides/frameworks.md": f"""
import warnings
import lightning_fabric, transformers
warnings.filterwarnings("ignore", message=".*srun")  # told where Slurm is installed
from small_runs import train, vit as small_vit
from torch.distributed.fsdp import fully_shard
model, other, trained = small_vit(), {_SMALL_VIT}, {_SMALL_VIT}
espalier.structure_(trained)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
args, data = transformers.TrainingArguments("out", use_cpu=True, report_to=[]), []
""",
    "guides/hub.md": """
import warnings
from dataclasses import replace
from espalier.recipes import get_recipe
from espalier.train import train
train(replace(get_recipe("digits_vit"), epochs=1, data_args={"train_limit": 100}), "runs/digits", progress=False)
""",
    "methods/attention.md": f"model = {_SMALL_VIT}",
    "methods/cayley.md": "matrix = torch.randn(2, 5, 3)",
    "methods/certificates.md": """
from dataclasses import replace
from espalier.data import build_source
from espalier.recipes import get_recipe
source = build_source(replace(get_recipe("digits_robust"), data_args={"train_limit": 100, "test_limit": 50}))
model = espalier.models.OrthogonalConvNet(**source.model_args)
class MyLayer(torch.nn.Linear): pass
""",
    "methods/convmixer.md": """
_kept = espalier.models.ConvMixer(8, 2, kernel_size=3, patch_size=2)
torch.save({"state_dict": _kept.state_dict()}, "convmixer.pth.tar")
""",
    "methods/filters.md": """
conv = torch.nn.Conv2d(16, 16, 9, groups=16)
net = espalier.models.ConvMixer(16, 2, kernel_size=9, patch_size=2)
small_trained_net = espalier.models.ConvMixer(16, 2, kernel_size=5, patch_size=2)
""",
    "methods/scans.md": """
x, x_next, mask = torch.randn(2, 9, 256), torch.randn(2, 256), torch.ones(2, 9, dtype=torch.bool)
""",
    "methods/ssm.md": 'model = espalier.models.SequenceModel(8, 64, "mamba2*2")',
}
# Blocks that need what this environment has not: they are compiled here, and run in the test that is named.
ELSEWHERE = {
    "timm.create_model": "tests/interop/test_timm_layouts.py",
    "fully_shard(": "tests/init/test_sharded.py",
    "onnxruntime.": "tests/train/test_finished_run.py",
}


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the page's blocks of these languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def key(page: Path) -> str:
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=key)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "integrations"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names: dict[str, object] = {"torch": torch, "espalier": espalier, "__name__": "page"}
        exec(GIVEN.get(key(page), ""), names)
        for text in blocks(page, "python"):
            code = compile(text, f"{page.name}: {text.splitlines()[0]}", "exec")
            where = [test for sign, test in ELSEWHERE.items() if sign in text]
            if not where:
                exec(code, names)
            assert all((ROOT / test).is_file() for test in where)


def printed_blocks(page: Path) -> list[tuple[str, str]]:
    """Return every block of Python that is followed at once by what it printed."""
    return re.findall(r"^```python\n([^`]*?)^```\n\n```text\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_five_minutes_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    pairs = printed_blocks(ROOT / "docs" / "start.md")
    assert len(pairs) == 3
    for code, shown in pairs:
        exec(code, names)
        # Measured to three digits; the last may differ from processor to processor.
        assert rounded(capsys.readouterr().out) == rounded(shown)


def rounded(text: str) -> str:
    spaced = re.sub(r" +|─+", " ", text)
    return re.sub(r"[+-]0\.\d+", lambda found: f"{float(found[0]):+.2f}", spaced).strip()


def shell_lines(page: Path) -> list[str]:
    """Return the commands of a page's shell blocks, their comments taken off and their line breaks joined."""
    lines = []
    for text in blocks(page, "", "sh", "bash", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            lines += [part.strip() for part in line.partition(" #")[0].removeprefix("$ ").split("&&")]
    return [line for line in lines if line]


LINES = sorted({(key(page), line) for page in PAGES if ARCHIVE not in page.parents for line in shell_lines(page)})


@pytest.mark.parametrize(("page", "line"), [each for each in LINES if re.search(r"(^|[\w-] )espalier [a-z]", each[1])])
def test_espalier_accepts_the_line(page: str, line: str) -> None:
    words = shlex.split(line)
    while words and words[0] != "espalier":  # torchrun … espalier, uvx … espalier
        words.pop(0)
    _, name, *rest = words
    assert name in COMMANDS
    # Recipes in files of one's own are those of the page's story, not files here.
    own = [word for word in rest[:1] if re.search(r"\.(py|ya?ml|json)\b", word)]
    parse(name, COMMANDS[name], ["digits_vit", *rest[1:]] if own else rest)


@pytest.mark.parametrize(("page", "line"), [each for each in LINES if each[1].startswith(("python ", "make "))])
def test_scripts_and_make_targets_exist(page: str, line: str) -> None:
    program, target, *_ = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif target != "-m":
        assert (ROOT / target).is_file()


@pytest.mark.parametrize("line", sorted({line for _, line in LINES if "pip install" in line or "uv add" in line}))
def test_installation_lines_name_this_package(line: str) -> None:
    named = [word for word in shlex.split(line) if "espalier" in word]
    assert all(re.fullmatch(r"torch-espalier(\[[\w,]+\])?", word) for word in named), line


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "notebook"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert cell["outputs"] or "print" not in "".join(cell["source"]), "run it and keep what it prints"
        exec(compile("".join(cell["source"]), path.name, "exec"), names)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))["pages"]()


def test_every_command_recipe_and_arm_has_its_page(made: dict[str, str]) -> None:
    for folder, names in (("commands", COMMANDS), ("recipes", recipe_functions()), ("arms", ARMS)):
        pages = {path for path in made if path.startswith(f"{folder}/")}
        assert pages == {f"{folder}/{name}.md" for name in names} | {f"{folder}/index.md"}
        assert all(f"({name}.md)" in made[f"{folder}/index.md"] for name in names)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_page_names_every_option(name: str, made: dict[str, str]) -> None:
    page = made[f"commands/{name}.md"]
    for parameter in inspect.signature(COMMANDS[name]).parameters.values():
        if parameter.name == "recipe":
            assert all(f"--{field.name.replace('_', '-')}" in page for field in fields(Recipe) if field.name in ("lr",))
        elif parameter.default is not inspect.Parameter.empty:
            assert parameter.name.replace("_", "-") in page.lower()
        else:
            assert parameter.name.upper().replace("_", "-") in page.upper().replace("_", "-")


def test_recipe_pages_give_the_recipe_back(made: dict[str, str]) -> None:
    for name, function in recipe_functions().items():
        rows = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", made[f"recipes/{name}.md"], re.MULTILINE))
        shown = {field: json.loads(value.replace("\\|", "|")) for field, value in rows.items()}
        recipe = recipe_to_dict(function())
        plain = recipe_to_dict(Recipe(name))
        assert json.loads(json.dumps(recipe)) == json.loads(json.dumps(plain | shown))


def test_reference_holds_every_public_name(made: dict[str, str]) -> None:
    frozen = (ROOT / "tests" / "public_surface.txt").read_text().splitlines()
    names = {re.match(r"[\w.]+", line)[0] for line in frozen if not line.endswith(": module")}  # type: ignore[index]
    written = set(re.findall(r"^::: ([\w.]+)$", "\n".join(made.values()), re.MULTILINE))
    assert names == written


def test_navigation_leads_to_every_page_by_hand() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert key(page) in text, f"{key(page)} is missing in the nav of mkdocs.yml"


def test_pictures_of_the_pages_are_there_and_drawn_by_the_script() -> None:
    script = (ROOT / "docs" / "draw_pictures.py").read_text()
    shown = set()
    for page in PAGES[1:]:
        for source in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / source).is_file(), f"{key(page)}: {source}"
            shown.add(source)
    for picture in (ROOT / "docs" / "images" / "methods").glob("*.svg"):
        assert f'write("{picture.stem}"' in re.sub(r"write\(\s*", "write(", script)
        assert any(source.endswith(picture.name) for source in shown)


_MEASURED = [
    pytest.param(page, paragraph, id=f"{page.name}-{number}")
    for page in PAGES
    if "results" not in page.parts
    for number, paragraph in enumerate(page.read_text().split("\n\n"))
    if re.search(r"results/|diary\.md", paragraph) and _numbers(_without_links(paragraph))
]


@pytest.mark.parametrize(("page", "paragraph"), _MEASURED)
def test_measured_numbers_stand_where_the_paragraph_says(page: Path, paragraph: str) -> None:
    # Prose goes stale when records are added: the page or the record that it names must hold every number in it.
    places = [page.parent / link for link in re.findall(r"\]\(([^):]*(?:results|diary)[^)#]*)", paragraph)]
    places += [ROOT / name for name in re.findall(r"`(docs/results/records/[^`]*)`", paragraph)]
    held = set(_numbers("\n".join(place.read_text() for place in places)))
    missing = set(_numbers(_without_links(paragraph))) - held
    assert not missing, f"{sorted(missing)} not in {', '.join(place.name for place in places)}"
