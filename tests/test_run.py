"""What the loops rest on: schedule, random numbers, split of a batch, checkpoints, the log, how a command ends."""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, STAGES, command, run, run_processes

import finetune
import support.run
from support.checkpoint import describe, load_checkpoint, write_checkpoint
from support.config import UserError, as_dict, flatten, load_config, parse
from support.processes import Processes, compiler, fast_dtype, find_device, launch, start_processes
from support.run import check_writable, finetune_command, lock_folder, open_log, peak_memory, split_batch, warmup_cosine
from support.seeds import random_below, sample_generator, seed_device

TOY = ROOT / "configs" / "pretrain" / "toy.yaml"
SSV2 = str(TOY.with_name("ssv2_base.yaml"))
ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
VIDEOS = dict(count=2, digest="that of the test")


def test_schedule_by_hand():
    # SSV2, Table 9: 168,913 videos, batch 1024: 164 steps an epoch; base lr 1.5e-4 scales to 6e-4
    steps, warmup, peak, end = 800 * 164, 40 * 164, 1.5e-4 * 1024 / 256, 1e-5 * 1024 / 256
    assert steps == 131_200 and peak == pytest.approx(6e-4)

    def lr(step):
        return warmup_cosine(step, steps, warmup, peak, end)

    assert lr(0) == 0 and lr(warmup // 2) == pytest.approx(peak / 2) and lr(warmup) == pytest.approx(peak)
    assert lr((steps + warmup) // 2) == pytest.approx((peak + end) / 2)
    assert lr(steps - 1) == pytest.approx(end, rel=1e-4)
    by_hand = end + (peak - end) * (1 + math.cos(math.pi * 1000 / (steps - warmup))) / 2
    assert lr(warmup + 1000) == pytest.approx(by_hand)


def test_random_numbers_are_a_function_of_what_they_are_for():
    seen = {}
    for seed in range(3):
        for epoch in (-1, 0, 1, 11):
            for index in (-2, -1, 0, 1, 10, 100):
                value = random_below(2**62, sample_generator(seed, epoch, index))
                assert value == random_below(2**62, sample_generator(seed, epoch, index))
                assert seen.setdefault(value, (seed, epoch, index)) == (seed, epoch, index)
    assert sorted({random_below(3, sample_generator(0, 0, i)) for i in range(50)}) == [0, 1, 2]
    sampled = set()
    for seed, micro_step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        for _ in range(2):
            seed_device(seed, micro_step, rank)
            sampled.add(float(torch.rand(())))
    assert len(sampled) == 4


def test_the_next_command_has_the_recipe_and_sizes_of_the_run(monkeypatch):
    size = ["model.size=S", "data.root=my videos", "run.folder=runs/x"]
    commands = {
        "python finetune.py init=a/w.pt": [],
        "python finetune.py configs/finetune/ssv2_base.yaml data.root=d init=a/w.pt": [SSV2, "data.root=d"],
        "python finetune.py configs/finetune/ssv2_base.yaml data.root=d init=a/w.pt model.size=S": [
            *(SSV2, "data.root=d", "run.folder=runs/ssv2_base_narrow", "model.size=S")
        ],
        "python finetune.py configs/finetune/own.yaml 'data.root=my videos' init=a/w.pt model.size=S data.stride=2 "
        "data.train=labels/train.json data.val=labels/validation.json": [SSV2, *size],
    }
    for following, settings in commands.items():
        assert finetune_command(load_config(TOY, settings), Path("a/w.pt")) == following
    monkeypatch.setenv("RANK", "0")
    assert finetune_command(load_config(TOY, []), "w.pt") == "torchrun finetune.py init=w.pt"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert finetune_command(load_config(TOY, []), "w.pt") == "torchrun --nproc_per_node=8 finetune.py init=w.pt"


@pytest.mark.parametrize("folder", ["", "runs/other"])
@pytest.mark.parametrize("stage", ["pretrain", "baselines", "probe"])
def test_the_next_command_fine_tunes_on_clips_and_videos_of_the_run(stage, folder):
    defaults = ROOT / "configs" / stage / "defaults.yaml"
    for recipe in set(defaults.parent.glob("*.yaml")) - {defaults}:
        config = load_config(defaults, [str(recipe), "data.train=list.txt", "data.frames=32", f"run.folder={folder}"])
        _, _, *words = shlex.split(finetune_command(config, "w.pt"))
        following = load_config(ROOT / "configs/finetune/toy.yaml", words)
        before, after = flatten(as_dict(config)), flatten(as_dict(following))
        same = ["model.size", "model.cube", "data.frames", "data.size", "data.root", "data.train"]
        same += [key for key in ("data.val", "data.sampling") if key in before]
        if following.data.sampling == "dense":
            same.append("data.stride")
        assert {key: after[key] for key in same} == {key: before[key] for key in same} and following.init == "w.pt"


SPLITS = [(1024, 64, 64, 16, False), (1024, 8, 64, 64, False), (192, 8, 24, 24, False), (12, 1, 5, 4, False)]
SPLITS += [(7, 1, 0, 1, False), (7, 1, 3, 1, True), (254, 2, 64, 1, True), (254, 1, 64, 2, True)]


@pytest.mark.parametrize("batch, world_size, at_most, micro_batch, note", SPLITS)
def test_a_batch_is_split_exactly(batch, world_size, at_most, micro_batch, note, capsys):
    per_device, accumulation = split_batch(10 * batch, batch, world_size, at_most)
    assert per_device == micro_batch and per_device * accumulation * world_size == batch
    printed = capsys.readouterr().err
    assert f"batch of {batch} videos = {world_size} processes x {accumulation} accumulated x {micro_batch}" in printed
    assert ("can only be split into micro-batches" in printed) == note


def test_a_batch_that_cannot_be_split_names_one_that_can():
    with pytest.raises(UserError, match="9 videos are fewer than one batch of 10: set optim.batch_size .* it is 9"):
        split_batch(9, 10, 1, 8)
    with pytest.raises(UserError, match="10 videos cannot be split equally over 3 processes: .* so that it is 9,"):
        split_batch(100, 10, 3, 8)


def test_the_log_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)) + '{"step": 4')
    open_log(path, 20).write('{"step": 30}\n')
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    for line in ("no json", "[]", '{"loss": 1}'):
        path.write_text(f"{line}\n")
        with pytest.raises(UserError, match="holds a line that is not a log entry"):
            open_log(path, 20)
        assert path.read_text() == f"{line}\n"


