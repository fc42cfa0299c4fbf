"""The schedule is the paper's, randomness a function of its numbers, batches are split exactly; the folder survives."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command

from support.checkpoint import describe, load_checkpoint, open_folder, open_log, save_checkpoint
from support.config import UserError, as_dict, load_config
from support.processes import find_device, has_fast_bf16, launch
from support.run import Run, warmup_cosine
from support.seeds import random_below, sample_generator, seed_device

TOY = ROOT / "configs" / "pretrain" / "toy.yaml"


def test_schedule_by_hand():
    # SSV2, Table 9: 168,913 videos, batch 1024: 164 steps an epoch; base lr 1.5e-4 scales to 6e-4
    steps, warmup, peak, end = 800 * 164, 40 * 164, 1.5e-4 * 1024 / 256, 1e-5 * 1024 / 256
    assert steps == 131_200 and peak == pytest.approx(6e-4)

    def lr(step):
        return warmup_cosine(step, steps, warmup, peak, end)

    assert lr(0) == 0 and lr(warmup // 2) == pytest.approx(peak / 2) and lr(warmup) == pytest.approx(peak)
    assert lr((steps + warmup) // 2) == pytest.approx((peak + end) / 2)
    assert lr(steps - 1) == pytest.approx(end, rel=1e-4)
    assert all(lr(s) >= lr(s + 1000) for s in range(warmup, steps - 1000, 1000))
    by_hand = end + (peak - end) * (1 + math.cos(math.pi * 1000 / (steps - warmup))) / 2
    assert lr(warmup + 1000) == pytest.approx(by_hand)


def test_randomness_is_a_function_of_its_numbers():
    seen = {}
    for seed in range(3):
        for epoch in (-1, 0, 1, 11):
            for index in (-2, -1, 0, 1, 10, 100):
                value = random_below(2**62, sample_generator(seed, epoch, index))
                assert value == random_below(2**62, sample_generator(seed, epoch, index))
                assert seen.setdefault(value, (seed, epoch, index)) == (seed, epoch, index)
    assert sorted({random_below(3, sample_generator(0, 0, i)) for i in range(50)}) == [0, 1, 2]


def test_what_is_drawn_on_the_device_depends_on_seed_micro_batch_and_rank():
    drawn = set()
    for seed, micro_step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        for _ in range(2):
            seed_device(seed, micro_step, rank)
            drawn.add(float(torch.rand(())))
    assert len(drawn) == 4


def test_each_micro_batch_of_a_run_draws_other_numbers_on_the_device(tmp_path):
    settings = ["optim.batch_size=4", "optim.epochs=3", "run.batch_per_device=2", f"run.folder={tmp_path}"]
    run = Run(load_config(TOY, settings), TOY)
    run.plan(["a", "b", "c", "d", "e", "f", "g", "h"], 4)
    run.open({})
    batches = iter([(torch.zeros(2), [])] * 12)
    seeds = [torch.initial_seed() for _ in run.steps() for _ in run.micro_batches(batches)]
    assert len(seeds) == 3 * 2 * 2 == len(set(seeds))


@pytest.mark.parametrize(
    "batch, world_size, at_most, repeats, micro_batch",
    [
        (1024, 64, 64, 1, 16),
        (1024, 8, 64, 1, 64),
        (512, 8, 16, 2, 8),
        (192, 8, 24, 1, 24),
        (12, 1, 5, 1, 4),
        (7, 1, 3, 1, 1),
    ],
)
def test_batches_are_split_exactly(batch, world_size, at_most, repeats, micro_batch):
    settings = [
        f"optim.batch_size={batch}",
        f"run.batch_per_device={at_most}",
        "optim.epochs=5",
        "optim.warmup_epochs=2",
    ]
    run = Run(load_config(TOY, settings), TOY)
    run.world_size = world_size
    run.plan(range(10 * batch + 3), batch, repeats)
    assert (run.per_device, run.per_device * run.accumulation * world_size) == (micro_batch, batch)
    assert run.per_device * repeats <= max(at_most, repeats) and run.samples_per_step == batch * repeats
    assert (run.steps_per_epoch, run.total, run.warmup) == (10, 50, 20)


def test_a_batch_that_splits_badly_is_said(capsys):
    run = Run(load_config(TOY, ["optim.batch_size=254", "run.batch_per_device=64"]), TOY)
    run.world_size = 2
    run.plan(range(1000), 254)
    assert run.per_device == 1 and "can only be split into micro-batches of 1, though 64 fit" in capsys.readouterr().err
    run.world_size = 1
    run.plan(range(1000), 254)
    assert run.per_device == 2
    assert "micro-batches of 2" in capsys.readouterr().err
    Run(load_config(TOY, ["optim.batch_size=256", "run.batch_per_device=64"]), TOY).plan(range(1000), 256)
    assert not capsys.readouterr().err


def test_batches_that_cannot_be_split_end_in_a_sentence():
    run = Run(load_config(TOY, ["optim.batch_size=10"]), TOY)
    with pytest.raises(UserError, match="9 videos are fewer than one batch: set optim.batch_size to 9 or less"):
        run.plan(range(9), 10)
    run.world_size = 3
    with pytest.raises(UserError, match="optim.batch_size=10, 10 videos, cannot be split equally over 3 processes"):
        run.plan(range(100), 10)


def test_log_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)) + '{"step": 4')
    open_log(path, 20).write('{"step": 30}\n')
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize("line", ["no json", "[]", '{"loss": 1}'])
def test_a_foreign_log_ends_in_a_sentence(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="holds a line that is not a log entry"):
        open_log(tmp_path / "log.jsonl", 20)
    assert (tmp_path / "log.jsonl").read_text() == f"{line}\n"


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    settings = [
        f"run.folder={tmp_path}",
        "optim.batch_size=2",
        "optim.epochs=4",
        "optim.warmup_epochs=0",
        "run.log_every=1",
    ]
    run = Run(load_config(TOY, settings), TOY)
    run.plan(range(2), 2)
    run.open({})
    with pytest.raises(UserError, match="the loss is nan at step 2; a lower optim.base_lr may help"):
        for step in run.steps():
            run.add_loss(torch.tensor(1.0 if step == 0 else math.nan))
            run.end_step()
    assert [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1.0]


def test_a_checkpoint_is_replaced_whole_and_bound_to_its_configuration(tmp_path):
    config = load_config(TOY, [])
    assert load_checkpoint(tmp_path, config, TOY) is None
    for step in (1, 2):
        content = dict(step=step, weight=torch.ones(3), config=as_dict(config))
        save_checkpoint(tmp_path / "checkpoint.pt", content)
    assert load_checkpoint(tmp_path, config, TOY)["step"] == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pt"]
    tested = ROOT / "configs" / "finetune" / "toy.yaml"
    (tmp_path / "finetune").mkdir()
    content = dict(step=2, config=as_dict(load_config(tested, [])))
    save_checkpoint(tmp_path / "finetune" / "checkpoint.pt", content)
    views = load_config(tested, ["data.test_clips=7", "data.test_crops=3"])
    assert load_checkpoint(tmp_path / "finetune", views, tested)["step"] == 2
    moved = load_config(TOY, ["run.log_every=1", "data.workers=0", "data.root=elsewhere"])
    assert load_checkpoint(tmp_path, moved, TOY)["step"] == 2
    for setting, sentence in (("mask.ratio=0.9", "mask.ratio=0.75, not 0.9"), ("run.seed=1", "run.seed=0, not 1")):
        with pytest.raises(UserError, match=f"holds a run with {sentence}"):
            load_checkpoint(tmp_path, load_config(TOY, [setting]), TOY)


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    code = f"""
import resource, torch
from pathlib import Path
from support.checkpoint import save_checkpoint
from support.processes import launch
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes that a file may have
save = lambda n: save_checkpoint(Path({str(path)!r}), dict(weight=torch.ones(n)))
launch(lambda: (save(10), save(100_000)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{path} cannot be written (" in done.stderr and "make room, then the same command resumes" in done.stderr
    assert list(tmp_path.iterdir()) == [path] and len(torch.load(path, weights_only=True)["weight"]) == 10


@pytest.mark.parametrize("content", [b"", b"no archive", [1], {"step": 1}, {"config": {"run": 3}}])
def test_what_is_no_checkpoint_of_a_run_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match="is not a whole checkpoint of a run .*: delete it"):
        load_checkpoint(tmp_path, load_config(TOY, []), TOY)


def test_a_folder_that_is_a_file_ends_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["stage.py"])
    with pytest.raises(SystemExit, match="^stage.py: .*File exists: .*; set another run.folder, or fix this one$"):
        launch(lambda: open_folder(tmp_path / "file", load_config(TOY, [])))


def test_every_module_imports_where_a_system_lacks_fcntl_and_resource():
    files = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("support/[a-z]*.py"))]
    names = [".".join(path.with_suffix("").parts) for path in files]
    blocked = "import importlib, sys; sys.modules |= dict.fromkeys(['fcntl', 'resource'])"  # None: ImportError
    code = f"import torch, filelock, av; {blocked}; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert len(names) > 15 and done.returncode == 0, done.stderr


