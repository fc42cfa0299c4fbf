"""What the README and the pages in docs/ name is there, each command can be started, and the notebook runs."""

import importlib
import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import detect_ava
import finetune
import pretrain
import probe
from baselines import moco_v3
from support.config import load_config, read_yaml

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
README = (ROOT / "README.md").read_text("utf-8")
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT): path.read_text("utf-8") for path in FILES}
STAGES = {stage.__name__.replace(".", "/"): stage for stage in (pretrain, finetune, probe, detect_ava, moco_v3)}
FOLDERS = [stage.DEFAULT.parent for stage in STAGES.values()]
KEYS = {key for folder in FOLDERS for key in read_yaml(folder / "defaults.yaml")}
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def code_of(page: str, language: str) -> list[str]:
    """The blocks of code in a language."""
    return [code for kind, code in BLOCK.findall(page) if kind == language]


def commands_of(page: str) -> list[list[str]]:
    """Words of the commands in blocks and between backticks that start a stage or a tool."""
    lines = "\n".join(code_of(page, "bash")).replace("\\\n", " ").split("\n")
    lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    commands = [words for words in commands if len(words) > 1 and words[0].split("/")[-1] in ("python", "torchrun")]
    return [words for words in commands if any(re.search(r"\.py$|^tools\.", word) for word in words)]


COMMANDS = sorted({tuple(words) for page in PAGES.values() for words in commands_of(page)})
SECTION = README[README.index("## From the paper to the code") :].split("\n## ")[0]
MAP = re.findall(r"^\| ((?:Sec\.|Eq\.|Tables?|Figures?) [^|]+) \| ([^\n]+) \|$", SECTION, re.MULTILINE)


def test_the_map_covers_the_paper():
    """Every section, equation, table and figure, by number."""
    seen = {"Sec.": set(), "Eq.": set(), "Table": set(), "Figure": set()}
    for in_paper, _ in MAP:
        kind, numbers = in_paper.split(":")[0].split(" ", 1)
        seen[kind.removesuffix("s")] |= set(numbers.replace(" and ", ", ").split(", "))
    sections = {"1", "2", "3.1", "3.2", "3.3", "4.1", "4.2", "4.3", "4.4", "5", "A", "B", "C.1", "C.2", "D", "E", "F"}
    tables = {"1a", "1b", "1c", "1d", "1e", "1f", *map(str, range(2, 14))}
    assert seen == {"Sec.": sections, "Eq.": {"1"}, "Table": tables, "Figure": set(map(str, range(1, 12)))}


@pytest.mark.parametrize("in_paper, here", MAP)
def test_every_name_in_the_map_exists(in_paper, here):
    """`file.py` is followed by names in it; configuration files are in a stage's folder; keys are of some stage."""
    module, known = None, False
    for name in re.findall(r"`([^`]+)`", here):
        if name.endswith(".py"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        elif name.endswith((".yaml", "/")):
            assert any((folder / name).exists() for folder in (ROOT, *FOLDERS)), name
        elif name.startswith("--"):
            assert f'"{name}"' in Path(module.__file__).read_text("utf-8"), name
        elif name.split("=")[0] not in KEYS and name != "init=":
            value = module
            for part in name.split("."):
                value = getattr(value, part)
        known = True
    assert known or "not here" in here or "docs/" in here or "as Table 2" in here, in_paper


@pytest.mark.parametrize("page", PAGES)
def test_every_link_file_and_key_exists(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link
    prose = BLOCK.sub("", PAGES[page])
    folders = [ROOT, *FOLDERS, ROOT / "configs/finetune/variations"]
    for name in set(re.findall(r"`([\w/]+\.(?:py|yaml))`", prose)) - {"config.yaml"}:  # which runs write
        assert any((folder / name).exists() for folder in folders), name
    keys = set(re.findall(r"`((?:model|mask|moco|target|data|optim|run)\.\w+)(?=[`=])", PAGES[page]))
    assert keys <= KEYS | {"model.py", "data.py"}, keys - KEYS
    for code in code_of(PAGES[page], "python"):
        compile(code, str(page), "exec")
        for module, names in re.findall(r"^from (\S+) import (.+)$", code, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), (module, name)


def test_every_page_recipe_file_and_tool_is_named():
    """Pages and files in the README, recipes in docs/reproduce.md in the section of their folder."""
    links = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert links == {page.as_posix() for page in PAGES} - {"README.md"}
    page = PAGES[Path("docs/reproduce.md")]
    for folder in FOLDERS:
        section = page[page.index(f": `configs/{folder.name}/`") :].split("\n## ")[0]
        recipes = {path.name for path in folder.rglob("*.yaml")} - {"defaults.yaml"}
        assert not [name for name in recipes if name not in section]
    files = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"), *(ROOT / "baselines").glob("*.py")]
    rows = "".join(re.findall(r"^\| (`[\w/]+\.py`.*?) \|", README, re.MULTILINE))
    assert set(re.findall(r"`([\w/]+\.py)`", rows)) == {
        path.relative_to(ROOT).as_posix() for path in files if path.stat().st_size
    }
    tools = {f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if "def main" in path.read_text("utf-8")}
    started = {word for words in COMMANDS for word in words}
    assert tools <= set(re.findall(r"\btools\.\w+", README)) and {f"{stage}.py" for stage in STAGES} <= started


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_real(words):
    """Scripts, modules, options and configuration files exist; every key=value is valid for what is started."""
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("tools."))
    name = words[start].removesuffix(".py")
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text("utf-8")
    if "--evaluate" in words:  # whose options are in another file
        source += "".join(path.read_text("utf-8") for path in (ROOT / "support").glob("*.py"))
    assert '__name__ == "__main__"' in source
    arguments = words[start + 1 :]
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, option
    settings = [word for word in arguments if re.match(r"\w+(\.\w+)?=|[^-].*\.yaml$", word)]
    if name.startswith("tools.") and settings:  # read recipes of several stages
        folders = [Path(word).parent.name for word in settings if word.endswith(".yaml")]
        name = next((stage for stage in STAGES if STAGES[stage].DEFAULT.parent.name in folders), "finetune")
    if name in STAGES:
        load_config(STAGES[name].DEFAULT, settings)


def outputs(notebook: dict) -> str:
    return "".join(json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")


def test_notebook_runs_and_is_committed_with_the_outputs_of_a_whole_run_in_order(tmp_path: Path, monkeypatch):
    """In a short form, and committed with the outputs of the long one."""
    committed, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    whole = outputs(committed)
    assert "step 3,000: loss" in whole and '"error"' not in whole and "stderr" not in whole and " nan" not in whole
    assert whole.count("image/png") >= 15 and "image/jpeg" not in whole and NOTEBOOK.stat().st_size < 500_000
    monkeypatch.setenv("WALKTHROUGH", "short")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the video of section 1 is written there
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    short = outputs(notebook)
    assert "step 10: loss" in short and short.count("image/png") == whole.count("image/png")
