"""Every file in configs/ against the paper: Tables 1 to 13 and Sec. B, number by number; MoCo v3 against its own.

The tables below are written as the paper has them. A value that depends on a column of its table is a dict; a recipe
names its columns. Where this project does otherwise, DEVIATIONS says so; SILENT has what the paper does not say.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from masking import split, tube_mask
from model import SIZES, VideoClassifier, VideoMAE
from support.config import as_dict, flatten, load_config, read_yaml

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
    "optim.batch_size": {"ssv2": 512, "k400": 512},
    "optim.warmup_epochs": 5,
    "optim.epochs": {"ssv2": {"S": 40, "B": 40, "L": 30}, "k400": {"S": 150, "B": 75, "L": 50, "H": 50}},
    "data.repeats": {"ssv2": 2, "k400": 2},
    "data.flip": {"ssv2": False, "k400": True},
    "data.randaugment": [2, 9, 0.5],  # "(9, 0.5)"; 2 operations are timm's default
    "optim.label_smoothing": {"ssv2": 0.1, "k400": 0.1},
    "optim.mixup": {"ssv2": 0.8, "k400": 0.8},
    "optim.cutmix": {"ssv2": 1.0, "k400": 1.0},
    "model.drop_path": {"S": 0.1, "B": 0.1, "L": 0.2, "H": 0.2},
    "model.dropout": {"ssv2": {"S": 0, "B": 0, "L": 0.5}, "k400": {"S": 0, "B": 0, "L": 0.5, "H": 0.5}},
    "optim.layer_decay": {
        "ssv2": {"S": 0.7, "B": 0.75, "L": 0.75},
        "k400": {"S": 0.7, "B": 0.75, "L": 0.75, "H": 0.75},
    },
}
FINETUNING = {  # Sec. B: the small sets, sampling; test views as in Tables 6 and 7, for example 57 GFLOPs x 5 x 3
    "optim.batch_size": {"ucf101": 128, "hmdb51": 128},
    "optim.base_lr": {"ucf101": 5e-4, "hmdb51": 1e-3},
    "optim.epochs": {"ucf101": 100, "hmdb51": 50},
    "optim.layer_decay": {"ucf101": 0.7, "hmdb51": 0.7},
    "model.drop_path": {"ucf101": 0.2, "hmdb51": 0.2},
    "data.repeats": {"ucf101": 2, "hmdb51": 2},
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
    "optim.base_lr": {"scratch": 8e-4},
    "optim.min_lr": {"scratch": 5e-7},
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
    "optim.layer_decay": {
        "labels": {"S": 0.6, "B": 0.75, "L": 0.8, "H": 0.8},
        "": {"S": 0.6, "B": 0.75, "L": 0.75, "H": 0.8},
    },
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
PARAMETERS = {"S": 22, "B": 87, "L": 305, "H": 633}  # "Param", in millions, in Tables 5 to 7

# ---- where this project does otherwise, and what the paper does not say ----

DEVIATIONS = [  # recipes, key, value, reason
    ("pretrain/*_large", "model.decoder_depth", 12, "the authors' scripts and checkpoints; Sec. 4.2 names 4 for ViT-B"),
    ("pretrain/*_huge", "model.decoder_depth", 12, "the same"),
    ("finetune/*", "data.randaugment", [4, 7, 0.5], "the authors' code: rand-m7-n4-mstd0.5-inc1"),
    ("finetune/ssv2_*", "data.stride", 4, "without effect: uniform sampling has no stride"),
    ("finetune/*_320", "data.stride", 2, "not in the paper: as long a clip as 16 frames with stride 4"),
]
FILES = {
    "data.root": {
        "k700": "data/kinetics700",
        "k400": "data/kinetics400",
        "ssv2": "data/something-something-v2",
        "ucf101": "data/ucf101",
        "hmdb51": "data/hmdb51",
        "ava": "data/ava",
    },
    "data.train": {
        "k400": "train",
        "ssv2": "labels/train.json",
        "ucf101": "trainlist01.txt",
        "hmdb51": "testTrainMulti_7030_splits/*_test_split1.txt=1",
        "ava": "annotations/ava_train_v2.2.csv",
    },
    "data.workers": 8,
}
LABELLED_FILES = {
    "data.val": {
        "k400": "val",
        "ssv2": "labels/validation.json",
        "ucf101": "testlist01.txt",
        "hmdb51": "testTrainMulti_7030_splits/*_test_split1.txt=2",
    },
    "data.classes": {"k400": "", "ssv2": "labels/labels.json", "ucf101": "classInd.txt", "hmdb51": ""},
    "data.per_class": 0,
}
SILENT = {
    "pretrain": {
        "data.val": {"k400": "val", "ssv2": "labels/validation.json", "ucf101": "", "hmdb51": ""},
        "optim.min_lr": 1e-5,  # the authors' scripts
    },
    "finetune": {
        **LABELLED_FILES,
        "model.pretrained_clip": [16, 224, 224],
        "data.crop_area": [0.08, 1.0],  # these three as the authors' code
        "data.crop_aspect": [0.75, 1.3333],
        "data.erase": 0.25,
        "optim.min_lr": 1e-6,  # the authors' scripts
    },
    "probe": {
        **LABELLED_FILES,
        "model.pretrained_clip": [16, 224, 224],
        "model.against_random": False,
        "data.sampling": {"ssv2": "uniform", "k400": "dense"},  # these three as in fine-tuning
        "data.test_clips": {"ssv2": 2, "k400": 5},
        "data.test_crops": 3,
    },
    "detect": {
        "model.pretrained_clip": [16, 224, 224],
        "data.movies": "videos",
        "data.starts_at": 900,
        "data.train_exclude": "annotations/ava_train_excluded_timestamps_v2.2.csv",
        "data.val": "annotations/ava_val_v2.2.csv",
        "data.val_exclude": "annotations/ava_val_excluded_timestamps_v2.2.csv",
        "data.labels": "annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt",
        "data.boxes": "boxes/ava_val_det_person_bbox.json",
        "data.file_list": "annotations/ava_file_names_trainval_v2.1.txt",
        "data.rate": 30.0,
        "data.mean": [0.485, 0.456, 0.406],  # as in pre-training
        "data.std": [0.229, 0.224, 0.225],
        "data.jitter_colors": False,  # the authors' code does these four
        "data.jitter_boxes": False,
        "data.widen_boxes": False,
        "data.person_score": False,
        "optim.min_lr": 1e-6,  # the authors' scripts for classification
    },
}
TABLES = {
    "pretrain": [MODEL, FILES, SILENT["pretrain"], TABLE_9, PRETRAINING],
    "finetune": [MODEL, FILES, SILENT["finetune"], TABLE_10, FINETUNING, ABLATION, FROM_SCRATCH],
    "probe": [MODEL, FILES, SILENT["probe"], TABLE_11],
    "detect": [MODEL, FILES, SILENT["detect"], TABLE_12, DETECTION],
    "baselines": [MODEL, FILES, MOCO_V3],
}

# The toy's recipes are those of ViT-B on Kinetics except for size, the augmentations that would change a toy's class,
# and what makes them learn on a laptop.
TOY = {
    "model.size": "tiny",
    "data.root": "",
    "data.frames": 8,
    "data.stride": 2,
    "data.size": 64,
    "data.workers": 1,
}
TOY_PRETRAIN = TOY | {
    "model.decoder_depth": 1,
    "mask.ratio": 0.75,
    "data.train": "",
    "data.val": "",
    "data.scales": [1.0],
    "data.flip": False,
    "optim.batch_size": 8,
    "optim.base_lr": 0.064,
    "optim.min_lr": 0.0,
    "optim.epochs": 4,
    "optim.warmup_epochs": 1,
}
TOY_FINETUNE = TOY | {
    "model.pretrained_clip": [8, 64, 64],
    "model.drop_path": 0.0,
    "data.train": "",
    "data.val": "",
    "data.repeats": 1,
    "data.randaugment": [0.0, 0.0, 0.0],
    "data.crop_area": [1.0, 1.0],
    "data.crop_aspect": [1.0, 1.0],
    "data.flip": False,
    "data.erase": 0.0,
    "data.test_clips": 1,
    "data.test_crops": 1,
    "optim.batch_size": 8,
    "optim.base_lr": 0.06,
    "optim.min_lr": 0.0,
    "optim.layer_decay": 1.0,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.2,
    "optim.mixup": 0.0,
    "optim.cutmix": 0.0,
}
TOY_PROBE = TOY | {
    "model.pretrained_clip": [8, 64, 64],
    "model.against_random": True,
    "data.train": "",
    "data.val": "",
    "data.scales": [1.0],
    "data.test_clips": 1,
    "data.test_crops": 1,
    "optim.batch_size": 64,
    "optim.epochs": 10,
    "optim.warmup_epochs": 1,
}
TOY_DETECT = TOY | {
    "model.pretrained_clip": [8, 64, 64],
    "model.drop_path": 0.0,
    "data.labels": "annotations/ava_action_list_v2.2.pbtxt",
    "data.actions": 12,
    "data.boxes": "boxes/ava_val_predicted_boxes.csv",
    "data.file_list": "",
    "data.rate": 12.0,
    "data.short_side": 72,
    "data.flip": False,
    "optim.batch_size": 32,
    "optim.base_lr": 0.008,
    "optim.min_lr": 0.0,
    "optim.layer_decay": 1.0,
    "optim.epochs": 8,
    "optim.warmup_epochs": 1,
}
TOY_MOCO_V3 = TOY | {
    "moco.mlp_dim": 512,
    "moco.dim": 128,
    "data.train": "",
    "data.flip": False,
    "optim.batch_size": 32,
    "optim.base_lr": 8e-3,
    "optim.epochs": 5,
    "optim.warmup_epochs": 1,
}
AUTHORS = {
    "data.rate": 25.0,
    "data.mean": [0.4815, 0.4547, 0.4038],
    "data.std": [0.225, 0.225, 0.225],
    "data.jitter_colors": True,
    "data.jitter_boxes": True,
    "data.widen_boxes": True,
    "data.person_score": True,
}
OWN = {"data.root": "my_videos", "data.train": "", "data.val": "", "data.workers": 2}
TOY_PICTURE = TOY_PRETRAIN | {
    "model.decoder_depth": 4,
    "model.cube": [2, 8, 8],
    "target.normalize": False,
    "target.loss": "l1",
    "data.frames": 4,
    "data.stride": 3,
    "data.repeats": 2,
    "data.workers": 0,
    "optim.batch_size": 16,
    "optim.epochs": 80,
}
OWN_PRETRAIN = (
    TOY_PRETRAIN
    | OWN
    | {
        "data.size": 112,
        "optim.batch_size": 12,
        "optim.base_lr": 2.1e-2,
        "optim.epochs": 1500,
        "optim.warmup_epochs": 50,
    }
)
OWN_FINETUNE = OWN | {"data.classes": "", "optim.batch_size": 16, "optim.base_lr": 1e-3, "optim.epochs": 30}

# ---- the recipes ----


class Recipe(NamedTuple):
    columns: list[str]  # of the tables above; the first one that a table has counts
    peak: float  # learning rate: base learning rate x batch size / 256 (Sec. B)
    init: str  # the recipe whose checkpoint it starts from, or what `init` says
    results: tuple[str, ...]  # the paper's, as the header has to state them
    others: dict[str, Any]  # values that are in no table


def recipe(columns: str, peak: float, init: str, *results: str, others: dict[str, Any] | None = None) -> Recipe:
    return Recipe(columns.split(), peak, init, results, others or {})


RECIPES = {
    "pretrain/k400_small": recipe("k400 S", 6e-4, "", "79.0 % top-1 (Table 7)", "22.5 mAP on AVA (Table 5)"),
    "pretrain/k400_base": recipe(
        "k400 B",
        6e-4,
        "",
        "81.5 % top-1 after these 1600 epochs (Table 7)",
        "69.7 % top-1 on Something-Something V2 (Table 6)",
        "96.1 % on UCF101, 73.3 % on HMDB51 (Table 4)",
        "26.7 mAP on AVA (Table 5)",
    ),
    "pretrain/k400_base_800": recipe(
        "800 k400 B", 6e-4, "", "80.0 % top-1 (Tables 1 and 2)", "68.5 % top-1 on Something"
    ),
    "pretrain/k400_large": recipe(
        "k400 L",
        6e-4,
        "",
        "85.2 % top-1 (Table 7)",
        "74.0 % top-1 on Something-Something V2 (Table 6)",
        "34.3 mAP on AVA (Table 5)",
    ),
    "pretrain/k400_huge": recipe("k400 H", 6e-4, "", "86.6 % top-1 (Table 7)", "36.5 mAP on AVA (Table 5)"),
    "pretrain/k700_large": recipe("k700 k400 L", 6e-4, "", "36.1 mAP on AVA (Table 5)"),
    "pretrain/ssv2_small": recipe("ssv2 S", 6e-4, "", "66.8 % top-1 (Table 6)"),
    "pretrain/ssv2_base": recipe(
        "ssv2 B", 6e-4, "", "70.8 % top-1 after these 2400 epochs (Table 6)", "69.6 % with optim.epochs=800 (Table 1"
    ),
    "pretrain/ssv2_large": recipe("ssv2 L", 6e-4, "", "74.3 % top-1 with 16 frames, 75.4 % top-1 with 32 (Table 6)"),
    "pretrain/ucf101_base": recipe("ucf101 k400 B", 2.25e-4, "", "91.3 % top-1 (Tables 2 and 13)"),
    "pretrain/hmdb51_base": recipe("hmdb51 k400 B", 2.25e-4, "", "62.6 % top-1 (Tables 2 and 13)"),
    "pretrain/own": recipe("k400 B", 9.84375e-4, "", others=OWN_PRETRAIN),
    "pretrain/toy": recipe("k400 B", 2e-3, "", others=TOY_PRETRAIN),
    "pretrain/toy_picture": recipe("k400 B", 4e-3, "", others=TOY_PICTURE),
    "finetune/k400_small": recipe("k400 S", 2e-3, "pretrain/k400_small", "79.0 % top-1, 93.8 % top-5 (Table 7)"),
    "finetune/k400_base": recipe(
        "k400 B", 2e-3, "pretrain/k400_base", "81.5 % top-1, 95.1 % top-5 (Table 7)", "80.0 % (Table 1)"
    ),
    "finetune/k400_large": recipe("k400 L", 2e-3, "pretrain/k400_large", "85.2 % top-1, 96.8 % top-5 (Table 7)"),
    "finetune/k400_huge": recipe("k400 H", 2e-3, "pretrain/k400_huge", "86.6 % top-1, 97.1 % top-5 (Table 7)"),
    "finetune/k700_large": recipe("k700 k400 L", 2e-3, "pretrain/k700_large"),
    "finetune/k400_large_320": recipe(
        "32x320 k400 L", 2e-3, "finetune/k400_large", "86.1 % top-1, 97.3 % top-5 (Table 7)"
    ),
    "finetune/k400_huge_320": recipe(
        "32x320 k400 H", 2e-3, "finetune/k400_huge", "87.4 % top-1, 97.6 % top-5 (Table 7)"
    ),
    "finetune/k400_base_scratch": recipe("scratch k400 B", 1.6e-3, "scratch", "68.8 % top-1 (Tables 1d and 2)"),
    "finetune/ssv2_small": recipe("ssv2 S", 2e-3, "pretrain/ssv2_small", "66.8 % top-1, 90.3 % top-5 (Table 6)"),
    "finetune/ssv2_base": recipe(
        "ssv2 B", 1e-3, "pretrain/ssv2_base", "70.8 % top-1, 92.4 % top-5 (Table 6)", "69.6 % (Table 1)"
    ),
    "finetune/ssv2_large": recipe("ssv2 L", 1e-3, "pretrain/ssv2_large", "74.3 % top-1, 94.6 % top-5 (Table 6)"),
    "finetune/ssv2_large_32": recipe("32f ssv2 L", 1e-3, "pretrain/ssv2_large", "75.4 % top-1, 95.2 % top-5 (Table 6)"),
    "finetune/ssv2_base_from_k400": recipe(
        "ssv2 B", 1e-3, "pretrain/k400_base", "69.7 % top-1, 92.3 % top-5 (Table 6)"
    ),
    "finetune/ssv2_large_from_k400": recipe(
        "ssv2 L", 1e-3, "pretrain/k400_large", "74.0 % top-1, 94.6 % top-5 (Table 6)"
    ),
    "finetune/ssv2_base_from_k400_800": recipe(
        "ablation ssv2 B", 1e-3, "pretrain/k400_base_800", "68.5 % top-1 (Tables 1e and 4)"
    ),
    "finetune/ssv2_base_scratch": recipe("scratch ssv2 B", 1.6e-3, "scratch", "32.6 % top-1 (Tables 1d and 2)"),
    "finetune/ucf101_base": recipe("ucf101 k400 B", 2.5e-4, "pretrain/ucf101_base", "91.3 % top-1 (Tables 2 and 13)"),
    "finetune/ucf101_base_from_k400": recipe(
        "ucf101 k400 B", 2.5e-4, "pretrain/k400_base", "96.1 % top-1 (Tables 4 and 13)"
    ),
    "finetune/ucf101_base_scratch": recipe("scratch ucf101 k400 B", 4e-4, "scratch", "51.4 % top-1 (Table 2)"),
    "finetune/hmdb51_base": recipe("hmdb51 k400 B", 5e-4, "pretrain/hmdb51_base", "62.6 % top-1 (Tables 2 and 13)"),
    "finetune/hmdb51_base_from_k400": recipe(
        "hmdb51 k400 B", 5e-4, "pretrain/k400_base", "73.3 % top-1 (Tables 4 and 13)"
    ),
    "finetune/hmdb51_base_scratch": recipe("scratch hmdb51 k400 B", 4e-4, "scratch", "18.0 % top-1 (Table 2)"),
    "finetune/own": recipe("ucf101 k400 B", 6.25e-5, "pytorch_model.bin", others=OWN_FINETUNE),
    "finetune/toy": recipe("k400 B", 1.875e-3, "pretrain/toy", others=TOY_FINETUNE),
    "probe/ssv2_base": recipe("ssv2 B", 0.4, "pretrain/ssv2_base", "38.9 % top-1 (Table 3) after 800 epochs", "34.7 %"),
    "probe/k400_base": recipe("k400 B", 0.4, "pretrain/k400_base"),
    "probe/toy": recipe("k400 B", 0.025, "pretrain/toy", others=TOY_PROBE),
    "detect/k400_small": recipe("ava S", 5e-4, "pretrain/k400_small", "22.5 mAP (Table 5)"),
    "detect/k400_base": recipe("ava B", 1.25e-4, "pretrain/k400_base", "26.7 mAP (Table 5)"),
    "detect/k400_large": recipe("ava L", 1.25e-4, "pretrain/k400_large", "34.3 mAP (Table 5)"),
    "detect/k400_huge": recipe("ava H", 2.5e-4, "pretrain/k400_huge", "36.5 mAP (Table 5)"),
    "detect/k700_large": recipe("ava L", 1.25e-4, "pretrain/k700_large", "36.1 mAP (Table 5)"),
    "detect/k400_small_finetuned": recipe("labels ava S", 2.5e-4, "finetune/k400_small", "28.4 mAP (Table 5)"),
    "detect/k400_base_finetuned": recipe("labels ava B", 2.5e-4, "finetune/k400_base", "31.8 mAP (Table 5)"),
    "detect/k400_large_finetuned": recipe("labels ava L", 2.5e-4, "finetune/k400_large", "37.0 mAP (Table 5)"),
    "detect/k400_huge_finetuned": recipe("labels ava H", 2.5e-4, "finetune/k400_huge", "39.5 mAP (Table 5)"),
    "detect/k700_large_finetuned": recipe("labels ava L", 2.5e-4, "finetune/k700_large", "39.3 mAP (Table 5)"),
    "detect/authors": recipe("ava B", 1.25e-4, "pretrain/k400_base", others=AUTHORS),
    "detect/toy": recipe("ava B", 1e-3, "pretrain/toy", others=TOY_DETECT),
    "baselines/k400_base": recipe(
        "k400 B",
        2.4e-3,
        "",
        "74.2 % top-1 (Table 2)",
        "62.4 % top-1 on Something-Something V2, 93.2 % on UCF101, 67.9 % on HMDB51 (Table 4)",
        "VideoMAE: 80.0 %, 68.5 %, 96.1 %, 73.3 %",
    ),
    "baselines/ssv2_base": recipe(
        "ssv2 B",
        2.4e-3,
        "",
        "54.2 % top-1 (Tables 2 and 3), with a linear probe 33.7 % (Table 3)",
        "VideoMAE: 69.6 %, 38.9 %",
        "61.7 hours on 64 V100 GPUs, VideoMAE's 800 epochs 19.5 (Table 3)",
    ),
    "baselines/ucf101_base": recipe("ucf101 k400 B", 1.125e-4, "", "81.7 % top-1 (Table 2)", "VideoMAE: 91.3 %"),
    "baselines/hmdb51_base": recipe("hmdb51 k400 B", 1.125e-4, "", "39.2 % top-1 (Table 2)", "VideoMAE: 62.6 %"),
    "baselines/toy": recipe("k400 B", 1e-3, "", others=TOY_MOCO_V3),
}
# These give every key but those of `run`.
COMPLETE = ("pretrain/k400_base", "finetune/k400_base", "probe/ssv2_base", "detect/k400_base", "baselines/k400_base")
NOT_MADE_HERE = ("scratch", "pytorch_model.bin")


def load(name: str) -> SimpleNamespace:
    return load_config(CONFIGS / name.split("/")[0] / "toy.yaml", [str(CONFIGS / f"{name}.yaml")])


def schema(stage: str) -> dict[str, str]:
    return read_yaml(CONFIGS / stage / "toy.yaml")


def header(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = (CONFIGS / f"{name}.yaml").read_text("utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: [line.startswith("#") for line in lines].index(False)])


def entry(value: Any, columns: list[str]) -> Any:
    """A table's value in the given columns, None if the table does not have them; "" is the column of all others."""
    while isinstance(value, dict):
        column = next((column for column in (*columns, "") if column in value), None)
        value = None if column is None else value[column]
    return value


