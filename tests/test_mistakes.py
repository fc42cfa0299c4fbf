"""Mistakes end in one sentence before any work: what is wrong, where, and how to fix it. One table for all stages."""

from pathlib import Path

import pytest
from conftest import DOWNSTREAM, STAGES, run

WEIGHTS = {"OWN": "pretrain", "FINETUNED": "finetune", "DETECTOR": "detect_ava"}  # in the table: a checkpoint of a run
OTHER = "data.root=TMP/other data.train=. data.val=."  # empty files of two classes, one and two

MISTAKES = [  # stages, settings over those of conftest or, with an option, all words, and what the last line says
    (STAGES, "optim.base_lrr=1", "unknown key 'optim.base_lrr'; the nearest valid key is 'optim.base_lr'"),
    (STAGES, "data.size=36", "36 pixels of height is not a whole number of cubes of 8; choose a multiple of 8"),
    (STAGES, "model.cube=[3,8,8]", "4 frames is not a whole number of cubes of 3"),
    (STAGES, "model.size=XL", "model.size=XL is not known; choose one of tiny, S, B, L, H"),
    (STAGES, "run.log_every=0", "run.log_every=0 has to be at least 1"),
    (STAGES, "optim.epochs=0", "optim.epochs=0 has to be at least 1"),
    (STAGES, "run.precision=fp8", "run.precision=fp8 is not known; choose one of float32, bf16, fp16, auto"),
    (STAGES, "optim.batch_size=1000", "are fewer than one batch of 1000: set optim.batch_size so that it is"),
    (STAGES, "--epochs 3", "there is no option --epochs; keys are given as optim.epochs=3"),
    (STAGES, "data.root=/nowhere", "there is no folder"),
    (DOWNSTREAM, "init=none.pt", "no weights at init=none.pt: make them with pretrain.py"),
    (DOWNSTREAM, "init=configs", "no weights at init=configs: make them with"),
    (DOWNSTREAM, "init=", "no weights at init="),
    (["probe"], "init=scratch", "no weights at init=scratch"),
    (["probe"], "model.batch_norm=true run.batch_per_device=1", "model.batch_norm needs two videos at a time"),
    (["finetune", "probe"], "model.size=S", "does not fit this"),
    (["finetune", "probe"], "data.sampling=tsn", "data.sampling=tsn is not known; choose one of dense, uniform"),
    (["finetune", "probe"], "data.val=train/none.txt", "there is no folder or list file"),
    (["finetune", "probe"], "data.classes=none.txt", "data.classes: no class names can be read from none.txt"),
    (["finetune", "probe"], "data.test_clips=0", "data.test_clips=0 has to be at least 1"),
    (["finetune", "baselines/moco_v3"], "data.crop_area=[1,0.5]", "[1.0, 0.5] has to name the smaller number first"),
    (["pretrain"], "mask.ratio=1.0", "a mask ratio of 1 masks 16 of 16 places"),
    (["pretrain"], "mask.ratio=0.05", "a mask ratio of 0.05 masks 0 of 16 places; some have to be masked"),
    (["pretrain"], "mask.type=tubes", "mask.type=tubes is not known; choose one of tube, random, frame"),
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
    (["pretrain"], "data.val=", "run.validate_every needs videos that are not trained on: name them by data.val"),
    (["pretrain"], "data.val=TMP/other.txt", "no video of data.val exists, not even "),
    (["pretrain"], "data.stride=1 target.frames=double", "data.stride=1 has to be even"),
    (["pretrain"], "target.frames=centre", "target.frames=centre is not known; choose one of input, double, center"),
    (["pretrain"], "target.loss=l2", "target.loss=l2 is not known; choose one of"),
    (["pretrain"], "mask.decoder_ratio=1", "at most 0.9999"),
    (["pretrain"], "mask.decoder_ratio=-0.5", "at least 0"),
    (["pretrain"], "mask.decoder_ratio=0.99", "leaves none of 48 masked cubes"),
    (["pretrain"], "optim.batch_size=16 data.repeats=3", "optim.batch_size=16 is not a multiple of data.repeats=3"),
    (["pretrain"], "init=none.pt", "no weights at none.pt"),
    (["pretrain"], "init=FINETUNED", "FINETUNED has no decoder of VideoMAE: pre-training continues from pre-trained"),
    (["pretrain"], "init=OWN model.cube=[2,8,8]", "(another model.size, model.cube, model.pretrained_clip, model.d"),
    (["pretrain"], "init=OWN model.decoder_depth=2", "decoder.blocks.1.attn.proj.bias is missing"),
    (["pretrain"], f"{OTHER} run.validate_every=0 run.pictures=0", "100 videos in a row could not be read; look at"),
    (["pretrain"], "--reconstruct a.mp4", "--reconstruct needs --weights FILE"),
    (["pretrain"], "--weights x.pt", "--weights goes with --reconstruct"),
    (["pretrain"], "--reconstruct a.mp4 --weights OWN data.size=96", "leave data.frames, data.size and target"),
    (["pretrain"], "--reconstruct a.mp4 --weights OWN target.frames=double", "another target than target.frames=d"),
    (["pretrain"], "--reconstruct a.mp4 --weights FINETUNED", "one of another stage, finetune: pretrain needs one of"),
    (["finetune"], "optim.mixup=0.8 run.batch_per_device=2", "one video at a time has no other to be mixed with"),
    (["finetune"], "--weights FINETUNED", "training starts from init=FILE"),
    (["finetune"], f"--test --weights PRETRAINED {OTHER} data.classes=", "is not a fine-tuned checkpoint"),
    (["finetune"], f"--test --weights FINETUNED {OTHER} data.classes=", "unknown class"),
    (["finetune"], "--test --weights FINETUNED data.sampling=tsn", "data.sampling=tsn is not known"),
    (["finetune"], "--predict none.mp4", "--test and --predict need --weights FILE"),
    (["finetune"], "--predict none.mp4 --weights PRETRAINED", "is not a fine-tuned checkpoint"),
    (["finetune"], "--predict none.mp4 --weights FINETUNED --out a.txt", "are written to a .csv or .json file"),
    (["finetune"], "--predict none.mp4 --weights FINETUNED", "1 of 1 videos cannot be read; see above"),
    (["finetune"], "--compare a.csv b.csv", "a.csv is not a scores.csv as --test writes it"),
    (["detect_ava"], "data.val_exclude=TMP/all.csv", "or boxes/ava_val_predicted_boxes.csv has no person"),
    (["detect_ava"], "data.val=TMP/b.csv data.val_exclude=TMP/a.csv", "b.csv has no row of an action in "),
    (["detect_ava"], "data.labels=TMP/9.pbtxt", "9.pbtxt lists action 9, more than data.actions=8"),
    (["detect_ava"], "--test", "--test needs --weights FILE"),
    (["detect_ava"], "--weights y.pt", "--test needs --weights FILE"),
    (["detect_ava"], "--test --weights DETECTOR --out TMP/a.csv/x", "results cannot be written into TMP/a.csv/x"),
]