def test_a_system_without_resource_logs_no_memory(monkeypatch):
    from support.run import peak_memory

    assert 0.05 < peak_memory(torch.device("cpu")) < 100
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


def test_a_sentence_from_a_loader_worker_is_the_last_line_of_its_report(monkeypatch):
    monkeypatch.setattr("sys.argv", ["stage.py"])

    def main() -> None:
        raise UserError(
            "Caught UserError in DataLoader worker process 0.\nTraceback\nsupport.config.UserError: do this\n"
        )

    with pytest.raises(SystemExit, match="^stage.py: do this$"):
        launch(main)


def test_precision_and_compilation_follow_the_device():
    for setting, wanted in (("auto", False), ("bf16", True), ("float32", False)):
        run = Run(load_config(TOY, [f"run.precision={setting}"]), TOY)
        if not torch.cuda.is_available():
            assert run.bf16 == wanted and run.compile(print) is print
        with run.autocast():
            product = torch.ones(2, 2, device=run.device) @ torch.ones(2, 2, device=run.device)
        assert (product.dtype == torch.bfloat16) == run.bf16


def test_a_line_of_the_log_holds_whatever_a_stage_measures_also_on_the_device(tmp_path):
    words = [f"run.folder={tmp_path}", "optim.batch_size=2", "optim.epochs=1", "optim.warmup_epochs=0"]
    run, model = Run(load_config(TOY, [*words, "run.log_every=1"]), TOY), torch.nn.Linear(1, 1)
    run.plan(range(2), 2)
    run.open(dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))
    for _ in run.steps():
        run.add_loss(torch.tensor(0.5))
        run.end_step(lr=0.1, grad_norm=torch.tensor(2.0, requires_grad=True))
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (line["loss"], line["lr"], line["grad_norm"]) == (0.5, 0.1, 2.0)


