"""What lets a recipe run on other machines changes nothing but memory and time; the trace; no step waits for the GPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import scale
import torch
from conftest import ROOT, run
from torch import Tensor

import detect_ava
import finetune
import masking
import model as m
import pretrain
import support.config
import support.run
from support import toy
from support.config import load_config

STAGES = {"pretrain": pretrain, "finetune": finetune, "detect_ava": detect_ava}


# ---- recomputed blocks ----


def gradients(model: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The loss and all gradients of one step whose drop path and dropout start from the same seed."""
    torch.manual_seed(1)
    loss = model(*inputs).square().mean()
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_give_the_same_gradients_from_less_memory(bf16):
    torch.manual_seed(0)
    encoder = {name: m.SIZES["tiny"][name] for name in ("width", "depth", "heads")}
    classifier = m.VideoClassifier(**encoder, classes=5, clip_size=(4, 32, 32), drop_path=0.5, dropout=0.5)
    classifier.head.weight.data.mul_(1000)
    videomae = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=2, clip_size=(4, 32, 32))
    clip = torch.randn(8, 3, 4, 32, 32)
    visible, masked = (x.expand(8, -1) for x in masking.split(masking.tube_mask(videomae.grid, 0.5, torch.Generator().manual_seed(0))))
    for model, inputs in ((classifier, [clip]), (videomae, [clip, visible, masked])):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            kept, memory = gradients(model, *inputs), scale.kept_for_backward(model, *inputs)
            m.recompute_blocks(model)
            assert all(map(torch.equal, gradients(model, *inputs), kept))
            assert scale.kept_for_backward(model, *inputs) < memory / 3


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def short_runs(toy_videos, tmp_path_factory) -> dict[str, list[str]]:
    """For each stage the settings of a few steps on its own toy videos, in batches of eight, four at a time."""
    ava = toy.render_ava(tmp_path_factory.mktemp("ava") / "videos", {"train": 12, "val": 2})
    same = ["optim.batch_size=8", "run.batch_per_device=4", "optim.warmup_epochs=0", "data.workers=0", "run.log_every=1"]
    labelled = [*same, "init=scratch", "model.drop_path=0.5", "run.validate_every=0"]
    return {
        "pretrain": [*same, f"data.root={toy_videos}", "data.train=train", "optim.epochs=3", "run.pictures=0"],
        "finetune": [*labelled, f"data.root={toy_videos}", "data.train=train", "data.val=val", "optim.epochs=3", "optim.mixup=0.8", "optim.cutmix=1"],
        "detect_ava": [*labelled, f"data.root={ava}", "optim.epochs=2", "run.pictures=0"],
    }


@pytest.mark.parametrize("stage", STAGES)
def test_runs_with_recomputed_blocks_are_the_same_runs(stage, short_runs, tmp_path):
    """Accumulating, with drop path where a stage has it, in fine-tuning by two processes."""
    settings, processes = [*short_runs[stage], "run.batch_per_device=2"], 2 if stage == "finetune" else 0
    for name, recompute in (("kept", "false"), ("recomputed", "true")):
        done = run(ROOT / f"{stage}.py", *settings, f"run.recompute={recompute}", f"run.folder={tmp_path / name}", processes=processes)
        assert ("batch 8 = 2 processes x 2 accumulated x 2" if processes else "batch 8 = 1 processes x 4 accumulated x 2") in done.stderr
    kept, recomputed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("kept", "recomputed"))
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed") and len(losses(tmp_path / "kept")) > 2
    assert all(torch.equal(kept[key], recomputed[key]) for key in kept)


# ---- the trace ----


def test_a_trace_names_the_work_of_three_steps_and_changes_nothing(short_runs, tmp_path):
    for name, profile in (("plain", "false"), ("traced", "true")):
        run(ROOT / "pretrain.py", *short_runs["pretrain"], f"run.profile={profile}", f"run.folder={tmp_path / name}")
    trace = json.loads((tmp_path / "traced/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    assert "aten::addmm" in names and "aten::scaled_dot_product_attention" in names and "aten::_fused_adamw_" in names
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain") and not (tmp_path / "plain/trace.json").exists()


def test_a_checkpoint_older_than_a_key_of_run_can_still_be_used():
    stored = support.config.as_dict(load_config(pretrain.DEFAULT, []))
    del stored["run"]["recompute"], stored["run"]["profile"]
    config = load_config(pretrain.DEFAULT, [], stored)
    assert (config.run.recompute, config.run.profile) == (False, False)


# ---- the host and the GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only where there is a GPU can the loop wait for it")
@pytest.mark.parametrize("stage, compiled", [*((stage, "never") for stage in STAGES), ("pretrain", "always"), ("finetune", "always")])
def test_no_step_waits_for_the_gpu(stage, compiled, short_runs, tmp_path, monkeypatch):
    """PyTorch raises at any call that waits, from the third step on; the last step, which saves a checkpoint, may wait.

    Not the compiled detector, which is compiled again for another number of persons.
    """
    steps_of = support.run.Progress.__iter__

    def strict(self: support.run.Progress) -> Iterator[int]:
        for step in steps_of(self):
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < self.bar.total - 1 else "default")
            yield step

    monkeypatch.setattr(support.run.Progress, "__iter__", strict)
    monkeypatch.delenv("RANK", raising=False)
    config = load_config(STAGES[stage].DEFAULT, [*short_runs[stage], f"run.compile={compiled}", "run.log_every=2", f"run.folder={tmp_path}"])
    try:
        STAGES[stage].train(config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses(tmp_path)) > 1
