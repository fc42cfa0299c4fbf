"""Configuration errors teach; files, stored configurations and the command line say the same thing the same way."""

import pytest
import yaml
from conftest import ROOT

from support.config import UserError, as_dict, load_config

TOY = ROOT / "configs" / "pretrain" / "toy.yaml"


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("optim.base_lrr=1", "command line: unknown key 'optim.base_lrr'; the nearest valid key is 'optim.base_lr'"),
        ("mask.ration=0.5", "nearest valid key is 'mask.ratio'"),
        ("ratio=0.5", "unknown key 'ratio'; the nearest valid key is 'mask.ratio'"),
        ("optim=3", "unknown key 'optim'; the nearest valid key is 'optim.batch_size' or 'optim.base_lr' or"),
        ("lr=3", "the nearest valid key is 'optim.base_lr' or 'optim.min_lr'"),
        ("data.frames=many", "data.frames expects int such as 16, not 'many'"),
        ("data.flip=1", "data.flip expects bool"),
        ("mask.ratio=true", "mask.ratio expects float"),
        ("data.scales=[1.0,a]", "data.scales expects float"),
        ("model.cube=[2,16]", "model.cube expects list such as [2, 16, 16], not '[2,16]'"),
        ("model.cube=[2,16,16,1]", "model.cube expects list"),
        ("data.scales=[]", "data.scales expects list such as [1.0, 0.875, 0.75, 0.66], not '[]'"),
        ("data.scales=[[1]]", "data.scales expects float"),
        ("mask.ratio=[", "mask.ratio expects float"),
        ("mask.ratio=nan", "mask.ratio=nan has to be at least 0 and at most 1"),
        ("mask.ratio=90", "mask.ratio=90.0 has to be at least 0 and at most 1"),
        ("optim.base_lr=inf", "optim.base_lr=inf has to be at least 0 and finite"),
        ("optim.base_lr=-1", "optim.base_lr=-1.0 has to be at least 0"),
        ("optim.betas=[0.9,1.5]", "optim.betas=1.5 has to be at least 0 and at most 0.9999"),
        ("data.scales=[0]", "data.scales=0.0 has to be at least 0.01 and at most 1"),
        ("model.cube=[2,0,8]", "model.cube=0 has to be at least 1"),
        ("run.seed=5000000000", "run.seed=5000000000 has to be at least 0 and at most 4294967295"),
        ("mask.ratio", "neither a .yaml file nor key=value, which is written without spaces"),
        ("configs/finetune/toy.yaml", "configs/finetune/toy.yaml: unknown key 'model.drop_path'; "),
        ("configs/finetune/toy.yaml", " others are unknown too: is it another stage's?"),
        ("a.yaml b.yaml", "only one configuration file can be given, not a.yaml and b.yaml"),
        ("none.yaml", "no configuration can be read from none.yaml"),
    ],
)
def test_mistakes_end_in_a_sentence(setting, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        load_config(TOY, setting.split())
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_numbers_lists_and_words():
    settings = ["optim.base_lr=1e-3", "optim.epochs=3", "data.scales=[1, 0.875]", "data.flip=on", "run.folder=a=b"]
    config = load_config(TOY, settings)
    assert config.optim.base_lr == 0.001 and config.optim.epochs == 3 and config.run.folder == "a=b"
    assert config.data.scales == [1.0, 0.875] and isinstance(config.data.scales[0], float) and config.data.flip is True


TEXTS = ["my #1 set", "*_test_split1.txt=1", "101", "on", "2024-01-01", "a: b", "[x", "null", " "]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_takes_the_text_as_typed(text, tmp_path):
    assert load_config(TOY, [f"data.root={text}"]).data.root == text
    (tmp_path / "file.yaml").write_text(yaml.safe_dump({"base": str(TOY), "data": {"root": text}}))
    assert load_config(TOY, [str(tmp_path / "file.yaml")]).data.root == text


def test_an_unquoted_number_or_date_in_a_file_is_text_where_text_is_expected(tmp_path):
    (tmp_path / "file.yaml").write_text("data:\n  root: 101\n  train: 2024-01-01\n  val:\n")
    config = load_config(TOY, [str(tmp_path / "file.yaml")])
    assert (config.data.root, config.data.train, config.data.val) == ("101", "2024-01-01", "")


def test_a_new_key_is_one_line_in_the_defaults_which_write_numbers_as_people_do(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "defaults.yaml").write_text("optim:\n  lr: 8e-3\n  on: true\n  list: [1e-1, 2]\nrun:\n  folder: ''\n")
    (folder / "toy.yaml").write_text("optim:\n  on: false\n")
    before = as_dict(load_config(folder / "toy.yaml", ["optim.lr=1"]))
    assert before == {"optim": {"lr": 1.0, "on": False, "list": [0.1, 2.0]}, "run": {"folder": "runs/stage/toy"}}
    with open(folder / "defaults.yaml", "a") as file:
        file.write("  new: 0.5\n")
    assert load_config(folder / "toy.yaml", ["run.new=1"]).run.new == 1.0
    assert load_config(folder / "toy.yaml", [], before).run.new == 0.5  # a stored configuration does not know it


def test_files_change_the_defaults_and_their_bases(tmp_path):
    files = {
        "lone": "mask: {type: random}",
        "variant": f"base: {TOY}\nmask: {{ratio: 0.5}}\noptim: {{epochs: 7}}",
        "nested": "base: variant.yaml\nmask: {type: random}",
        "other": "mask: {ratio: 0.6}\noptim: {epochs: 8}",
        "both": "base: [nested.yaml, other.yaml]\noptim: {epochs: 9}",  # the later one wins, the file over both
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    expected = {"lone": (0.9, "random", 1600, 224), "variant": (0.5, "tube", 7, 32), "nested": (0.5, "random", 7, 32)}
    for name, values in (expected | {"both": (0.6, "random", 9, 32)}).items():
        config = load_config(TOY, [str(tmp_path / f"{name}.yaml"), "run.seed=4"])
        assert (config.mask.ratio, config.mask.type, config.optim.epochs, config.data.size) == values
        assert (config.run.folder, config.run.seed) == (f"runs/pretrain/{name}", 4)
    for text, sentence in (
        ("base: wrong.yaml\n", "leads back"),
        ("base: 3\n", "no configuration can be read from .*3"),
        ("- 1\n", "has to hold groups of 'key: value' lines"),
        ("mask:\n  ratoi: 0.5\n", "wrong.yaml: unknown key 'mask.ratoi'"),
        ("mask: {", "no configuration can be read from"),
        ("data:\n  root: !!python/object/apply:os.system ['echo run']\n", "data.root"),  # YAML cannot run code
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_config(TOY, [str(tmp_path / "wrong.yaml")])


@pytest.mark.parametrize(
    "recipe, setting, sentence",
    [
        ("own_small", "optim.epochs=50", "has no effect with optim.steps=1500 of .*own_small.yaml: set optim.steps=0"),
        ("own_small", "optim.warmup_epochs=2", "has no effect with optim.steps=1500"),
        ("toy", "optim.warmup_steps=9", "has no effect with optim.steps=0 .*: set optim.steps as well, or optim.warm"),
    ],
)
def test_a_length_that_has_no_effect_is_a_mistake(recipe, setting, sentence):
    words = [str(TOY.with_name(f"{recipe}.yaml")), setting]
    with pytest.raises(UserError, match=sentence):
        load_config(TOY, words)
    for steps in (0, 7):
        assert load_config(TOY, [*words, f"optim.steps={steps}"]).optim.steps == steps
    stored = as_dict(load_config(TOY, words[:1]))
    with pytest.raises(UserError, match=sentence.replace(".*own_small.yaml", "the checkpoint")):
        load_config(TOY, [setting], stored)


def test_a_stored_configuration_of_another_version_is_read_with_one_line_about_it(capsys):
    stored = as_dict(load_config(TOY, ["mask.ratio=0.5"]))
    del stored["run"]["recompute"], stored["data"]["flip"]
    stored["run"]["gone"] = 1
    config = load_config(TOY, ["run.seed=3"], stored)
    assert (config.run.recompute, config.data.flip, config.mask.ratio, config.run.seed) == (False, True, 0.5, 3)
    assert not hasattr(config.run, "gone")
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and "data.flip, run.gone, run.recompute" in printed
    assert load_config(TOY, [], as_dict(config)) == config and not capsys.readouterr().err
    assert load_config(TOY, [str(TOY)], stored).mask.ratio == 0.75  # a file decides