@pytest.mark.parametrize("kind, count, rank", [("cuda", 2, 1), ("mps", 1, 0), ("xpu", 2, 0)])
def test_a_process_takes_the_accelerator_of_its_rank(kind, count, rank, monkeypatch):
    """On this machine there may be none: torch.accelerator's answers are those of other machines."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert find_device() == torch.device(kind, rank) and (kind == "cuda" or has_fast_bf16(find_device()))
    monkeypatch.setenv("LOCAL_RANK", str(count))
    with pytest.raises(UserError, match=f"there are {count} GPUs: give torchrun a smaller --nproc_per_node"):
        find_device()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert find_device() == torch.device("cpu") and not has_fast_bf16(find_device())


def test_training_videos_are_described_by_names_labels_and_order(tmp_path):
    a, b = Path("old/a.avi"), Path("old/b.avi")
    assert describe([a, b]) == describe([Path("new/a.mp4"), Path("new/b.mp4")])  # moved, or prepared
    assert describe([(a, 1)]) == describe([(Path("new/a.mp4"), 1)])
    others = [[b, a], [a], [a, a], [(a, 0)], [(a, 1)], [(("a", 902), "rows")], [(("a", 903), "rows")]]
    assert len({describe(videos)["digest"] for videos in [[a, b], *others]}) == 8
    assert describe([Path(os.fsdecode(b"\xff.mp4"))])["count"] == 1


def test_an_oserror_that_is_not_about_a_path_is_shown_whole(monkeypatch, capsys):
    def main():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    with pytest.raises(SystemExit, match=r"pretrain.py: \[Errno 5\] Input/output error$"):
        launch(main)
    assert "Traceback" in capsys.readouterr().err


SMALL_SHM = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
FEW_FILES = ["sh", "-c", 'ulimit -n 28 && exec "$@"', "sh"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set as on Linux")
@pytest.mark.parametrize("limited", [FEW_FILES, SMALL_SHM], ids=["files", "memory"])
def test_a_loader_without_shared_memory_or_open_files_ends_in_a_sentence(limited, settings, tmp_path):
    if subprocess.run([*limited, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount")
    words = command("pretrain.py", *settings["pretrain"], "data.workers=4", f"run.folder={tmp_path / 'run'}")
    done = subprocess.run([*limited, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "workers lack shared memory or open files" in last and "ulimit -n" in last, last
