"""What the README names is there."""

import re

from conftest import ROOT

import common
import pretrain

README = (ROOT / "README.md").read_text()


def test_every_recipe_is_mentioned():
    assert all(path.name in README for path in pretrain.CONFIGS.glob("*.yaml"))


def test_every_key_and_file_in_it_exists():
    keys = set(re.findall(r"\b((?:model|mask|target|data|optim|run)\.\w+)=", README))
    assert len(keys) > 10
    for key in keys:
        group, name = key.split(".")
        assert hasattr(getattr(common.load_config(pretrain.DEFAULT, []), group), name), key
    files = re.findall(r"`([\w/]+\.(?:py|yaml|txt))`", README)
    assert all((ROOT / name).exists() or (pretrain.CONFIGS / name).exists() for name in files if name not in ("broken_videos.txt", "config.yaml")), files
    assert (ROOT / "assets/toy.png").exists()


def test_commands_name_existing_scripts_and_recipes():
    for words in re.findall(r"(?:torchrun|python)[^\n`]*", README):
        for name in re.findall(r"[\w/]+\.(?:py|yaml)\b", words):
            assert (ROOT / name).exists(), words
