"""Every file in configs/ against the paper: Tables 1 to 13 and Sec. B, number by number; MoCo v3 against its own.

The tables below are written as the paper has them. A value that depends on a column of its table is a dict; a recipe
names its columns. Where this project does otherwise, DEVIATIONS says so; OTHERS has what the paper does not say. Keys
that none of them names are free: a new one is a line in defaults.yaml.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from support.config import as_dict, flatten, load_config, read_yaml
from support.run import count_steps

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("pretrain", "finetune", "probe", "detect", "baselines")

# ---- the paper ----

MODEL = {  # Table 8, Sec. 3.3, Sec. 4.2; the target is Tables 6, 7 ("reconstructs normalized cube pixels"), 1c and 1f
    "model.size": {"S": "S", "B": "B", "L": "L", "H": "H"},
    "model.cube": [2, 16, 16],
    "model.decoder_depth": 4,
    "data.frames": {"32f": 32, "32x320": 32, "": 16},  # Tables 5, 6 and 7
    "data.size": {"32x320": 320, "": 224},
    "data.stride": {"ssv2": 2, "hmdb51": 2, "k400": 4, "ava": 4},  # Table 8, Sec. B, Table 5
    "mask.type": "tube",
    "mask.decoder_ratio": 0.0,
    "target.frames": "input",
    "target.normalize": True,
    "target.loss": "mse",
}
MULTI_SCALE_CROP = [1.0, 0.875, 0.75, 0.66]  # TSN's

TABLE_9 = {  # pre-training
    "optim.base_lr": 1.5e-4,
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.95],
    "optim.batch_size": 1024,
    "optim.warmup_epochs": 40,
    "data.flip": {"ssv2": False, "k400": True},
    "data.scales": MULTI_SCALE_CROP,
    "data.repeats": 1,  # in the table only for fine-tuning
}
PRETRAINING = {  # Table 1 (800 epochs), captions of Tables 6, 7 and 13, Sec. B on the small sets
    "optim.epochs": {"800": 800, "k400": 1600, "ssv2": 2400, "ucf101": 3200, "hmdb51": 4800},
    "mask.ratio": {"k400": 0.9, "ssv2": 0.9, "ucf101": 0.75, "hmdb51": 0.75},
    "optim.batch_size": {"ucf101": 192, "hmdb51": 192},
    "optim.base_lr": {"ucf101": 3e-4, "hmdb51": 3e-4},
}

TABLE_10 = {  # fine-tuning
    "optim.base_lr": {"ssv2": {"S": 1e-3, "B": 5e-4, "L": 5e-4}, "k400": 1e-3},
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.batch_size": 512,
    "optim.warmup_epochs": 5,
    "optim.epochs": {"ssv2": {"S": 40, "B": 40, "L": 30}, "k400": {"S": 150, "B": 75, "L": 50, "H": 50}},
    "data.repeats": 2,
    "data.flip": {"ssv2": False, "k400": True},
    "data.randaugment": [2, 9, 0.5],  # "(9, 0.5)"; 2 operations are timm's default
    "optim.label_smoothing": 0.1,
    "optim.mixup": 0.8,
    "optim.cutmix": 1.0,
    "model.drop_path": {"S": 0.1, "B": 0.1, "L": 0.2, "H": 0.2},
    "model.dropout": {"S": 0, "B": 0, "L": 0.5, "H": 0.5},
    "optim.layer_decay": {"S": 0.7, "B": 0.75, "L": 0.75, "H": 0.75},
}
FINETUNING = {  # Sec. B: the small sets, sampling; test views as in Tables 6 and 7, for example 57 GFLOPs x 5 x 3
    "optim.batch_size": {"ucf101": 128, "hmdb51": 128},
    "optim.base_lr": {"ucf101": 5e-4, "hmdb51": 1e-3},
    "optim.epochs": {"ucf101": 100, "hmdb51": 50},
    "optim.layer_decay": {"ucf101": 0.7, "hmdb51": 0.7},
    "model.drop_path": {"ucf101": 0.2, "hmdb51": 0.2},
    "data.sampling": {"ssv2": "uniform", "k400": "dense"},
    "data.test_clips": {"32x320": 4, "32f": 1, "ssv2": 2, "hmdb51": 10, "ucf101": 5, "k400": 5},
    "data.test_crops": 3,
}
ABLATION = {  # Tables 1 and 4: repeated augmentation is for Tables 6 and 7 only (Sec. B)
    "data.repeats": {"ablation": 1},
    "optim.epochs": {"ablation": {"ssv2": 50}},  # the authors' script; not in the paper
}
FROM_SCRATCH = {  # Sec. B says MViT and the epochs of the first two; MViT's settings are SlowFast's
    "optim.epochs": {"scratch": {"ssv2": 100, "k400": 200}},
    "model.drop_path": {"scratch": 0.2},
    "model.dropout": {"scratch": 0.5},
    "optim.base_lr": {"scratch": 1.6e-3},
    "optim.min_lr": {"scratch": 1.6e-5},
    "optim.layer_decay": {"scratch": 1.0},
    "optim.warmup_epochs": {"scratch": 30},
}

TABLE_11 = {  # linear probing: SGD without weight decay
    "optim.base_lr": 0.1,
    "optim.momentum": 0.9,
    "optim.batch_size": 1024,
    "optim.warmup_epochs": 10,
    "optim.epochs": 100,
    "data.scales": MULTI_SCALE_CROP,
}

TABLE_12 = {  # AVA, without and with additional fine-tuning on Kinetics
    "optim.base_lr": {"labels": 5e-4, "": {"S": 1e-3, "B": 2.5e-4, "L": 2.5e-4, "H": 5e-4}},
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.batch_size": 128,
    "optim.warmup_epochs": 5,
    "optim.epochs": {"labels": {"S": 30, "B": 30, "L": 20, "H": 20}, "": {"S": 30, "B": 30, "L": 30, "H": 20}},
    "data.flip": True,
    "model.drop_path": 0.2,
    "optim.layer_decay": {"S": 0.6, "B": 0.75, "L": {"labels": 0.8, "": 0.75}, "H": 0.8},
}
DETECTION = {"data.short_side": 256, "data.threshold": 0.8, "data.actions": 80}  # Sec. B; AVA's actions, 60 evaluated

MOCO_V3 = {  # Chen, Xie, He 2021, and their code for ViT-B on images; 300 epochs are VideoMAE's Table 3
    "moco.mlp_dim": 4096,
    "moco.dim": 256,
    "moco.temperature": 0.2,
    "moco.momentum": 0.99,
    "data.crop_area": [0.08, 1.0],
    "data.flip": {"ssv2": False, "k400": True},
    "optim.base_lr": 1.5e-4,
    "optim.weight_decay": 0.1,
    "optim.betas": [0.9, 0.999],
    "optim.batch_size": {"ucf101": 192, "hmdb51": 192, "k400": 4096, "ssv2": 4096},  # the small sets' is VideoMAE's
    "optim.epochs": 300,
    "optim.warmup_epochs": 40,
}

GPUS = {"k400": 64, "ssv2": 64, "ucf101": 8, "hmdb51": 8, "ava": 32}  # Sec. B


# ---- where this project does otherwise, and what the paper does not say ----

DEVIATIONS = [  # recipes, key, value, reason
    ("pretrain/*_large", "model.decoder_depth", 12, "the authors' scripts and checkpoints; Sec. 4.2 names 4 for ViT-B"),
    ("pretrain/*_huge", "model.decoder_depth", 12, "the same"),
    ("finetune/*", "data.randaugment", [4, 7, 0.5], "the authors' code: rand-m7-n4-mstd0.5-inc1"),
    ("finetune/ssv2_*", "data.stride", 4, "without effect: uniform sampling has no stride"),
    ("finetune/*_320", "data.stride", 2, "not in the paper: as long a clip as 16 frames with stride 4"),
]
OTHERS = {
    "data.root": {"k700": "data/kinetics700", "k400": "data/kinetics400", "ssv2": "data/something-something-v2"}
    | {"ucf101": "data/ucf101", "hmdb51": "data/hmdb51", "ava": "data/ava"},
    "data.train": {"k400": "train", "ssv2": "labels/train.json", "ucf101": "trainlist01.txt"}
    | {"hmdb51": "testTrainMulti_7030_splits/*_test_split1.txt=1", "ava": "annotations/ava_train_v2.2.csv"},
}
LABELLED = {
    "data.val": {"k400": "val", "ssv2": "labels/validation.json", "ucf101": "testlist01.txt"}
    | {"hmdb51": "testTrainMulti_7030_splits/*_test_split1.txt=2"},
    "data.classes": {"k400": "", "ssv2": "labels/labels.json", "ucf101": "classInd.txt", "hmdb51": ""},
    "data.per_class": 0,
    "data.sampling": {"ssv2": "uniform", "k400": "dense"},
    "data.test_clips": {"ssv2": 2, "k400": 5},
    "data.test_crops": 3,
    "model.pretrained_clip": [16, 224, 224],
}
AUTHORS_CLASSIFICATION = {"data.crop_area": [0.08, 1.0], "data.crop_aspect": [0.75, 1.3333], "data.erase": 0.25}
AVA = {
    "data.rate": 30.0,
    "data.mean": [0.485, 0.456, 0.406],  # as in pre-training
    "data.std": [0.229, 0.224, 0.225],
    "data.jitter_colors": False,  # the authors' code does these four
    "data.jitter_boxes": False,
    "data.widen_boxes": False,
    "data.person_score": False,
}
TABLES = {
    "pretrain": [MODEL, OTHERS, {"optim.min_lr": 1e-5}, TABLE_9, PRETRAINING],  # min_lr: the authors' scripts
    "finetune": [MODEL, OTHERS, LABELLED, AUTHORS_CLASSIFICATION, {"optim.min_lr": 1e-6}, TABLE_10]
    + [FINETUNING, ABLATION, FROM_SCRATCH],
    "probe": [MODEL, OTHERS, LABELLED, {"model.against_random": False, "model.batch_norm": False}, TABLE_11],
    "detect": [MODEL, OTHERS, AVA, {"optim.min_lr": 1e-6}, TABLE_12, DETECTION],
    "baselines": [MODEL, OTHERS, MOCO_V3],
}

# Recipe, its columns, peak learning rate (base_lr x batch / 256, Sec. B), the recipe whose weights it starts from, the
# paper's results that its header states. A star: values that are its own, for the toy or for a user's videos.
RECIPES = """
pretrain/k400_small | k400 S | 0.0006 | - | 79.0 22.5
pretrain/k400_base | k400 B | 0.0006 | - | 81.5 69.7 96.1 73.3 26.7
pretrain/k400_base_800 | 800 k400 B | 0.0006 | - | 80.0 68.5
pretrain/k400_large | k400 L | 0.0006 | - | 85.2 74.0 34.3
pretrain/k400_huge | k400 H | 0.0006 | - | 86.6 36.5
pretrain/k700_large | k700 k400 L | 0.0006 | - | 36.1
pretrain/ssv2_small | ssv2 S | 0.0006 | - | 66.8
pretrain/ssv2_base | ssv2 B | 0.0006 | - | 70.8 69.6
pretrain/ssv2_large | ssv2 L | 0.0006 | - | 74.3 75.4
pretrain/ucf101_base | ucf101 k400 B | 0.000225 | - | 91.3
pretrain/hmdb51_base | hmdb51 k400 B | 0.000225 | - | 62.6
pretrain/own_small* | k400 B | 0.000984375 | - |
pretrain/toy* | k400 B | - | - |
finetune/k400_small | k400 S | 0.002 | pretrain/k400_small | 79.0 93.8
finetune/k400_base | k400 B | 0.002 | pretrain/k400_base | 81.5 95.1 80.0
finetune/k400_large | k400 L | 0.002 | pretrain/k400_large | 85.2 96.8
finetune/k400_huge | k400 H | 0.002 | pretrain/k400_huge | 86.6 97.1
finetune/k700_large | k700 k400 L | 0.002 | pretrain/k700_large |
finetune/k400_large_320 | 32x320 k400 L | 0.002 | finetune/k400_large | 86.1 97.3
finetune/k400_huge_320 | 32x320 k400 H | 0.002 | finetune/k400_huge | 87.4 97.6
finetune/k400_base_scratch | scratch k400 B | 0.0032 | scratch | 68.8
finetune/ssv2_small | ssv2 S | 0.002 | pretrain/ssv2_small | 66.8 90.3
finetune/ssv2_base | ssv2 B | 0.001 | pretrain/ssv2_base | 70.8 92.4 69.6
finetune/ssv2_large | ssv2 L | 0.001 | pretrain/ssv2_large | 74.3 94.6
finetune/ssv2_large_32 | 32f ssv2 L | 0.001 | pretrain/ssv2_large | 75.4 95.2
finetune/ssv2_base_from_k400 | ssv2 B | 0.001 | pretrain/k400_base | 69.7 92.3
finetune/ssv2_large_from_k400 | ssv2 L | 0.001 | pretrain/k400_large | 74.0 94.6
finetune/ssv2_base_from_k400_800 | ablation ssv2 B | 0.001 | pretrain/k400_base_800 | 68.5
finetune/ssv2_base_scratch | scratch ssv2 B | 0.0032 | scratch | 32.6
finetune/ucf101_base | ucf101 k400 B | 0.00025 | pretrain/ucf101_base | 91.3
finetune/ucf101_base_from_k400 | ucf101 k400 B | 0.00025 | pretrain/k400_base | 96.1
finetune/ucf101_base_scratch | scratch ucf101 k400 B | 0.0008 | scratch | 51.4
finetune/hmdb51_base | hmdb51 k400 B | 0.0005 | pretrain/hmdb51_base | 62.6
finetune/hmdb51_base_from_k400 | hmdb51 k400 B | 0.0005 | pretrain/k400_base | 73.3
finetune/hmdb51_base_scratch | scratch hmdb51 k400 B | 0.0008 | scratch | 18.0
finetune/own* | ucf101 k400 B | 0.00025 | pytorch_model.bin |
finetune/own_small* | ucf101 k400 B | 0.001 | pretrain/own_small |
finetune/toy* | k400 B | - | pretrain/toy |
finetune/toy_scratch* | k400 B | - | scratch |
probe/ssv2_base | ssv2 B | 0.4 | pretrain/ssv2_base | 38.9 34.7
probe/k400_base | k400 B | 0.4 | pretrain/k400_base |
probe/toy* | k400 B | - | pretrain/toy |
detect/k400_small | ava S | 0.0005 | pretrain/k400_small | 22.5
detect/k400_base | ava B | 0.000125 | pretrain/k400_base | 26.7
detect/k400_large | ava L | 0.000125 | pretrain/k400_large | 34.3
detect/k400_huge | ava H | 0.00025 | pretrain/k400_huge | 36.5
detect/k700_large | ava L | 0.000125 | pretrain/k700_large | 36.1
detect/k400_small_finetuned | labels ava S | 0.00025 | finetune/k400_small | 28.4
detect/k400_base_finetuned | labels ava B | 0.00025 | finetune/k400_base | 31.8
detect/k400_large_finetuned | labels ava L | 0.00025 | finetune/k400_large | 37.0
detect/k400_huge_finetuned | labels ava H | 0.00025 | finetune/k400_huge | 39.5
detect/k700_large_finetuned | labels ava L | 0.00025 | finetune/k700_large | 39.3
detect/authors* | ava B | 0.000125 | pretrain/k400_base |
detect/toy* | ava B | - | pretrain/toy |
baselines/k400_base | k400 B | 0.0024 | - | 74.2 62.4 93.2 67.9 80.0 68.5 96.1 73.3
baselines/ssv2_base | ssv2 B | 0.0024 | - | 54.2 33.7 69.6 38.9
baselines/ucf101_base | ucf101 k400 B | 0.0001125 | - | 81.7 91.3
baselines/hmdb51_base | hmdb51 k400 B | 0.0001125 | - | 39.2 62.6
baselines/toy* | k400 B | - | - |
"""
ROWS = [[cell.strip() for cell in row.split("|")] for row in RECIPES.strip().splitlines()]
PAPER = [row for row in ROWS if not row[0].endswith("*")]
NOT_MADE_HERE = ("-", "scratch", "pytorch_model.bin")


def load(name: str) -> SimpleNamespace:
    return load_config(CONFIGS / name.split("/")[0] / "toy.yaml", [str(CONFIGS / f"{name}.yaml")])


def entry(value: Any, columns: list[str]) -> Any:
    """A table's value in the given columns, None if the table does not have them; "" is the column of all others."""
    while isinstance(value, dict):
        column = next((column for column in (*columns, "") if column in value), None)
        value = None if column is None else value[column]
    return value


