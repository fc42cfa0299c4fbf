"""Action detection on AVA v2.2 (Sec. 4.3, Tables 5 and 12): which of 80 actions does each person do, once a second of a movie?

    laptop:   torchrun detect_ava.py                        # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 detect_ava.py configs/detect/k400_base.yaml data.root=/data/ava init=pretrained.pt
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 detect_ava.py ...
    test:     torchrun --nproc_per_node=8 detect_ava.py --test --weights runs/detect/k400_base/checkpoint.pt
    predict:  python detect_ava.py --predict VIDEO --boxes PERSONS.csv --weights runs/detect/toy/checkpoint.pt
    evaluate: python detect_ava.py --evaluate DETECTIONS.csv --ground-truth ava_val_v2.2.csv \\
                  --exclude ava_val_excluded_timestamps_v2.2.csv --labels ava_action_list_v2.2_for_activitynet_2019.pbtxt

AVA labels one frame of every second, the key frame: a box for each person and, for each box, all that the person does
(one pose, and objects handled and persons dealt with, if any). A network sees a clip around the key frame. Where the
persons are is given: by people for training, by a detector of persons for testing.

From a detected box to its 80 scores, in the order of this file:

    read_person_boxes   a row video,second,x1,y1,x2,y2,,score of the detector, kept if the score is at least 0.8
    read_clip           16 frames around that second of the movie, 4 apart
    TestClips           frames with a short side of 256 pixels, and the box in these pixels (KeyFrameClips: training, cropped)
    ActionDetector      tokens; mean over time; RoIAlign of the box, 7 x 7; maximum; linear: 80 logits
    detect              sigmoid: 80 probabilities; times the detector's score if data.person_score is set
    write_rows          a row video,second,x1,y1,x2,y2,action,score of detections.csv for each action that is evaluated
    average_precisions  what such rows are worth: frame-mAP at IoU 0.5

The same command again goes on from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
from finetune import check_init, encoder_options, parameter_groups
from model import (
    Encoder,
    cube_grid,
    recompute_blocks,
    truncated_normal,
)
from support import toy
from support.ava import (
    ACTIONS,
    Action,
    Frame,
    KeyFrame,
    Row,
    average_precisions,
    key_frames,
    list_movies,
    movie_size,
    read_actions,
    read_detections,
    read_exclusions,
    read_ground_truth,
    read_person_boxes,
    show,
    summarize,
    to_rows,
    write_rows,
)
from support.config import UserError, as_dict, load_config, parse
from support.pictures import draw_persons
from support.run import (
    Progress,
    gather,
    launch,
    numerics,
    open_folder,
    pick_below,
    position,
    sample_generator,
    save_checkpoint,
    say,
    share_batch,
    start_processes,
    warmup_cosine,
)
from support.video import (
    BrokenVideo,
    Video,
    read_clip,
    write_mp4,
)
from support.weights import (
    build_from,
    load_weights,
    read_checkpoint,
    read_options,
)

CONFIGS = Path(__file__).parent / "configs" / "detect"
DEFAULT = CONFIGS / "toy.yaml"


@dataclass
class TestSet:
    """What a model is tested on."""

    movies: dict[str, Path]
    persons: list[KeyFrame]  # boxes that a detector found, as key frames without labels
    ground_truth: list[Row]
    actions: dict[int, Action]  # those evaluated
    excluded: set[Frame]


# ---- boxes in pixels: they go with the frames through every change of the picture ----
# A corner is a point, not a pixel: x runs from 0 at the left edge of a frame to its width at the right edge.


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (M, 4) in fractions of a frame to pixels."""
    return boxes * boxes.new_tensor([width, height, width, height])