@pytest.mark.parametrize("stage, words, sentence", [(s, m, t) for stages, m, t in MISTAKES for s in stages])
def test_mistakes_end_in_one_sentence(stage, words, sentence, settings, finished, pretrained, toy_ava, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "a.mp4").touch()
    rows = (toy_ava / "boxes/ava_val_predicted_boxes.csv").read_text().splitlines()
    (tmp_path / "all.csv").write_text("".join(",".join(row.split(",")[:2]) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("val_00000,0902\n")
    (tmp_path / "b.csv").write_text("val_00000,0902,0.1,0.1,0.5,0.5,1,0\n")
    (tmp_path / "other.txt").write_text("elsewhere/a.mp4\n")
    (tmp_path / "9.pbtxt").write_text('item { name: "sit" id: 9 }')
    places = {name: f"{finished(source)}/checkpoint.pt" for name, source in WEIGHTS.items() if name in words}
    for name, place in (places | {"PRETRAINED": str(pretrained), "TMP": str(tmp_path)}).items():
        words, sentence = words.replace(name, place), sentence.replace(name, place)
    words = words.split()
    if not words[0].startswith("--"):
        words = [*settings[stage], *words, f"run.folder={tmp_path / 'run'}"]
    done = run(f"{stage}.py", *words, ok=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"{Path(stage).name}.py: ")
    assert sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists() and "testing" not in done.stderr