def in_the_paper(name: str, columns: list[str]) -> dict[str, Any]:
    """What the tables say about a recipe, by key. Later tables count more."""
    stage = name.split("/")[0]
    keys = read_yaml(CONFIGS / stage / "defaults.yaml").keys()
    values = {}
    for table in TABLES[stage]:
        for key, value in table.items():
            if key in keys and entry(value, columns) is not None:
                values[key] = entry(value, columns)
    return values


def test_every_recipe_is_in_the_table():
    files = {f"{stage}/{path.stem}" for stage in STAGES for path in (CONFIGS / stage).glob("*.yaml")}
    defaults = {f"{stage}/defaults" for stage in STAGES}
    assert files == {row[0].rstrip("*") for row in ROWS} | defaults and len(ROWS) == len(files - defaults)


@pytest.mark.parametrize("name, columns, peak, init, results", PAPER, ids=[row[0] for row in PAPER])
def test_every_value_is_the_papers_or_a_named_deviation(name, columns, peak, init, results):
    columns = columns.split()
    config, values = load(name), flatten(as_dict(load(name)))
    expected = in_the_paper(name, columns)
    expected |= {key: value for pattern, key, value, _ in DEVIATIONS if fnmatch(name, pattern)}
    assert {key: values[key] for key in expected} == expected
    # the paper's batch can be split over its GPUs, and into equal micro-batches
    clips = 2 if hasattr(config, "moco") else getattr(config.data, "repeats", 1)  # of each video
    videos, rest = divmod(config.run.batch_per_device, clips)
    assert rest == 0 and config.optim.batch_size % min(videos, config.optim.batch_size) == 0
    assert config.optim.batch_size % entry(GPUS, columns) == 0