def resize_short_side(frames: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Frames (T, 3, H, W), and boxes (M, 4) with them, resized so that the shorter side has `size` pixels."""
    resized = TF.resize(frames, [size], antialias=True)
    scale_y, scale_x = (new / old for new, old in zip(resized.shape[-2:], frames.shape[-2:]))  # rounded, so not quite the same
    return resized, boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def crop(frames: Tensor, boxes: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A window of the frames. Boxes are clamped to it; one that lies wholly outside has no area left."""
    moved = boxes - boxes.new_tensor([left, top, left, top])
    return frames[..., top : top + height, left : left + width], clamp_boxes(moved, height, width)


def flip(frames: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Frames and boxes with left and right exchanged."""
    width = frames.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(1)
    return frames.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=1)


def clamp_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (M, 4) clamped to the frame."""
    return boxes.clamp(boxes.new_zeros(4), boxes.new_tensor([width, height, width, height]))


def pad(clip: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """A clip (..., H, W) whose H and W are made whole numbers of cubes: with zeros, after `data.normalize` the mean colour.

    They are added on the right and below, so boxes in pixels stay as they are.
    """
    return F.pad(clip, (0, -clip.shape[-1] % cube[2], 0, -clip.shape[-2] % cube[1]))


def jitter_boxes(
    boxes: Tensor, generator: torch.Generator, outward: tuple[float, float] = (0.2, 0.1), inward: tuple[float, float] = (0.1, 0.05)
) -> Tensor:
    """Each edge moved on its own, uniformly between `inward` and `outward`, fractions of the box's (width, height).

    In the authors' training, not in the paper.
    """
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (M, 4) width, height, width, height
    outward, inward = boxes.new_tensor(outward * 2), boxes.new_tensor(inward * 2)
    shift = torch.rand(boxes.shape, generator=generator, dtype=boxes.dtype) * (outward + inward) - inward  # outward is positive
    return boxes + shift * extent * boxes.new_tensor([-1, -1, 1, 1])


def enlarge_boxes(boxes: Tensor, by: tuple[float, float] = (0.1, 0.05)) -> Tensor:
    """Boxes made wider and higher by fractions of their (width, height), half on either side.

    The authors' code pools from these in testing, the paper does not say so.
    """
    half = (boxes[:, 2:] - boxes[:, :2]) * boxes.new_tensor(by) / 2  # (M, 2)
    return boxes + torch.cat([-half, half], dim=1)


def jitter_colours(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames uint8 (T, 3, H, W) with hue, saturation and value moved by up to 10 of 180, 26 and 26 of 255, the same in all.

    In the authors' training, not in the paper.
    """
    hue, saturation, value = ((2 * torch.rand(3, generator=generator) - 1) * torch.tensor([10 / 180, 26 / 255, 26 / 255])).tolist()
    frames = TF.adjust_hue(frames, hue).float() / 255  # (T, 3, H, W)
    low, high = frames.amin(dim=1, keepdim=True), frames.amax(dim=1, keepdim=True)  # (T, 1, H, W); HSV's value is `high`,
    spread = (high - low).clamp(min=1e-6)  # its saturation spread / high,
    away = (high - frames) / spread  # (T, 3, H, W) and its hue this: 0 for the strongest channel, 1 for the weakest
    saturated = (spread / high.clamp(min=1e-6) + saturation).clamp(0, 1)
    return ((high + value).clamp(0, 1) * (1 - saturated * away) * 255).round().byte()


# ---- training clips and test clips (Sec. B) ----


def resized_clip(frame: KeyFrame, movies: dict[str, Path], settings: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The clip around a key frame, uint8 (T, 3, H, W), its short side 256 in the paper (Sec. B), and boxes (M, 4) in its pixels."""
    s = settings
    clip = read_clip(movies[frame.video], frame.second, frames=s.frames, stride=s.stride, rate=s.rate, starts_at=s.starts_at)
    return resize_short_side(clip, to_pixels(frame.boxes.float(), *clip.shape[-2:]), s.short_side)


class KeyFrameClips(data.TrainingVideos):
    """Random crops around labelled key frames: uint8 (T, 3, size, size), boxes (M, 4) in pixels, labels (M, classes). Sec. B."""

    def __init__(self, frames: list[KeyFrame], movies: dict[str, Path], settings: SimpleNamespace, seed: int) -> None:
        super().__init__(frames, seed)
        self.movies, self.settings = movies, settings

    def sample(self, frame: KeyFrame, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        s = self.settings
        clip, boxes = resized_clip(frame, self.movies, s)  # (T, 3, H, W), (M, 4)
        if s.jitter_boxes:
            boxes = jitter_boxes(boxes, generator)
        top, left = (pick_below(side - s.size + 1, generator) for side in clip.shape[-2:])
        # Persons outside the crop stay, as boxes without area at its edge, as in the authors' code.
        clip, boxes = crop(clip, boxes, top, left, s.size, s.size)  # (T, 3, size, size)
        if s.flip and pick_below(2, generator):
            clip, boxes = flip(clip, boxes)
        if s.jitter_colours:
            clip = jitter_colours(clip, generator)
        return clip.contiguous(), boxes, frame.labels


def to_rois(boxes: list[Tensor]) -> Tensor:
    """Boxes of each clip, (M_i, 4) in pixels, as one tensor (M, 5) whose first column is the clip's index in the batch."""
    return torch.cat([F.pad(of_clip, (1, 0), value=index) for index, of_clip in enumerate(boxes)])


def collate(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Clips (B, T, 3, H, W), their persons' boxes (M, 5), see `to_rois`, labels (M, classes), reports of broken videos."""
    clips, boxes, labels, broken = zip(*samples)
    return torch.stack(clips), to_rois(boxes), torch.cat(labels), sum(broken, [])


class TestClips(Dataset):
    """Whole frames around key frames: index, uint8 (T, 3, H, W), boxes (M, 4) in pixels, ""; or index, None, None and why not."""

    def __init__(self, frames: list[KeyFrame], movies: dict[str, Path], settings: SimpleNamespace) -> None:
        self.frames, self.movies, self.settings = frames, movies, settings

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Tensor | None, str]:
        frame = self.frames[index]
        if frame.video not in self.movies:
            return index, None, None, f"movie {frame.video} is missing"
        try:
            clip, boxes = resized_clip(frame, self.movies, self.settings)  # (T, 3, H, W), (M, 4)
        except BrokenVideo as error:
            return index, None, None, str(error)
        if self.settings.widen_boxes:
            boxes = enlarge_boxes(boxes)
        return index, clip, clamp_boxes(boxes, *clip.shape[-2:]), ""


def collate_test(items: list[tuple]) -> tuple[list[int], Tensor | None, Tensor | None, list[str]]:
    """Indices, clips (B, T, 3, H, W) and boxes (M, 5) of what can be read, None without any; reasons of the rest."""
    readable = [item for item in items if item[1] is not None]
    reasons = [reason for _, clip, _, reason in items if clip is None]
    if not readable:
        return [], None, None, reasons
    indices, clips, boxes, _ = zip(*readable)
    return list(indices), torch.stack(clips), to_rois(boxes), reasons


def batches_by_movie(frames: list[KeyFrame], at_most: int) -> list[list[int]]:
    """Indices of key frames in batches of one movie each, whose frames are all of one size."""
    batches: list[list[int]] = []
    for index, frame in enumerate(frames):
        if batches and len(batches[-1]) < at_most and frames[batches[-1][0]].video == frame.video:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---- the model (Sec. B: "the action detection architecture in SlowFast") ----


class ActionDetector(nn.Module):
    """Encoder, mean over time, RoIAlign of each person's box, maximum over its 7 x 7 cells, linear.

    Unlike a classifier's, the encoder keeps its last norm; fine-tuned weights have none, then it starts at 1 and 0.
    clip_size: that of the pre-training, to which the position table belongs; clips may have other sizes.
    """

    discards = ("encoder_to_decoder.", "mask_token", "decoder", "cls_token", "pre_logits.", "fc_norm.")

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        clip_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        # What it takes to build this model again; checkpoints carry it.
        self.options = dict(width=width, depth=depth, heads=heads, classes=classes, clip_size=list(clip_size), cube=list(cube), eps=eps)
        encoder = dict(width=width, depth=depth, heads=heads, clip_size=clip_size, cube=cube, eps=eps)
        self.encoder = Encoder(**encoder, norm=True, drop_path=drop_path)
        self.head = nn.Linear(width, classes)
        self.apply(truncated_normal)

    def forward(self, clip: Tensor, rois: Tensor) -> Tensor:
        """clip (B, 3, T, H, W), normalised, and rois (M, 5), each a clip's index and a box in pixels, to logits (M, classes)."""
        cube = self.encoder.patch_embed.cube
        time, height, _ = cube_grid(clip.shape[2:], cube)
        x = self.encoder(clip)  # (B, T/2 H/16 W/16, D)
        x = rearrange(x, "B (t h w) D -> t B D h w", t=time, h=height).mean(dim=0)  # (B, D, H/16, W/16)
        # As in SlowFast and the authors' code: no shift by half a cube (aligned), more samples in larger boxes (sampling_ratio).
        x = roi_align(x.float(), rois, output_size=7, spatial_scale=1 / cube[1], sampling_ratio=0, aligned=False)  # (M, D, 7, 7)
        x = x.amax(dim=(2, 3))  # (M, D)
        return self.head(x)  # (M, classes)


def detection_loss(logits: Tensor, labels: Tensor, clips: int) -> Tensor:
    """Binary cross-entropy of (M, classes): the mean over actions, the sum over persons, divided by the number of clips.

    So every person weighs the same, however many there are in a clip and whichever process sees it. The authors' code
    multiplies the mean by the number of persons, which differs by a constant that AdamW does not notice.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / (labels.shape[1] * clips)


def build(config: SimpleNamespace, labels: Tensor) -> ActionDetector:
    """The detector, initialised as `init` says: "scratch" or the file of any weights that `model.load_weights` reads.

    labels (M, classes): of all persons to train on. The head starts at each action's frequency: from one half its bias would
    creep for thousands of steps while features are bent to make up for it. Neither the paper nor its code does so.
    """
    torch.manual_seed(config.run.seed)
    model = ActionDetector(**encoder_options(config), classes=config.data.actions, drop_path=config.model.drop_path)
    say(f"initialised from {config.init}")
    if config.init != "scratch":
        load_weights(model, config.init, fresh=("encoder.norm.", "head."))
    with torch.no_grad():
        model.head.bias.copy_(((labels.sum(dim=0) + 0.5) / (len(labels) + 1)).logit())  # never quite 0 or 1
    return model


def build_detector(path: Path, clip_size: tuple[int, int, int]) -> ActionDetector:
    """The detector that a checkpoint holds, with its weights; for `clip_size` see `model.read_options`."""
    return build_from(ActionDetector, "classes", "a checkpoint of action detection, with its actions", path, clip_size)


# ---- test: whole frames, short side 256, detected persons with a score of at least 0.8 (Sec. B) ----


@torch.inference_mode()
def detect(
    model: ActionDetector, persons: list[KeyFrame], movies: dict[str, Path], config: SimpleNamespace, title: str
) -> tuple[list[KeyFrame], list[str]]:
    """`persons` with the probabilities of all actions as labels, for every process, and why some key frames could not be read."""
    device = next(model.parameters()).device
    bf16, _ = numerics(config.run)
    rank, world_size = position()
    share = batches_by_movie(persons, config.run.batch_per_device)[rank::world_size]
    batches = data.loader(TestClips(persons, movies, config.data), config.data.workers, batch_sampler=share, collate_fn=collate_test)
    model.eval()
    found, broken = [], []
    with tqdm(total=sum(map(len, share)), desc=title, unit="frame", disable=rank > 0) as bar:
        for indices, clip, rois, reasons in batches:
            broken += reasons
            if clip is not None:
                clip = data.normalize(clip.to(device, non_blocking=True), config.data.mean, config.data.std)  # (B, 3, T, H, W)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = model(pad(clip, model.options["cube"]), rois.to(device, non_blocking=True))  # (M, classes)
                found.append((indices, logits.float().sigmoid()))
            bar.update(len(indices) + len(reasons))
    predictions = []
    for indices, probabilities in gather([(indices, probabilities.cpu()) for indices, probabilities in found]):
        asked = [persons[index] for index in indices]
        for frame, labels in zip(asked, probabilities.split([len(frame.boxes) for frame in asked])):  # (M, classes)
            if config.data.person_score:
                labels = labels * frame.scores[:, None].float()
            predictions.append(replace(frame, labels=labels))
    predictions.sort(key=lambda frame: (frame.video, frame.second))
    return predictions, sorted(set(gather(broken)))


def test(model: ActionDetector, test_set: TestSet, config: SimpleNamespace, title: str) -> tuple[list[KeyFrame], dict, list[str]]:
    """Predictions, what they are worth as `summarize` says it, and why some key frames could not be read.

    A key frame that cannot be read has no detections; its ground truth still counts.
    """
    predictions, broken = detect(model, test_set.persons, test_set.movies, config, title)
    if not predictions:
        raise UserError(f"none of the {len(test_set.persons)} key frames with persons can be read; the first reason: {broken[0]}")
    evaluated = torch.zeros(model.options["classes"])  # (classes,) 1 for the actions that count
    evaluated[[action - 1 for action in test_set.actions]] = 1
    for frame in predictions:
        frame.labels = frame.labels * evaluated
    precisions = average_precisions(test_set.ground_truth, to_rows(predictions), test_set.actions, test_set.excluded)
    return predictions, summarize(precisions, test_set.actions), broken


def test_and_write(model: ActionDetector, test_set: TestSet, config: SimpleNamespace, folder: Path) -> float:
    """The paper's test of a model: prints and returns mAP, writes detections.csv, mAP.json and pictures into `folder`."""
    predictions, summary, broken = test(model, test_set, config, "testing")
    if position()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "detections.csv", to_rows(predictions))
        (folder / "mAP.json").write_text(json.dumps(summary, indent=1) + "\n")
        for reason in broken:
            say(f"no detections: {reason}")
        draw_key_frames(predictions, test_set, config, folder / "pictures")
        show(summary)
        persons = sum(len(frame.boxes) for frame in predictions)
        print(f"{persons:,} persons in {len(predictions):,} frames: {folder / 'detections.csv'}", flush=True)
    return summary["mAP"]


# ---- clips to train on, and what a model is tested on ----


def find_root(config: SimpleNamespace, world_size: int) -> Path:
    """`data.root` of a configuration; the toy videos, rendered if need be, without one."""
    return Path(config.data.root or toy.on_first_use(toy.render_ava, toy.AVA_FOLDER, world_size))


def find_training(config: SimpleNamespace, root: Path) -> tuple[list[KeyFrame], dict[str, Path]]:
    """Labelled key frames to train on, without those excluded or of missing movies, and all movies."""
    movies = list_movies(root / config.data.movies)
    frames = key_frames(read_ground_truth(root / config.data.train, config.data.actions), config.data.actions)
    excluded = read_exclusions(root / config.data.train_exclude) if config.data.train_exclude else set()
    frames = [frame for frame in frames if (frame.video, frame.second) not in excluded]
    named = {frame.video for frame in frames}
    missing = sorted(named - movies.keys())
    if missing:
        where = root / config.data.movies
        say(f"{len(missing)} of {len(named)} movies for training are not in {where} and left out: {', '.join(missing)}")
    frames = [frame for frame in frames if frame.video in movies]
    if not frames:
        raise UserError(f"{root / config.data.movies} holds none of the movies that {root / config.data.train} names; look at data.movies")
    return frames, movies


def find_test(config: SimpleNamespace, root: Path) -> TestSet:
    movies = list_movies(root / config.data.movies)
    actions = read_actions(root / config.data.labels)
    if max(actions) > config.data.actions:
        raise UserError(f"{root / config.data.labels} lists action {max(actions)}, more than data.actions={config.data.actions}")
    excluded = read_exclusions(root / config.data.val_exclude) if config.data.val_exclude else set()
    ground_truth = read_ground_truth(root / config.data.val, config.data.actions)
    persons = find_persons(root / config.data.boxes, config, root, movies)
    tested = [frame for frame in persons if (frame.video, frame.second) not in excluded]
    if not tested:
        raise UserError(f"{root / config.data.val_exclude} leaves out all {len(persons)} key frames with persons: nothing is left to test")
    return TestSet(movies, tested, ground_truth, actions, excluded)


def find_persons(path: Path, config: SimpleNamespace, root: Path, movies: dict[str, Path]) -> list[KeyFrame]:
    """Boxes that a detector found, from a file of any form that `read_person_boxes` reads."""
    if path.suffix != ".json":
        return read_person_boxes(path, config.data.threshold)
    sizes = {}
    for video, movie in movies.items():
        try:
            sizes[video] = movie_size(movie)
        except BrokenVideo as error:
            say(f"its boxes are left out: {error}")
    return read_person_boxes(path, config.data.threshold, root / config.data.file_list, sizes)


# ---- training (Table 12) ----


def check(config: SimpleNamespace) -> None:
    """Most mistakes in a configuration are found here, before any work."""
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    if config.data.size > config.data.short_side:
        frames = f"frames whose short side is data.short_side={config.data.short_side}"
        raise UserError(f"data.size={config.data.size} cannot be cropped from {frames}")


def train(config: SimpleNamespace) -> None:
    """Run, or go on with, the experiment that `config` describes; test it at the end."""
    check(config)
    check_init(config.init, "scratch")
    bf16, compiled = numerics(config.run)
    rank, world_size, device = start_processes(config.data.workers)
    chief = rank == 0
    root = find_root(config, world_size)
    frames, movies = find_training(config, root)
    test_set = find_test(config, root)
    model = build(config, torch.cat([frame.labels for frame in frames])).to(device)  # labels: (M, classes)
    if config.run.recompute:
        recompute_blocks(model)
    clips = KeyFrameClips(frames, movies, config.data, config.run.seed)
    clips[0, 0]  # stops here if no movie can be read

    batch_size = config.optim.batch_size
    per_device, accumulation = share_batch(batch_size, len(frames), world_size, config.run.batch_per_device)
    steps_per_epoch = len(frames) // batch_size
    steps, warmup = config.optim.epochs * steps_per_epoch, config.optim.warmup_epochs * steps_per_epoch
    peak_lr, end_lr = config.optim.base_lr * batch_size / 256, config.optim.min_lr * batch_size / 256  # Sec. B

    groups = parameter_groups(model, config.optim.layer_decay, config.optim.weight_decay)  # Table 12
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    folder, checkpoint = open_folder(config)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    persons, detected = (sum(len(frame.boxes) for frame in of_set) for of_set in (frames, test_set.persons))
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters, on {world_size} x {device.type}\n"
        f"{len(frames):,} key frames for training with {persons:,} persons, {len(test_set.persons):,} for testing "
        f"with {detected:,} detected, {len(test_set.actions)} of {config.data.actions} actions evaluated\n"
        f"clips of {config.data.frames} frames, {config.data.size} x {config.data.size} pixels in training, "
        f"short side {config.data.short_side} in testing\n"
        f"batch {batch_size} = {world_size} processes x {accumulation} accumulated x {per_device} clips; "
        f"learning rate {config.optim.base_lr:g} x {batch_size} / 256 = {peak_lr:.4g}, "
        f"times {groups[0]['lr_scale']:.3g} in the cube embedding\n"
        f"{steps:,} steps = {config.optim.epochs} epochs x {steps_per_epoch:,}; starting at step {start:,}"
    )

    predict = torch.compile(model) if compiled else model
    if world_size > 1:
        predict = DistributedDataParallel(predict, gradient_as_bucket_view=True, broadcast_buffers=False)
    size = dict(batch_size=batch_size, per_device=per_device)
    batches = data.training_batches(clips, config.data.workers, **size, start=start, steps=steps, collate_fn=collate)
    progress = Progress(config.run, start, steps, batch_size, device)

    model.train()
    for step in progress:
        learning_rate = warmup_cosine(step, steps, warmup, peak_lr, end_lr)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        for piece in range(accumulation):
            *tensors, broken = progress.next(batches)
            progress.report(broken)
            clip, rois, labels = (x.to(device, non_blocking=True) for x in tensors)  # (B, T, 3, H, W), (M, 5), (M, classes)
            clip = data.normalize(clip, config.data.mean, config.data.std)  # (B, 3, T, H, W)
            # Drop path: a function of the step, so that a resumed run repeats it.
            torch.manual_seed(pick_below(2**62, sample_generator(config.run.seed, step * accumulation + piece, -2 - rank)))
            with predict.no_sync() if world_size > 1 and piece < accumulation - 1 else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = predict(clip, rois)  # (M, classes)
                loss = detection_loss(logits, labels, len(clip))
                (loss / accumulation).backward()
            progress.add(loss)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        progress.done(done, epoch=round(done / steps_per_epoch, 4), lr=learning_rate)
        if done % config.run.checkpoint_every == 0 or done == steps:
            progress.flush()
            progress.gather_broken()
            if chief:
                names = {number: action.name for number, action in test_set.actions.items()}
                # `positions` are no parameter and usually computed, but those of image weights are not
                content = dict(model=model.state_dict(), model_options=model.options, positions=model.encoder.pos_embed, actions=names)
                state = dict(optimizer=optimizer.state_dict(), step=done, config=as_dict(config))
                save_checkpoint(folder / "checkpoint.pt", **content, **state)
        if config.run.validate_every and done % (config.run.validate_every * steps_per_epoch) == 0 and done < steps:
            progress.flush()
            epoch = done // steps_per_epoch
            _, summary, _ = test(model, test_set, config, f"epoch {epoch}")
            if chief:
                progress.log.write(step=done, epoch=epoch, mAP=summary["mAP"])
            say(f"epoch {epoch}: mAP {summary['mAP']:.2f}")
            model.train()

    if progress.broken:
        say(f"{len(progress.broken)} key frames that could not be read were replaced by others: {folder / 'broken_videos.txt'}")
    mean_ap = test_and_write(model, test_set, config, folder)
    if chief:
        progress.log.write(step=steps, test_mAP=mean_ap)


def draw_key_frames(predictions: list[KeyFrame], test_set: TestSet, config: SimpleNamespace, folder: Path) -> None:
    """`run.pictures` of the key frames, evenly chosen: on the left what was detected, on the right the ground truth."""
    s, names = config.data, {number: action.name for number, action in test_set.actions.items()}
    truth = {(frame.video, frame.second): frame for frame in key_frames(test_set.ground_truth, s.actions)}
    for index in torch.linspace(0, len(predictions) - 1, min(config.run.pictures, len(predictions))).long().tolist():
        frame = predictions[index]
        clip = read_clip(test_set.movies[frame.video], frame.second, frames=2, stride=1, rate=s.rate, starts_at=s.starts_at)
        image = clip[1]  # the key frame, (3, H, W)
        left = draw_persons(image, frame, names, "orange")
        right = draw_persons(image, truth.get((frame.video, frame.second)), names, "lime")
        sheet = Image.new("RGB", (2 * left.width + 8, left.height + 20), "white")
        sheet.paste(left, (0, 20))
        sheet.paste(right, (left.width + 8, 20))
        for x, text in ((4, "detected"), (left.width + 12, "ground truth")):
            ImageDraw.Draw(sheet).text((x, 2), f"{text}, {frame.video}, second {frame.second}", "black", ImageFont.load_default(13))
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"{frame.video}_{frame.second:04d}.png")


def annotated(movie: Video, predictions: list[KeyFrame], names: dict[int, str], starts_at: int) -> Iterator[Tensor]:
    """All frames of a video, uint8 (3, H, W), H and W even, each with the persons and actions of the nearest second."""
    by_second = {frame.second: frame for frame in predictions}
    for time, image in zip(movie.times, movie.every_frame()):
        picture = TF.pil_to_tensor(draw_persons(image, by_second.get(round(time) + starts_at), names, "orange"))  # (3, H, W)
        yield picture[:, : picture.shape[1] // 2 * 2, : picture.shape[2] // 2 * 2]


# ---- testing, predicting and evaluating what comes from anywhere ----


def stored_config(weights: Path, settings: list[str]) -> SimpleNamespace:
    """The configuration for weights: a .yaml file if given, else the checkpoint's own, or the ViT-B recipe if it has none."""
    if "classes" not in read_options(weights):
        raise UserError(f"{weights} is not a checkpoint of action detection: make one with detect_ava.py")
    stored = read_checkpoint(weights)[1].get("config")
    if stored and "actions" not in stored["data"]:
        raise UserError(f"{weights} was trained by another stage: make a checkpoint of action detection with detect_ava.py")
    stored = stored or as_dict(load_config(DEFAULT, [str(CONFIGS / "k400_base.yaml")]))
    config = load_config(DEFAULT, settings, stored)
    check(config)
    return config


def test_weights(arguments: argparse.Namespace) -> None:
    """`--test`: the mAP of any checkpoint of action detection, its detections and pictures beside it or in `--out`."""
    config = stored_config(arguments.weights, arguments.settings)
    _, world_size, device = start_processes(config.data.workers)
    test_set = find_test(config, find_root(config, world_size))
    model = build_detector(arguments.weights, config.model.pretrained_clip).to(device)
    if model.options["classes"] != config.data.actions:
        classes = model.options["classes"]
        raise UserError(f"{arguments.weights} knows {classes} actions, the dataset {config.data.actions}: set data.actions")
    test_and_write(model, test_set, config, arguments.out or arguments.weights.parent)


def predict_video(arguments: argparse.Namespace) -> None:
    """`--predict`: a video as mp4 with the persons' boxes, one set of them a second, and what they do."""
    video, out = arguments.predict, arguments.out or Path("runs/detections") / f"{arguments.predict.stem}.mp4"
    config = stored_config(arguments.weights, arguments.settings)
    device = start_processes(config.data.workers)[2]
    model = build_detector(arguments.weights, config.model.pretrained_clip).to(device)
    names = read_checkpoint(arguments.weights)[1].get("actions", {})
    persons = find_persons(arguments.boxes, config, Path(config.data.root), {video.stem: video})
    mine = [frame for frame in persons if frame.video == video.stem]
    if not mine:
        others = ", ".join(sorted({frame.video for frame in persons})[:3])
        only = f"only of {others}, ...: its first column has to be the name of the file"
        raise UserError(f"{arguments.boxes} has no boxes of video {video.stem}, {only}")
    predictions, broken = detect(model, mine, {video.stem: video}, config, "predicting")
    if position()[0] > 0:
        return
    for reason in broken:
        say(f"no detections: {reason}")
    try:
        with Video(video) as movie:
            out.parent.mkdir(parents=True, exist_ok=True)
            pictures = tqdm(annotated(movie, predictions, names, config.data.starts_at), "drawing", len(movie), unit="frame")
            write_mp4(out, pictures, movie.rate)
    except BrokenVideo as error:
        raise UserError(f"the video cannot be read: {error}") from None
    print(f"{sum(len(frame.boxes) for frame in predictions)} persons in {len(predictions)} key frames: {out}")


def evaluate(arguments: argparse.Namespace) -> None:
    """`--evaluate`: print and write the mAP of a file of detections."""
    if not arguments.ground_truth or not arguments.labels:
        raise UserError("--evaluate needs --ground-truth GT.csv and --labels LIST.pbtxt, both from AVA's annotations")
    actions = read_actions(arguments.labels)
    known = max(ACTIONS, *actions)
    ground_truth, detections = read_ground_truth(arguments.ground_truth, known), read_detections(arguments.evaluate, known)
    excluded = read_exclusions(arguments.exclude) if arguments.exclude else set()
    precisions = average_precisions(
        ground_truth, detections, actions, excluded, skip_frames_without_ground_truth=arguments.skip_frames_without_ground_truth
    )
    if all(map(math.isnan, precisions.values())):
        raise UserError(f"{arguments.ground_truth} holds no row of an action in {arguments.labels} outside excluded frames")
    summary = summarize(precisions, actions)
    frames, true_frames = ({row.frame for row in rows} for rows in (detections, ground_truth))
    print(
        f"{len(detections):,} detections in {len(frames):,} frames, "
        f"{len(frames & true_frames):,} of them among the {len(true_frames):,} with ground truth"
    )
    show(summary)
    if not summary["groups"]:
        print(f"no groups: {arguments.labels} states no label_type")
    if arguments.skip_frames_without_ground_truth:
        print("frames without ground truth left out")
    out = arguments.out or arguments.evaluate.with_name(f"{arguments.evaluate.stem}_mAP.json")
    try:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the result cannot be written to {out}: {error}; name another file with --out") from None
    print(f"written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--test", action="store_true", help="test --weights instead of training")
    add("--predict", type=Path, metavar="VIDEO", help="draw the actions of the persons in --boxes into a copy of this video")
    add(
        "--boxes", type=Path, metavar="FILE",
        help="rows video,second,x1,y1,x2,y2,,score; seconds count from data.starts_at at the start of the file",
    )  # fmt: skip
    add("--weights", type=Path, help="checkpoint of action detection: this project's or the official one")
    add("--evaluate", type=Path, metavar="DETECTIONS.csv", help="evaluate these detections")
    add("--ground-truth", type=Path, metavar="GT.csv", help="AVA's annotations")
    add("--labels", type=Path, metavar="LIST.pbtxt", help="the actions to evaluate")
    add("--exclude", type=Path, metavar="X.csv", help="frames to leave out, video,second")
    add("--skip-frames-without-ground-truth", action="store_true", help="detections there are not counted as wrong; not official")
    add(
        "--out", type=Path,
        help="folder of --test, default that of the weights; file of --predict, default runs/detections/VIDEO.mp4, "
        "and of --evaluate, default DETECTIONS_mAP.json",
    )  # fmt: skip
    arguments = parse(parser)
    if (arguments.test or arguments.predict) and not arguments.weights:
        raise UserError("--test and --predict need --weights FILE, a checkpoint of action detection such as runs/detect/toy/checkpoint.pt")
    if arguments.predict and not arguments.boxes:
        rows = "rows video,second,x1,y1,x2,y2,,score in fractions of width and height"
        raise UserError(f"--predict needs --boxes FILE, where the persons are: {rows}")
    if arguments.weights and not (arguments.test or arguments.predict):
        raise UserError("--weights goes with --test or --predict; training starts from weights with init=FILE")
    if arguments.evaluate:
        evaluate(arguments)
    elif arguments.predict:
        predict_video(arguments)
    elif arguments.test:
        test_weights(arguments)
    else:
        train(load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    launch(main)
