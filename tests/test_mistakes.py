"""Mistakes end in one sentence before any work: what is wrong, where, and how to fix it. One table for all stages."""

from pathlib import Path

import pytest
from conftest import DOWNSTREAM, STAGES, run

MISTAKES = [
    (STAGES, "optim.base_lrr=1", "unknown key 'optim.base_lrr'; the nearest valid key is 'optim.base_lr'"),
    (STAGES, "data.frames=sixteen", "data.frames expects int such as"),
    (STAGES, "data.size=36", "36 pixels of height is not a whole number of cubes of 8; choose a multiple of 8"),
    (STAGES, "model.cube=[3,8,8]", "4 frames is not a whole number of cubes of 3"),
    (STAGES, "model.size=XL", "model.size=XL is not known; choose one of tiny, S, B, L, H"),
    (STAGES, "model.cube=[2,8]", "model.cube expects list such as [2, 16, 16]"),
    (STAGES, "run.log_every=0", "run.log_every=0 has to be at least 1"),
    (STAGES, "optim.epochs=0", "optim.epochs=0 has to be at least 1"),
    (STAGES, "run.precision=fp8", "run.precision=fp8 is not known; choose one of float32, bf16, fp16, auto"),
    (STAGES, "optim.batch_size=1000", "are fewer than one batch of 1000: set optim.batch_size so that it is"),
    (STAGES, "data.root=/nowhere", "there is no folder"),
    (DOWNSTREAM, "init=none.pt", "no weights at init=none.pt: make them with pretrain.py"),
    (DOWNSTREAM, "init=configs", "no weights at init=configs: make them with"),
    (DOWNSTREAM, "init=", "no weights at init="),
    (["probe"], "init=scratch", "no weights at init=scratch"),
    (["finetune", "probe"], "model.size=S", "does not fit this"),
    (["finetune", "probe"], "data.sampling=tsn", "data.sampling=tsn is not known; choose one of dense, uniform"),
    (["finetune", "probe"], "data.val=train/none.txt", "there is no folder or list file"),
    (["finetune", "probe"], "data.classes=none.txt", "data.classes: no class names can be read from none.txt"),
    (["finetune", "probe"], "data.test_clips=0", "data.test_clips=0 has to be at least 1"),
    (["finetune"], "data.repeats=0", "data.repeats=0 has to be at least 1"),
    (["finetune", "baselines/moco_v3"], "data.crop_area=[1, 0.5]", "[1.0, 0.5] has to name the smaller number first"),
    (["pretrain"], "mask.ratio=1.0", "a mask ratio of 1 masks 16 of 16 places"),
    (["pretrain"], "mask.ratio=0.05", "a mask ratio of 0.05 masks 0 of 16 places"),
    (["pretrain"], "mask.type=tubes", "mask.type=tubes is not known; choose one of tube, random, frame"),
    (["pretrain"], "data.root=tests", "there is no folder or list file"),
    (["baselines/moco_v3"], "run.batch_per_device=8", "set run.batch_per_device=16 (with run.recompute=true"),
    (["baselines/moco_v3"], "optim.batch_size=1", "optim.batch_size=1 leaves a clip without negatives"),
    (["baselines/moco_v3"], "moco.temperature=0", "moco.temperature=0.0 has to be at least 0.001"),
    (["baselines/moco_v3"], "moco.momentum=2", "moco.momentum=2.0 has to be at least 0 and at most 1"),
    (["detect_ava"], "data.size=40", "data.size=40 cannot be cropped from data.short_side=36"),
    (["detect_ava"], "data.rate=0", "data.rate=0.0 has to be at least 0.01"),
    (["detect_ava"], "data.actions=7", "unknown action 8, known are 1 to 7"),
    (["detect_ava"], "data.movies=nowhere", "there is no folder"),
    (["detect_ava"], "data.boxes=nowhere.csv", "no rows can be read from"),
    (["detect_ava"], "data.threshold=1.1", "has a score of 1.1 or more"),
]


@pytest.mark.parametrize("stage, setting, sentence", [(s, m, t) for stages, m, t in MISTAKES for s in stages])
def test_mistakes_end_in_one_sentence_before_any_work(stage, setting, sentence, settings, tmp_path):
    folder = tmp_path / "run"
    done = run(f"{stage}.py", *settings[stage], "data.workers=0", setting, f"run.folder={folder}", ok=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"{Path(stage).name}.py: ")
    assert sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not folder.exists()
