"""Configuration errors teach, the schedule is the paper's, checkpoints and logs survive."""

import fcntl
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run

import support.config
import support.run
from support.config import UserError

CONFIGS = ROOT / "configs" / "pretrain"
TOY = CONFIGS / "toy.yaml"


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("optim.base_lrr=1", "command line: unknown key 'optim.base_lrr'; the nearest valid key is 'optim.base_lr'"),
        ("mask.ration=0.5", "nearest valid key is 'mask.ratio'"),
        ("ratio=0.5", "unknown key 'ratio'; the nearest valid key is 'mask.ratio'"),
        ("data.frames=many", "data.frames expects int, as in 8, but is 'many'"),
        ("data.frames=16.5", "data.frames expects int"),
        ("data.flip=1", "data.flip expects bool"),
        ("mask.ratio=true", "mask.ratio expects float"),
        ("data.scales=[1.0,a]", "data.scales expects float"),
        ("model.cube=2", "model.cube expects list"),
        ("model.cube=[2, 16]", "model.cube expects a list such as [2, 16, 16], not [2, 16]"),
        ("data.scales=[]", "data.scales expects a list such as [1.0], not []"),
        ("mask.ratio=.nan", "mask.ratio=nan has to be a share such as 0.9"),
        ("mask.ratio=90", "mask.ratio=90.0 has to be a share such as 0.9"),
        ("optim.base_lr=.inf", "optim.base_lr=inf has to be a number from 0 on"),
        ("optim.betas=[0.9, 1.5]", "optim.betas=1.5 has to be from 0 to below 1"),
        ("data.scales=[0]", "data.scales=0.0 has to be above 0, and 1 at most"),
        ("model.cube=[2, 0, 8]", "model.cube=0 has to be at least 1"),
        ("optim.epochs=0", "optim.epochs=0 has to be at least 1"),
        ("run.seed=5000000000", "run.seed=5000000000 has to be from 0 to 4294967295"),
        ("data.workers=-1", "data.workers=-1 has to be a number from 0 on"),
        ("optim.betas=[0.9, -1]", "optim.betas=-1.0 has to be from 0 to below 1"),
        ("optim=3", "unknown key 'optim'; the nearest valid key is 'optim.batch_size' or 'optim.base_lr' or"),
        ("lr=3", "the nearest valid key is 'optim.base_lr' or 'optim.min_lr'"),
        ("mask.ratio=[", "is not valid YAML"),
        ("mask.ratio", "neither a .yaml file nor key=value, which is written without spaces"),
        ("configs/finetune/toy.yaml", "configs/finetune/toy.yaml: unknown key 'init'; "),
        ("configs/finetune/toy.yaml", " others are unknown too, as if it were another stage's"),
        ("none.yaml", "no configuration can be read from none.yaml"),
    ],
)
def test_mistakes_end_in_a_sentence(setting, sentence):
    with pytest.raises(UserError) as error:
        support.config.load_config(TOY, [setting])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_overrides_and_numbers():
    config = support.config.load_config(TOY, ["optim.base_lr=1e-3", "optim.epochs=3", "data.scales=[1, 0.875]", "run.folder=a=b"])
    assert config.optim.base_lr == 0.001  # YAML reads 1e-3 as text
    assert config.data.scales == [1.0, 0.875] and isinstance(config.data.scales[0], float)
    assert config.optim.epochs == 3 and config.run.folder == "a=b"


