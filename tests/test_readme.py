"""What the README names is there."""

import importlib
import re

import pytest
from conftest import ROOT

import detect_ava
import finetune
import pretrain
import probe
import support.config

README = (ROOT / "README.md").read_text()
STAGES = (pretrain, finetune, probe, detect_ava)
KEYS = {key for stage in STAGES for key in support.config._flatten(support.config.as_dict(support.config.load_config(stage.DEFAULT, [])))}


@pytest.mark.parametrize("folder", [stage.CONFIGS.name for stage in STAGES])
def test_every_recipe_is_mentioned(folder):
    """By its path, or by its name in a table that its folder heads: `ssv2_base.yaml` is in several."""
    section = README[README.index(f"configs/{folder}/") :]
    missing = [path.name for path in (ROOT / "configs" / folder).glob("*.yaml") if path.name not in section]
    assert not missing


def test_every_key_and_file_in_it_exists():
    keys = set(re.findall(r"\b((?:model|mask|target|data|optim|run)\.\w+)=", README))
    assert len(keys) > 10 and keys <= KEYS, keys - KEYS
    files = re.findall(r"`([\w/]+\.(?:py|yaml))`", README)
    written = ("config.yaml",)  # by runs
    folders = (ROOT, *(stage.CONFIGS for stage in STAGES))
    missing = [name for name in files if name not in written and not any((folder / name).exists() for folder in folders)]
    assert not missing
    assert (ROOT / "docs/toy.png").exists()


MAP = re.findall(r"^\| ((?:Sec\.|Eq\.|Tables?|Figures?) [^|]+) \| ([^\n]+) \|$", README[README.index("## From the paper to the code") :].split("\n## ")[0], re.MULTILINE)


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
    """`file.py` is followed by names in it; a configuration file stands with its path; keys are of some stage."""
    module, known = None, False
    for name in re.findall(r"`([^`]+)`", here):
        if name.endswith(".py"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        elif name.endswith((".yaml", "/")):
            assert (ROOT / name).exists() or any((stage.CONFIGS / name).exists() for stage in STAGES), name
        elif name.startswith("--") or name.endswith("="):
            assert name in (ROOT / module.__file__).read_text() or name == "init="
        elif name.split("=")[0] not in KEYS:
            value = module
            for part in name.split("."):
                value = getattr(value, part)
        known = True
    assert known or "not here" in here or "below" in here or "as Table 2" in here, of_paper


def test_commands_name_existing_scripts_recipes_and_their_keys():
    """Every `key=value` of a command is a key of the stage that it starts."""
    for words in re.findall(r"(?:torchrun|python)[^\n`]*(?:\\\\\n[^\n`]*)*", README):
        for name in re.findall(r"[\w/]+\.(?:py|yaml)\b", words):
            assert (ROOT / name).exists(), words
        stage = next((stage for stage in STAGES if f"{stage.__name__}.py" in words), None)
        if stage:
            valid = support.config._flatten(support.config.as_dict(support.config.load_config(stage.DEFAULT, [])))
            for key in re.findall(r"(?<![-\w.])(\w+(?:\.\w+)?)=", words):
                assert key in valid, (key, words)


@pytest.mark.parametrize("stage, pattern", [("finetune.py", r"\b(scores\.csv|classes\.csv|comparison\.png)\b"), ("detect_ava.py", r"\b(detections\.csv|mAP\.json)\b")])
def test_files_that_testing_writes_are_as_named(stage, pattern):
    names = set(re.findall(pattern, README))
    assert len(names) > 1
    for name in names:
        assert f'"{name}"' in (ROOT / stage).read_text()