def in_the_paper(name: str) -> dict[str, Any]:
    """What the tables say about a recipe, by key. Later tables count more."""
    stage, columns = name.split("/")[0], RECIPES[name].columns
    values = {}
    for table in TABLES[stage]:
        found = {key: entry(value, columns) for key, value in table.items() if key in schema(stage)}
        values |= {key: value for key, value in found.items() if value is not None}
    return values


def here(name: str) -> dict[str, Any]:
    """What a recipe is to load to, without `run`."""
    recipe = RECIPES[name]
    init = {"init": recipe.init if recipe.init in NOT_MADE_HERE else f"runs/{recipe.init}/checkpoint.pt"}
    deviations = {key: value for pattern, key, value, _ in DEVIATIONS if fnmatch(name, pattern)}
    return in_the_paper(name) | (init if recipe.init else {}) | deviations | recipe.others


each_recipe = pytest.mark.parametrize("name", RECIPES)


def test_every_recipe_stands_in_the_table():
    files = {f"{stage}/{path.stem}" for stage in STAGES for path in (CONFIGS / stage).glob("*.yaml")}
    assert files == RECIPES.keys()


@each_recipe
def test_every_value_is_the_papers_or_a_named_deviation(name):
    values = flatten(as_dict(load(name)))
    assert {key: value for key, value in values.items() if not key.startswith("run.")} == here(name)
    assert values["optim.base_lr"] * values["optim.batch_size"] / 256 == pytest.approx(RECIPES[name].peak)


