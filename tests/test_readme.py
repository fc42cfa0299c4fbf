"""What the README and the pages in docs/ name is there, what they promise is true, and their words are the field's."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import detect_ava
import finetune
import pretrain
import probe
from baselines import moco_v3
from support.config import load_config, read_yaml

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    path.relative_to(ROOT): path.read_text("utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}
EVERYTHING = "\n".join(PAGES.values())
STAGES = {stage.__name__.replace(".", "/"): stage for stage in (pretrain, finetune, probe, detect_ava, moco_v3)}
FOLDERS = [stage.DEFAULT.parent for stage in STAGES.values()]
KEYS = {key for stage in STAGES.values() for key in read_yaml(stage.DEFAULT)}
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def code_of(page: str, language: str) -> list[str]:
    """The blocks of code in a language."""
    return [code for kind, code in BLOCK.findall(page) if kind == language]


def commands_of(page: str) -> list[list[str]]:
    """Words of the commands in blocks and between backticks that start Python: a stage, a module, a benchmark."""
    lines = "\n".join(code_of(page, "bash")).replace("\\\n", " ").split("\n")
    lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))
    parts = [part for line in lines for part in line.split("&&")]
    commands = [shlex.split(part, comments=True) for part in parts]
    return [words for words in commands if len(words) > 1 and words[0].split("/")[-1] in ("python", "torchrun")]


ALL = {tuple(words) for page in PAGES.values() for words in commands_of(page)}
COMMANDS = sorted(words for words in ALL if any(re.search(r"\.py$|^support\.", word) for word in words))


# ---- the map ----

SECTION = README[README.index("## From the paper to the code") :].split("\n## ")[0]
MAP = re.findall(r"^\| ((?:Sec\.|Eq\.|Tables?|Figures?) [^|]+) \| ([^\n]+) \|$", SECTION, re.MULTILINE)


def test_map_covers_the_paper():
    """Every section, equation, table and figure, by number."""
    found = {"Sec.": set(), "Eq.": set(), "Table": set(), "Figure": set()}
    for of_paper, _ in MAP:
        kind, numbers = of_paper.split(":")[0].split(" ", 1)
        found[kind.removesuffix("s")] |= set(numbers.replace(" and ", ", ").split(", "))
    sections = {"1", "2", "3.1", "3.2", "3.3", "4.1", "4.2", "4.3", "4.4", "5", "A", "B", "C.1", "C.2", "D", "E", "F"}
    tables = {"1a", "1b", "1c", "1d", "1e", "1f", *map(str, range(2, 14))}
    assert found == {"Sec.": sections, "Eq.": {"1"}, "Table": tables, "Figure": set(map(str, range(1, 12)))}


@pytest.mark.parametrize("of_paper, here", MAP)
def test_every_name_in_the_map_exists(of_paper, here):
    """`file.py` is followed by names in it; configuration files are in a stage's folder; keys are of some stage."""
    module, known = None, False
    for name in re.findall(r"`([^`]+)`", here):
        if name.endswith(".py"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        elif name.endswith((".yaml", "/")):
            assert any((folder / name).exists() for folder in (ROOT, *FOLDERS)), name
        elif name.startswith("--"):
            assert f'"{name}"' in (ROOT / module.__file__).read_text("utf-8"), name
        elif name.split("=")[0] not in KEYS and name != "init=":
            value = module
            for part in name.split("."):
                value = getattr(value, part)
        known = True
    assert known or "not here" in here or "docs/" in here or "as Table 2" in here, of_paper


# ---- files, links, keys, numbers ----


@pytest.mark.parametrize("page", PAGES)
def test_every_link_picture_and_file_exists(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link
    prose = BLOCK.sub("", PAGES[page])
    written = {"config.yaml"}  # by runs
    for name in set(re.findall(r"`([\w/]+\.(?:py|yaml))`", prose)) - written:
        folders = [ROOT, *FOLDERS, ROOT / "configs/finetune/variations"]
        assert any((folder / name).exists() for folder in folders), name


def test_every_page_is_linked_from_the_readme():
    links = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert links == {page.as_posix() for page in PAGES} - {"README.md"}


@pytest.mark.parametrize("folder", [folder.name for folder in FOLDERS])
def test_every_recipe_is_in_a_table(folder):
    """Of docs/reproduce.md, in the section that names the recipe's folder."""
    page = (ROOT / "docs/reproduce.md").read_text("utf-8")
    section = page[page.index(f": `configs/{folder}/`") :].split("\n## ")[0]
    missing = [path.name for path in (ROOT / "configs" / folder).glob("*.yaml") if f"`{path.name}`" not in section]
    missing += [path.name for path in (ROOT / "configs" / folder).glob("*/*.yaml") if path.name not in section]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_key_exists(page):
    keys = set(re.findall(r"`((?:model|mask|moco|target|data|optim|run)\.\w+)(?=[`=])", PAGES[page]))
    assert keys <= KEYS | {"model.py", "data.py"}, keys - KEYS


def test_numbers_of_lines_are_true():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", README, re.MULTILINE)
    files = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"), *(ROOT / "baselines").glob("*.py")]
    stated = {name: int(number.replace(",", "")) for name, number in rows}
    true = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in files}
    assert stated.keys() == {name for name, lines in true.items() if lines}
    wrong = {name: (stated[name], true[name]) for name in stated if abs(stated[name] - true[name]) > 0.1 * true[name]}
    assert not wrong, f"stated, true: {wrong}"


@pytest.mark.parametrize(
    "stage, pattern",
    [
        ("support/scores.py", r"\b(scores\.csv|classes\.csv|comparison\.png)\b"),
        ("detect_ava.py", r"\b(detections\.csv|mAP\.json)\b"),
    ],
)
def test_files_that_testing_writes_are_as_named(stage, pattern):
    names = set(re.findall(pattern, EVERYTHING))
    assert len(names) > 1
    for name in names:
        assert f'"{name}"' in (ROOT / stage).read_text("utf-8")


# ---- commands ----


def test_ci_finds_the_test_command():
    """.ci/run reads it from the README."""
    marked = README[README.index("<!-- test command -->\n```bash\n") :]
    assert "<!-- test command -->" in (ROOT / ".ci/run").read_text("utf-8") and "pytest" in marked.split("```")[1]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_real(words):
    """Scripts, modules, options and configuration files exist; every key=value is valid for what is started."""
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    if words[start] == "-m":
        start += 1
    name = words[start].removesuffix(".py")
    script = ROOT / (f"{name}.py" if words[start].endswith(".py") else f"{name.replace('.', '/')}.py")
    source = script.read_text("utf-8")
    assert '__name__ == "__main__"' in source
    arguments = words[start + 1 :]
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, option
    settings = [word for word in arguments if re.match(r"\w+(\.\w+)?=|[^-].*\.yaml$", word)]
    if name in ("support.datasets", "support.prepare", "support.study"):  # read recipes of several stages
        name = next((Path(word).parent.name for word in settings if word.endswith(".yaml")), "finetune")
    if name in STAGES:
        load_config(STAGES[name].DEFAULT, settings)
    else:
        assert not settings


def test_the_pages_have_commands_of_every_stage_and_module():
    started = {word.removesuffix(".py") for words in COMMANDS for word in words}
    modules = {
        f"support.{path.stem}"
        for path in (ROOT / "support").glob("*.py")
        if '__name__ == "__main__"' in path.read_text("utf-8")
    }
    assert STAGES.keys() <= started
    assert modules - {"support.toy"} <= started  # the stages render the toy videos


@pytest.mark.parametrize("page", PAGES)
def test_python_that_is_shown_compiles_and_imports_what_exists(page):
    for code in code_of(PAGES[page], "python"):
        compile(code, str(page), "exec")
        for module, names in re.findall(r"^from (\S+) import (.+)$", code, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), (module, name)


# ---- language ----

NOT_OUR_WORDS = """goes on, go on, mend, mends, mended, anew, beside, by heart, hangs on, worth chance, so many, chief,
    piece, pieces, hidden, hides, numerics, recompute, recomputed, deviation, colour, colours, centre, centred,
    normalise, normalised, initialise, initialised, neighbour, neighbours, favour, favours, grey, licence"""


@pytest.mark.parametrize("page", PAGES)
def test_words_are_the_fields(page):
    """design.md's table of words, and American spelling. Code is not prose: a key may be named run.recompute."""
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", PAGES[page]))
    words = "|".join(re.escape(word) for word in re.split(r",\s+", NOT_OUR_WORDS))
    found = re.findall(rf"\b(?:{words})\b", " ".join(prose.split()), re.IGNORECASE)
    assert not found


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    """At most 120 columns, but for tables. The study's page is generated, each paragraph in one line."""
    long = [line for line in PAGES[page].splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long or page.name == "study.md"