@pytest.mark.parametrize("name, columns, peak, init, results", ROWS, ids=[row[0] for row in ROWS])
def test_learning_rate_weights_header_and_size(name, columns, peak, init, results):
    name = name.rstrip("*")
    config, text = load(name), (CONFIGS / f"{name}.yaml").read_text("utf-8")
    scaled = config.optim.base_lr * config.optim.batch_size / 256
    assert peak == "-" or scaled == pytest.approx(float(peak))
    for base, batch, product in re.findall(r"base_lr: (\S+) +# x (\d+) / 256 = (\S+)", text):
        assert (float(base), int(batch)) == (config.optim.base_lr, config.optim.batch_size)
        assert float(product) == pytest.approx(scaled)
    assert config.run.folder == f"runs/{name}" and config.run.seed == 0
    assert (config.run.precision, config.run.compile, config.run.profile) == ("auto", "auto", False)
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    assert set(re.findall(r"(\d+\.\d) (?:% top-\d|%|mAP)", header)) == set(results.split()), header
    if init not in NOT_MADE_HERE:
        weights = load(init)
        assert config.init == f"runs/{init}/checkpoint.pt"
        assert (config.model.size, config.model.cube) == (weights.model.size, weights.model.cube)
        assert config.model.pretrained_clip == [weights.data.frames, weights.data.size, weights.data.size]
    elif init != "-":
        assert config.init == init
    if getattr(config.optim, "mixup", 0) or getattr(config.optim, "cutmix", 0):
        assert config.run.batch_per_device // config.data.repeats >= 2  # else a clip is mixed with its own copy