def test_lines_have_the_speed_of_training_alone_and_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    """10 steps of 8 clips in 2 seconds, half a second of them waiting for data, and 5 seconds of saving."""
    now = [0.0]
    monkeypatch.setattr("support.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = support.run.Log(load_config(TOY, [f"run.folder={tmp_path}"]), ALONE, 0, 20, epoch=81, clips_per_step=8)
    now[0] = 2.0
    with log.clock_stopped():
        now[0] = 7.0
    log.write_step(10, 0.5, waited=0.5, lr=0.1, grad_norm=2.0)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line.pop("memory_gb") > 0
    speed = {"clips_per_second": 40.0, "waiting_for_data": 0.25}
    assert line == {"loss": 0.5, "step": 10, "epoch": 0.1235, "lr": 0.1, "grad_norm": 2.0} | speed
    with pytest.raises(UserError, match="the loss is nan at step 20; a lower optim.base_lr may help"):
        log.write_step(20, math.nan, waited=0.05)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_the_bar_says_that_the_model_is_compiled_until_the_first_step_is_done(tmp_path, capsys):
    for setting, start in (("always", 0), ("never", 0), ("always", 2)):  # the last has nothing left to do
        config = load_config(TOY, [f"run.folder={tmp_path}", f"run.compile={setting}"])
        log = support.run.Log(config, ALONE, start, 2, epoch=81, clips_per_step=8)
        before = capsys.readouterr().err
        assert ("compiling the model" in before) == ((setting, start) == ("always", 0))
        assert list(log.progress(range(start, 2))) == list(range(start, 2))
        assert "compiling" not in capsys.readouterr().err


def test_a_system_without_resource_logs_no_memory(monkeypatch):
    assert 0.05 < peak_memory(torch.device("cpu")) < 100
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


def test_a_run_resumes_with_other_places_learning_rates_and_test_views(tmp_path):
    changes = {
        "pretrain": ["run.log_every=1", "data.workers=0", "data.root=elsewhere", "optim.base_lr=1e-3"],
        "finetune": ["data.test_clips=7", "data.test_crops=3"],
    }
    for stage, settings in changes.items():
        default = ROOT / "configs" / stage / "toy.yaml"
        content = dict(step=3, config=as_dict(load_config(default, [])), videos=VIDEOS)
        write_checkpoint(tmp_path / "checkpoint.pt", content)
        config = load_config(default, [f"run.folder={tmp_path}", *settings])
        assert load_checkpoint(config, default, videos=VIDEOS)["step"] == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pt"]


NO_CHECKPOINTS = [b"", b"no archive", [1], {"step": 1}, {"config": {"run": 3}}]
NO_CHECKPOINTS += [{"step": 1, "config": {}, "code": Path("x")}]  # an object, which could run code when it is read


@pytest.mark.parametrize("content", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match="is not a whole checkpoint of a run .*: delete it"):
        load_checkpoint(load_config(TOY, [f"run.folder={tmp_path}"]), TOY, videos=VIDEOS)


def write_more_than_fits(path: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes that a file may have
    for count in (10, 100_000):
        write_checkpoint(path, dict(weight=torch.ones(count)))


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    done = run_processes(partial(write_more_than_fits, path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{path} cannot be written (" in done.stderr and "make room, then the same command resumes" in done.stderr
    assert list(tmp_path.iterdir()) == [path] and len(torch.load(path, weights_only=True)["weight"]) == 10


def test_training_videos_are_described_by_names_labels_and_order():
    a, b = Path("old/a.avi"), Path("old/b.avi")
    assert describe([a, b]) == describe([Path("new/a.mp4"), Path("new/b.mp4")])  # moved, or prepared
    assert describe([(a, 1)]) == describe([(Path("new/a.mp4"), 1)])
    others = [[b, a], [a], [a, a], [(a, 0)], [(a, 1)], [(("a", 902), "rows")], [(("a", 903), "rows")]]
    assert len({describe(videos)["digest"] for videos in [[a, b], *others]}) == 8
    assert describe([Path(os.fsdecode(b"\xff.mp4"))])["count"] == 1


def test_other_videos_with_the_same_names_are_refused_and_prepared_copies_are_not(tmp_path):
    folders = {name: tmp_path / name for name in ("first", "moved", "other", "prepared")}
    for folder, size in zip(folders.values(), (5, 5, 6, 7), strict=True):
        folder.mkdir()
        (folder / "a.mp4").write_bytes(b"x" * size)
    (folders["prepared"] / "prepared.json").touch()
    videos = {name: describe([folder / "a.mp4"]) for name, folder in folders.items()}

    def load(name: str, *settings: str) -> dict | None:
        config = load_config(TOY, [f"run.folder={tmp_path}", *settings])
        return load_checkpoint(config, TOY, videos=videos[name])

    for began in (videos["first"], dict(count=1, digest=videos["first"]["digest"])):  # before sizes were stored
        content = dict(step=240, config=as_dict(load_config(TOY, [])), videos=began)
        write_checkpoint(tmp_path / "checkpoint.pt", content)
        assert load("moved")["step"] == load("prepared")["step"] == 240
    assert load("other")["step"] == 240
    write_checkpoint(tmp_path / "checkpoint.pt", content | dict(videos=videos["first"]))
    with pytest.raises(UserError, match="a run, 240 steps of it done, of other videos with the same names: the sizes"):
        load("other")
    assert load("other", "run.other_videos=true")["step"] == 240


def test_precision_and_compilation_follow_the_device():
    dtypes = dict(auto=torch.float32, float32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
    for setting, dtype in dtypes.items():
        processes = start_processes(setting)
        if not torch.cuda.is_available():
            assert processes == Processes(0, 1, torch.device("cpu"), dtype)
            assert compiler("auto", processes.device)(print) is print
        with processes.autocast():
            product = torch.ones(2, 2, device=processes.device) @ torch.ones(2, 2, device=processes.device)
        assert product.dtype == processes.dtype


@pytest.mark.parametrize("kind, count, rank", [("cuda", 2, 1), ("mps", 1, 0), ("xpu", 2, 0)])
def test_a_process_takes_the_accelerator_of_its_rank(kind, count, rank, monkeypatch):
    """On this machine there may be none: torch.accelerator's answers are those of other machines."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    for native in (True, False):  # Ampere, Turing
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert fast_dtype(find_device()) == (torch.bfloat16 if native or kind != "cuda" else torch.float16)
    assert find_device() == torch.device(kind, rank)
    monkeypatch.setenv("LOCAL_RANK", str(count))
    with pytest.raises(UserError, match=f"there are {count} GPUs: give torchrun a smaller --nproc_per_node"):
        find_device()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert find_device() == torch.device("cpu") and fast_dtype(find_device()) == torch.float32


def test_every_module_imports_where_a_system_lacks_fcntl_and_resource_and_only_charts_need_matplotlib():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/[a-z]*.py"), *ROOT.glob("tools/[a-z]*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    lacks = ["fcntl", "resource", "matplotlib"]  # None instead of a module: ImportError
    blocked = f"import importlib, sys; sys.modules |= dict.fromkeys({lacks})"
    code = f"import torch, filelock, av; {blocked}; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert len(names) > 20 and done.returncode == 0, done.stderr


WORKER = "Caught UserError in DataLoader worker process 0.\nTraceback\nsupport.config.UserError: do this\n"
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
ENDINGS = [
    (UserError(WORKER), "do this$"),
    (FileExistsError(17, "File exists", "folder"), ".*File exists: 'folder'; give another path, or fix this one$"),
    (OSError(5, "Input/output error"), r"\[Errno 5\] Input/output error$"),
    (KeyboardInterrupt(), "interrupted: the same command resumes"),
    (RuntimeError(KILLED), "a loader worker was killed, perhaps for lack of memory: set data.workers lower"),
    (RuntimeError("unable to open shared memory object"), "the loader's workers lack shared memory or open files"),
]


@pytest.mark.parametrize("error, sentence", ENDINGS)
def test_what_a_user_can_fix_ends_in_a_sentence(error, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit, match=f"^stage.py: {sentence}"):
        launch(Mock(side_effect=error))
    assert ("Traceback" in capsys.readouterr().err) == (isinstance(error, OSError) and not error.filename)
    for other in (RuntimeError("shapes do not match"), KeyError("x")):  # their traceback is kept
        with pytest.raises(type(other)):
            launch(Mock(side_effect=other))


def test_a_folder_that_cannot_be_used_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="File exists: .*; set another run.folder, or fix this one$"):
        lock_folder(tmp_path / "file")
    with pytest.raises(UserError, match="results cannot be written into .*: name another folder with --out"):
        check_writable(tmp_path / "file")


SMALL_SHM = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
FEW_FILES = ["sh", "-c", 'ulimit -n 28 && exec "$@"', "sh"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set as on Linux")
@pytest.mark.parametrize("stage, limited", [("baselines/moco_v3", FEW_FILES), ("detect_ava", SMALL_SHM)])
def test_a_loader_without_shared_memory_or_open_files_ends_in_a_sentence(stage, limited, settings, tmp_path):
    if subprocess.run([*limited, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount")
    words = command(f"{stage}.py", *settings[stage], "data.workers=4", f"run.folder={tmp_path / 'run'}")
    done = subprocess.run([*limited, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "workers lack shared memory or open files" in last and "ulimit -n" in last, last


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_the_file_of_all_keys(stage):
    assert "defaults.yaml lists all keys" in run(f"{stage}.py", "--help").stdout.replace("\n", " ")


def test_micro_batches_have_their_own_random_numbers_on_the_device(settings, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(finetune, "seed_device", lambda *numbers: seeds.append(numbers))
    words = [*settings["finetune"], "run.batch_per_device=4", f"run.folder={tmp_path}"]  # two videos, two clips of each
    finetune.train(load_config(finetune.DEFAULT, words))
    assert seeds == [(0, micro_step, 0) for micro_step in range(9 * 4)]


def test_only_settings_are_taken_from_the_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=1.mp4").touch()
    monkeypatch.setattr("sys.argv", ["stage.py", "--predict", "x=1.mp4", "y=2.mp4", "run.seed=1"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--predict", nargs="+")
    arguments = parse(parser)
    assert arguments.predict == ["x=1.mp4"] and arguments.settings == ["y=2.mp4", "run.seed=1"]