@each_recipe
def test_what_stands_under_run_changes_no_result(name):
    """Each recipe has its own folder; the paper's batch can be split among its GPUs, and into equal micro-batches."""
    config = load(name)
    assert config.run.folder == f"runs/{name}" and config.run.seed == 0
    assert (config.run.precision, config.run.compile, config.run.profile) == ("auto", "auto", False)
    of_each = 2 if hasattr(config, "moco") else getattr(config.data, "repeats", 1)  # clips of a video
    videos, rest = divmod(config.run.batch_per_device, of_each)
    assert rest == 0 and config.optim.batch_size % min(videos, config.optim.batch_size) == 0
    if "optim.batch_size" not in RECIPES[name].others:
        assert config.optim.batch_size % entry(GPUS, RECIPES[name].columns) == 0


@pytest.mark.parametrize("pattern, key, value, reason", DEVIATIONS)
def test_every_deviation_deviates(pattern, key, value, reason):
    """From the paper, in some recipe: otherwise it has to be deleted from the table."""
    names = [name for name in RECIPES if fnmatch(name, pattern)]
    assert reason and any(in_the_paper(name)[key] != value for name in names)


def test_the_tables_name_only_keys_that_exist():
    known = set().union(*map(schema, STAGES))
    assert {key for tables in TABLES.values() for table in tables for key in table} <= known
    assert all(recipe.others.keys() <= schema(name.split("/")[0]).keys() for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.init])