@pytest.mark.parametrize("name", ["pretrain/own_small", "finetune/own_small", "finetune/own"])
def test_few_videos_of_ones_own_are_trained_on_for_as_many_steps_as_many(name):
    optim = load(name).optim
    videos = 12 if name.startswith("pretrain/") else 10  # of 12 in two classes, two are kept for the test
    assert optim.batch_size <= videos and optim.steps >= 300
    assert count_steps(optim, videos // optim.batch_size) == count_steps(optim, 3000 // optim.batch_size)


def test_deviations_deviate_and_tables_name_only_keys_that_exist():
    for pattern, key, value, reason in DEVIATIONS:
        names = [(name, columns) for name, columns, *_ in PAPER if fnmatch(name, pattern)]
        assert reason and any(in_the_paper(name, columns.split())[key] != value for name, columns in names)
    keys = set().union(*(read_yaml(CONFIGS / stage / "defaults.yaml") for stage in STAGES))
    assert {key for tables in TABLES.values() for table in tables for key in table} <= keys


def test_a_recipe_names_only_what_differs_from_its_bases():
    for stage in STAGES:
        for path in (CONFIGS / stage).rglob("*.yaml"):
            own = flatten(yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader))
            bases = own.pop("base", [])
            inherited = {} if path.stem == "defaults" else read_yaml(CONFIGS / stage / "defaults.yaml")
            for base in [bases] if isinstance(bases, str) else bases:
                inherited |= read_yaml(path.parent / base)
            again = {key for key, value in own.items() if inherited.get(key) == value}
            assert not again - {"data.classes"}, (path, again)