def test_base_and_missing_keys(tmp_path):
    (tmp_path / "variant.yaml").write_text(f"base: {TOY}\nmask:\n  ratio: 0.5\n")
    (tmp_path / "nested.yaml").write_text("base: variant.yaml\nmask:\n  type: random\n")
    config = support.config.load_config(TOY, [str(tmp_path / "nested.yaml"), "run.seed=4"])
    assert (config.mask.ratio, config.mask.type, config.run.seed, config.data.size) == (0.5, "random", 4, 64)
    (tmp_path / "lone.yaml").write_text("mask:\n  ratio: 0.5\n")
    with pytest.raises(UserError, match="'model.size' is missing"):
        support.config.load_config(TOY, [str(tmp_path / "lone.yaml")])
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        support.config.load_config(TOY, [str(tmp_path / "loop.yaml")])
    (tmp_path / "number.yaml").write_text("base: 3\n")
    with pytest.raises(UserError, match="no configuration can be read from .*3"):
        support.config.load_config(TOY, [str(tmp_path / "number.yaml")])
    (tmp_path / "wrong.yaml").write_text(f"base: {TOY}\nmask:\n  ratoi: 0.5\n")
    with pytest.raises(UserError, match="wrong.yaml: unknown key 'mask.ratoi'"):
        support.config.load_config(TOY, [str(tmp_path / "wrong.yaml")])


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "evil.yaml").write_text("mask: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        support.config.load_config(TOY, [str(tmp_path / "evil.yaml")])


def test_schedule_by_hand():
    # SSV2, Table 9: 168,913 videos, batch 1024: 164 steps an epoch; base lr 1.5e-4 scales to 6e-4
    steps, warmup, peak, end = 800 * 164, 40 * 164, 1.5e-4 * 1024 / 256, 1e-5 * 1024 / 256
    assert steps == 131_200 and peak == pytest.approx(6e-4)

    def lr(step):
        return support.run.warmup_cosine(step, steps, warmup, peak, end)

    assert lr(0) == 0 and lr(warmup // 2) == pytest.approx(peak / 2) and lr(warmup) == pytest.approx(peak)
    assert lr((steps + warmup) // 2) == pytest.approx((peak + end) / 2)
    assert lr(steps - 1) == pytest.approx(end, rel=1e-4) and all(lr(s) >= lr(s + 1000) for s in range(warmup, steps - 1000, 1000))
    assert lr(warmup + 1000) == pytest.approx(end + (peak - end) * (1 + math.cos(math.pi * 1000 / (steps - warmup))) / 2)


def test_log_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)) + '{"step": 4')
    log = support.run.Log(path, 20)
    log.write(step=30, loss=0.5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize("line", ["no json", "[]", '{"loss": 1}'])
def test_a_foreign_log_ends_in_a_sentence(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="holds a line that is none of a run's log"):
        support.run.Log(tmp_path / "log.jsonl", 20)
    assert (tmp_path / "log.jsonl").read_text() == f"{line}\n"


def test_checkpoint_is_replaced_whole_and_bound_to_its_configuration(tmp_path):
    config = support.config.load_config(TOY, [])
    path = tmp_path / "checkpoint.pt"
    assert support.run.load_checkpoint(path, config) is None
    for step in (1, 2):
        support.run.save_checkpoint(path, step=step, weight=torch.ones(3), config=support.config.as_dict(config))
    assert support.run.load_checkpoint(path, config)["step"] == 2 and list(tmp_path.iterdir()) == [path]
    moved = support.config.load_config(TOY, ["run.log_every=1", "data.workers=0", "data.root=elsewhere"])
    assert support.run.load_checkpoint(path, moved)["step"] == 2
    with pytest.raises(UserError, match="holds a run with mask.ratio=0.75, not 0.9"):
        support.run.load_checkpoint(path, support.config.load_config(TOY, ["mask.ratio=0.9"]))


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_old_checkpoint(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"  # bytes that a file may have
    path = tmp_path / "checkpoint.pt"
    save = f"import support.run, torch; from pathlib import Path; save = lambda n: support.run.save_checkpoint(Path({str(path)!r}), weight=torch.ones(n))"
    mean = f"{limit}; {save}; support.run.launch(lambda: (save(10), save(100_000)))"
    done = subprocess.run([sys.executable, "-c", mean], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{path} cannot be written (" in done.stderr and "make room, and the same command goes on" in done.stderr
    assert list(tmp_path.iterdir()) == [path] and len(torch.load(path, weights_only=True)["weight"]) == 10


def test_all_processes_end_with_the_sentence_and_torchrun_repeats_it_at_the_end_of_its_report(toy_videos, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # as a run at work there would
        settings = [f"data.root={toy_videos}", "optim.batch_size=8", f"run.folder={tmp_path}"]
        done = run("pretrain.py", *settings, processes=2, ok=False)
    sentence = f"pretrain.py: another run is at work in {tmp_path}: wait for it, stop it, or give this one another run.folder"
    assert done.returncode != 0 and "Error:" not in done.stderr.replace("ChildFailedError:", "")
    assert f"  traceback : {sentence}" in done.stderr.splitlines()[-3:]


@pytest.mark.parametrize("content", [b"", b"no archive", "a list"])
def test_what_is_no_checkpoint_of_a_run_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save([1], path)
    with pytest.raises(support.config.UserError, match="is not a whole checkpoint of a run .*: delete it"):
        support.run.load_checkpoint(path, support.config.load_config(TOY, []))


def test_a_folder_that_is_a_file_ends_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit, match="^stage.py: .*File exists: .*; give another run.folder, or mend this one$"):
        support.run.launch(lambda: support.run.open_folder(support.config.load_config(TOY, [f"run.folder={tmp_path / 'file'}"])))