def test_weights_to_start_from_are_made_by_another_recipe(name):
    """Of the same size and cubes, and of the clips that `pretrained_clip` states."""
    config, init = load(name), RECIPES[name].init
    if init not in NOT_MADE_HERE:
        weights = load(init)
        assert (config.model.size, config.model.cube) == (weights.model.size, weights.model.cube)
        assert config.model.pretrained_clip == [weights.data.frames, weights.data.size, weights.data.size]


@each_recipe
def test_mixing_has_partners(name):
    """A batch on one device holds at least two videos: otherwise every clip would be mixed with its own copy."""
    config = load(name)
    if getattr(config.optim, "mixup", 0) or getattr(config.optim, "cutmix", 0):
        assert config.run.batch_per_device // config.data.repeats >= 2


def clip_size(config: SimpleNamespace) -> tuple[int, int, int]:
    return config.data.frames, config.data.size, config.data.size


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("pretrain/")])
def test_every_model_for_pretraining_builds(name):
    config = load(name)
    depth, cube = config.model.decoder_depth, config.model.cube
    with torch.device("meta"):
        model = VideoMAE(**SIZES[config.model.size], decoder_depth=depth, clip_size=clip_size(config), cube=cube)
    assert len(model.decoder.blocks) == depth
    visible, masked = split(tube_mask(model.grid, config.mask.ratio))
    counts = {(64, 16, 0.75): (16, 48), (64, 8, 0.75): (32, 96), (112, 16, 0.75): (52, 144)}
    counts |= {(224, 16, 0.75): (392, 1176)}
    counts |= {(224, 16, 0.9): (160, 1408)}  # Table 8: 768 x 8 x [196 x (1 - ratio)] are visible
    assert (len(visible), len(masked)) == counts[config.data.size, cube[1], config.mask.ratio]


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("pretrain/", "baselines/"))])
def test_every_classifier_builds_and_is_as_large_as_the_papers(name):
    config = load(name)
    sizes = {key: SIZES[config.model.size][key] for key in ("width", "depth", "heads")}
    with torch.device("meta"):
        model = VideoClassifier(**sizes, classes=400, clip_size=clip_size(config))
    if config.model.size != "tiny":  # the paper's figures for L and H are up to 1 million higher than its architecture
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert abs(millions - PARAMETERS[config.model.size]) < 1


@each_recipe
def test_headers_state_the_papers_results_and_no_others(name):
    text, results = header(name), RECIPES[name].results
    assert all(result in text for result in results), text
    stated = re.findall(r"\d+\.\d (?:% top-\d|%|mAP)", text)
    assert all(any(figure in result for result in results) for figure in stated), stated


@each_recipe
def test_comments_multiply_correctly(name):
    """`base_lr: 1.5e-4  # x 1024 / 256 = 6e-4`."""
    text, config = (CONFIGS / f"{name}.yaml").read_text("utf-8"), load(name)
    comments = re.findall(r"base_lr: (\S+) +# x (\d+) / 256 = (\S+)", text)
    assert len(comments) == (name.split("/")[1] != "toy" and "base_lr:" in text)
    for base, batch, peak in comments:
        assert (float(base), int(batch)) == (config.optim.base_lr, config.optim.batch_size)
        assert float(peak) == pytest.approx(RECIPES[name].peak)


def own_values(path: Path) -> dict[str, Any]:
    """What stands in a file itself, as text, without what its bases say."""
    values = flatten(yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader))
    values.pop("base", None)
    return values


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - set(COMPLETE)))
def test_a_recipe_names_only_what_differs_from_its_bases(name):
    path, inherited = CONFIGS / f"{name}.yaml", {}
    bases = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader).get("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        inherited |= read_yaml(path.parent / base)
    assert not {key for key, value in own_values(path).items() if inherited.get(key) == value}


@pytest.mark.parametrize("name", COMPLETE)
def test_these_recipes_show_everything_that_the_paper_says(name):
    expected = {key for key in schema(name.split("/")[0]) if not key.startswith("run.")}
    assert expected <= own_values(CONFIGS / f"{name}.yaml").keys()


def test_every_variation_is_written_once_for_several_recipes():
    for path in CONFIGS.glob("*/variations/*.yaml"):
        files = [recipe.read_text("utf-8") for recipe in path.parents[1].glob("*.yaml")]
        assert sum(f"variations/{path.name}" in text for text in files) > 1, path
        assert own_values(path).keys() <= schema(path.parents[1].name).keys()


def test_no_line_is_too_long_and_every_file_has_a_header():
    for stage in STAGES:
        for path in (CONFIGS / stage).rglob("*.yaml"):
            lines = path.read_text("utf-8").splitlines()
            assert max(map(len, lines)) <= 120 and lines[0].startswith("# "), path
