"""Action detection on AVA v2.2 (Sec. 4.3, Tables 5 and 12): which of 80 actions does each person do, once per second?

    laptop:   torchrun detect_ava.py                   # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 detect_ava.py configs/detect/k400_base.yaml data.root=/data/ava init=FILE
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 detect_ava.py ...
    test:     torchrun --nproc_per_node=8 detect_ava.py --test --weights runs/detect/k400_base/checkpoint.pt
    predict:  python detect_ava.py --predict VIDEO --weights runs/detect/toy/checkpoint.pt    # whole frames, or with
              persons, given by --boxes PERSONS.csv or found by --detector WEIGHTS
    evaluate: python detect_ava.py --evaluate DETECTIONS.csv ...    # short for python -m support.ava DETECTIONS.csv ...

AVA labels one frame per second of a movie, the key frame: a box around each person, and all that the person does. The
network sees a clip around it. The boxes are given: by people for training, by a person detector for testing.

From a detected box to its 80 scores, in the order of this file:

    read_person_boxes   (support/ava.py) rows video,second,x1,y1,x2,y2,,score of the detector, 0.8 or higher
    read_clip           16 frames around that second of the movie, 4 apart
    test_batch          frames with a short side of 256 pixels, boxes in their pixels (KeyFrameClips: training, cropped)
    ActionDetector      tokens; mean over time; RoIAlign of the box, 7 x 7; maximum; linear: 80 logits
    detect              sigmoid: 80 probabilities; times the detector's score if data.person_score is set
    write_rows          (support/ava.py) rows video,second,x1,y1,x2,y2,action,score: detections.csv
    average_precisions  (support/ava.py) frame-mAP at IoU 0.5 of such rows

The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
from model import Encoder, checkpoint_activations, cube_grid, initialize_from_scratch, parameter_groups
from support import ava, toy
from support.checkpoint import describe, load_checkpoint, save_checkpoint
from support.config import UserError, load_config, parse, say
from support.datasets import named_videos
from support.persons import (
    KeyFrames,
    Movies,
    Rows,
    TestSet,
    draw_video,
    find_persons,
    find_test,
    find_training,
    load_person_detector,
    nearest,
    persons_each_second,
)
from support.pictures import draw_persons, side_by_side
from support.processes import Processes, StopSignals, average, compiler, gather, launch, start_processes
from support.run import Log, split_batch, warmup_cosine
from support.seeds import random_below, seed_device
from support.video import BrokenVideo
from support.weights import (
    build_from_checkpoint,
    encoder_options,
    load_weights,
    read_checkpoint,
    stored_config,
)

DEFAULT = Path(__file__).parent / "configs" / "detect" / "toy.yaml"


# ---- clips with boxes (Sec. B) ----


def read_clip(path: Path, second: float, options: SimpleNamespace) -> Tensor:
    """The clip around the key frame at `second` of a movie: uint8 (T, 3, H, W). Raises BrokenVideo.

    Time decides, not a frame's number: frames are `stride` frames of a movie of `rate` frames per second apart, and the
    key frame is the first of the second half. Before and after the movie its first and last frame are repeated.
    starts_at: the second of the movie at which its file starts.
    """
    key_time, step = Fraction(str(second)) - options.starts_at, options.stride / Fraction(options.rate)
    wanted = [key_time + (i - options.frames // 2) * step for i in range(options.frames)]
    with ava.open_movie(path, max(wanted[0], 0), max(wanted[-1], 0)) as movie:
        times = movie.times
        if not 0 <= key_time <= times[-1] + Fraction(1, 2):
            where = f"second {second} lies outside, if it starts at second {options.starts_at}"
            raise BrokenVideo(f"{path}: {where}; is the movie cut or whole?")
        return movie.frames([nearest(times, time) for time in wanted])


def resized_clip(frame: ava.Frame, rows: Rows, movies: Movies, options: SimpleNamespace) -> tuple:
    """A key frame's clip uint8 (T, 3, H, W), its short side 256 in the paper, boxes (M, 4) in its pixels, their labels.

    A corner is a point, not a pixel: x runs from 0 at the left edge of a frame to its width at the right edge.
    """
    video, second = frame
    if video not in movies:
        raise BrokenVideo(f"movie {video} is missing")
    clip = read_clip(movies[video], second, options)
    height, width = clip.shape[-2:]
    boxes, labels = ava.to_persons(rows, options.actions)
    boxes = boxes * torch.tensor([width, height] * 2)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    clip = TF.resize(clip, [options.short_side], antialias=False)  # as cv2 resizes in the authors' code
    return clip, TF.resize(boxes, [options.short_side]), labels


def move_edges(boxes: Tensor, outward: Tensor) -> Tensor:
    """Boxes (M, 4), their edges x1 y1 x2 y2 moved outward by fractions, (4,) or (M, 4), of their width or height."""
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + outward * extent * torch.tensor([-1, -1, 1, 1])
    return tv_tensors.wrap(moved, like=boxes)


def jitter_boxes(boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Each edge moved on its own: by up to 0.2 and 0.1 of width and height outward, or half of that inward."""
    most = torch.tensor([0.2, 0.1, 0.2, 0.1])
    return move_edges(boxes, torch.rand(boxes.shape, generator=generator) * 1.5 * most - 0.5 * most)


def jitter_colors(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames uint8 (T, 3, H, W), their hue moved by up to 10 steps of 180, saturation and value by up to 26 of 255."""
    hue, saturation, value = (random_below(2 * most + 1, generator) - most for most in (10, 26, 26))
    shift = torch.tensor([round(hue * 255 / 180), saturation, value])[:, None, None]  # a full turn of hue is 255 in PIL
    hsv = [TF.pil_to_tensor(TF.to_pil_image(frame).convert("HSV")).int() + shift for frame in frames]
    hsv = [torch.cat([frame[:1] % 255, frame[1:].clamp(0, 255)]).byte() for frame in hsv]
    return torch.stack([TF.pil_to_tensor(TF.to_pil_image(frame, "HSV").convert("RGB")) for frame in hsv])


@dataclass(eq=False, kw_only=True)
class KeyFrameClips(data.TrainingVideos):
    """Random crops around labelled key frames: uint8 (T, 3, H, W), boxes (M, 4) in pixels, labels (M, classes)."""

    movies: Movies
    options: SimpleNamespace  # the group `data` of a configuration

    def sample(self, video: tuple[ava.Frame, Rows], generator: torch.Generator) -> tuple[Tensor, ...]:
        options, size = self.options, self.options.size
        clip, boxes, labels = resized_clip(*video, self.movies, options)
        top, left = (random_below(side - size + 1, generator) for side in clip.shape[-2:])
        # Persons outside the crop stay, as boxes without area at its edge, as in the authors' code.
        clip, boxes = (TF.crop(item, top, left, size, size) for item in (clip, boxes))  # (T, 3, H, W), (M, 4)
        if options.flip and random_below(2, generator):
            clip, boxes = TF.horizontal_flip(clip), TF.horizontal_flip(boxes)
        if options.jitter_boxes:
            boxes = TF.clamp_bounding_boxes(jitter_boxes(boxes, generator))
        if options.jitter_colours:
            clip = jitter_colors(clip, generator)
        return clip.contiguous(), boxes.as_subclass(Tensor), labels


def to_rois(boxes: list[Tensor]) -> Tensor:
    """Boxes of each clip, (M_i, 4), as one tensor (M, 5) whose first column is the clip's index in the batch."""
    return torch.cat([F.pad(of_clip, (1, 0), value=index) for index, of_clip in enumerate(boxes)])


def collate(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Clips (B, T, 3, H, W), boxes (M, 5) as `to_rois` has them, labels (M, classes), reports of broken videos."""
    clips, boxes, labels, broken = zip(*samples, strict=True)
    return default_collate(clips), to_rois(boxes), torch.cat(labels), sum(broken, [])


def test_batch(key_frames: list[tuple], movies: Movies, options: SimpleNamespace) -> tuple:
    """Whole frames around key frames of one movie, whose frames have one size.

    Returns the detector's score of each person (frame, box); clips uint8 (B, T, 3, H, W) and boxes (M, 5) as `to_rois`
    has them, None if no clip can be read; and why key frames could not be read.
    """
    persons, clips, boxes, broken = {}, [], [], []
    outward = torch.tensor([0.05, 0.025, 0.05, 0.025]) * options.widen_boxes
    for frame, rows in key_frames:
        try:
            clip, of_clip, _ = resized_clip(frame, rows, movies, options)
        except BrokenVideo as error:
            broken.append(str(error))
            continue
        clips.append(clip)
        boxes.append(TF.clamp_bounding_boxes(move_edges(of_clip, outward)))
        persons |= {(row.frame, row.box): row.score for row in rows}
    return persons, torch.stack(clips) if clips else None, to_rois(boxes) if clips else None, broken


# ---- the model (Sec. B: "the action detection architecture in SlowFast") ----


class ActionDetector(nn.Module):
    """Encoder, mean over time, RoIAlign of each person's box, maximum over its 7 x 7 cells, linear.

    Unlike a classifier's, the encoder keeps its last norm. Fine-tuned weights have none: then it starts at 1 and 0.
    """

    def __init__(self, *, classes: int, **encoder: Any) -> None:
        super().__init__()
        self.encoder = Encoder(**encoder)
        self.options = self.encoder.options | dict(classes=classes)
        self.head = nn.Linear(self.options["width"], classes)
        initialize_from_scratch(self.encoder, self.head)

    def forward(self, clip: Tensor, rois: Tensor) -> Tensor:
        """Normalized clips (B, 3, T, H, W), boxes (M, 5) in pixels after a clip's index, to logits (M, classes)."""
        time, height, _ = cube_grid(clip.shape[2:], self.options["cube"])
        x = self.encoder(clip)  # (B, N, D)
        x = rearrange(x, "B (t h w) D -> t B D h w", t=time, h=height).mean(dim=0)  # (B, D, H/16, W/16)
        # torchvision's defaults are SlowFast's: no shift by half a cube (aligned), more samples in larger boxes.
        x = roi_align(x.float(), rois, output_size=7, spatial_scale=1 / self.options["cube"][1])  # (M, D, 7, 7)
        x = x.amax(dim=(2, 3))  # (M, D)
        return self.head(x)  # (M, classes)


def detection_loss(logits: Tensor, labels: Tensor, clips: int) -> Tensor:
    """Binary cross-entropy of (M, classes): the mean over actions, summed over persons, divided by the number of clips.

    So all persons have the same weight, in whichever clip and process they are. The authors multiply the mean by the
    number of persons: a constant factor, which AdamW does not notice.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / (labels.shape[1] * clips)


def build(config: SimpleNamespace, labels: Tensor, checkpoint: dict | None = None) -> ActionDetector:
    """Return the detector: with random weights, those of `config.init`, or the shape of a checkpoint's.

    labels (M, classes): of all persons to train on. The head starts at each action's frequency, which neither the paper
    nor its code does: started at probability 0.5, its bias would take thousands of steps, and features would make up
    for it. checkpoint: of a run that resumes, whose weights are loaded afterwards. Raises UserError.
    """
    torch.manual_seed(config.run.seed)
    if checkpoint:
        model = ActionDetector(**checkpoint["model_options"], drop_path=config.model.drop_path)
        model.encoder.pos_embed.copy_(checkpoint["positions"])
        return model
    options = encoder_options(config, config.init)
    model = ActionDetector(**options, classes=config.data.actions, drop_path=config.model.drop_path)
    say(f"initialized from {config.init}")
    if config.init != "scratch":
        load_weights(model, config.init, fresh=("encoder.norm.", "head."))
    with torch.no_grad():
        model.head.bias.copy_(((labels.sum(dim=0) + 0.5) / (len(labels) + 1)).logit())  # never quite 0 or 1
    return model


def check(config: SimpleNamespace) -> None:
    """Find most mistakes in a configuration before any work. Raises UserError."""
    options = config.data
    cube_grid((options.frames, options.size, options.size), config.model.cube)
    if options.size > options.short_side:
        raise UserError(f"data.size={options.size} cannot be cropped from data.short_side={options.short_side}")


def train(config: SimpleNamespace) -> None:
    """Train as `config` says (Table 12), or resume; test at the end."""
    check(config)
    processes = start_processes(config.run.precision, config.data.workers)
    rank, world_size, device = processes.rank, processes.world_size, processes.device
    compiled = compiler(config.run.compile, device)
    folder = Path(config.run.folder)
    root = toy.find_ava(config.data)
    key_frames, movies = find_training(config.data, root)
    test_set = find_test(config.data, root)
    names = {number: name for number, (name, _) in test_set.actions.items()}
    identity = dict(videos=describe(list(key_frames.items())), actions=names)
    checkpoint = load_checkpoint(config, DEFAULT, **identity)
    labels = torch.cat([ava.to_persons(rows, config.data.actions)[1] for rows in key_frames.values()])  # (M, classes)
    model = build(config, labels, checkpoint).to(device)
    if config.run.recompute:
        checkpoint_activations(model)
    clips = KeyFrameClips(list(key_frames.items()), config.run.seed, movies=movies, options=config.data)
    clips[0, 0]  # raises UserError if no movie can be read

    # batch = processes x accumulation x micro-batch, counted in clips
    batch = config.optim.batch_size
    micro_batch, accumulation = split_batch(len(clips), batch, world_size, config.run.batch_per_device)
    steps_per_epoch = len(clips) // batch
    total = round(config.optim.epochs * steps_per_epoch)
    warmup = round(config.optim.warmup_epochs * steps_per_epoch)
    peak_lr = config.optim.base_lr * batch / 256  # Sec. B: the linear scaling rule
    end_lr = config.optim.min_lr * batch / 256

    groups = parameter_groups(model, config.optim.weight_decay, config.optim.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    identity |= dict(model_options=model.options, positions=model.encoder.pos_embed)
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{len(clips):,} key frames with {len(labels):,} boxes for training, {len(test_set.persons):,} for validation, "
        f"{len(test_set.actions)} of {config.data.actions} actions evaluated; clips of {config.data.frames} frames\n"
        f"peak learning rate {config.optim.base_lr:g} x {batch} / 256 = {peak_lr:.4g}, "
        f"in the cube embedding {peak_lr * groups[0]['lr_scale']:.3g}"
    )
    log = Log(config, processes, start, total, clips_per_step=batch)
    network = compiled(model)
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, broadcast_buffers=False)
    shards = data.GlobalBatches(len(clips), batch, micro_batch, range(start, total), processes, config.run.seed)
    batches = data.Batches(clips, shards, config.data.workers, folder, collate_fn=collate)

    model.train()
    loss_sum = torch.zeros((), device=device)
    with StopSignals() as stop:
        for step in log.progress(range(start, total)):
            lr = warmup_cosine(step, total, warmup, peak_lr, end_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            for number in range(accumulation):
                # (B, T, 3, H, W), (M, 5), (M, classes)
                clip, rois, labels = (x.to(device, non_blocking=True) for x in next(batches))
                seed_device(config.run.seed, step * accumulation + number, rank)
                clip = data.normalize(clip, config.data.mean, config.data.std)  # (B, 3, T, H, W)
                # gradients are averaged over the processes in the last backward pass of the step
                last = number == accumulation - 1
                with nullcontext() if last or world_size == 1 else network.no_sync():
                    with processes.autocast():
                        logits = network(clip, rois)  # (M, classes)
                    loss = detection_loss(logits, labels, len(clip))
                    (loss / accumulation).backward()
                loss_sum += loss.detach()
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            if done % config.run.log_every == 0 or done == total:
                mean_loss = average(loss_sum) / ((done - log.step) * accumulation)  # since the last line
                log.write_step(done, mean_loss.item(), batches.waited, epoch=done / steps_per_epoch, lr=lr)
                loss_sum.zero_()
            stopped = stop.requested()
            every = config.run.validate_every * steps_per_epoch
            validating = every > 0 and done % every == 0 and done < total
            if stopped or validating or done % config.run.checkpoint_every == 0 or done == total:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done)
                save_checkpoint(log, config, **state, **identity)
            if stopped and done < total:
                raise UserError(f"stopped by {stopped} after step {done}: the same command resumes there")
            if validating:
                epoch = done // steps_per_epoch
                with log.clock_stopped(), stop.at_once():
                    mean_ap = test(model, test_set, processes, config, f"epoch {epoch}")
                log.write(step=done, epoch=epoch, mAP=mean_ap)
                say(f"epoch {epoch}: mAP {mean_ap:.2f}")
                model.train()

        with stop.at_once():
            mean_ap = test(model, test_set, processes, config, "testing", folder)
    log.write(step=total, test_mAP=mean_ap)
    log.draw()


@torch.inference_mode()
def detect(
    model: nn.Module, persons: KeyFrames, movies: Movies, processes: Processes, config: SimpleNamespace, title: str
) -> tuple[Rows, list[str]]:
    """The probability of each action of each person, as rows, on rank 0 alone; why some key frames could not be read.

    Each process tests a part of the key frames.
    """
    options, at_most, cube = config.data, config.run.batch_per_device, model.options["cube"]
    movies_frames = [list(group) for _, group in groupby(persons.items(), key=lambda item: item[0][0])]
    batches = [frames[i : i + at_most] for frames in movies_frames for i in range(0, len(frames), at_most)]
    mine, read = (
        range(processes.rank, len(batches), processes.world_size),
        partial(test_batch, movies=movies, options=options),
    )
    batches = data.loader(batches, options.workers, batch_size=None, sampler=mine, collate_fn=read)
    model.eval()
    found, broken, rows = [], [], []
    for scores, clip, rois, unreadable in tqdm(batches, title, unit="batch", disable=processes.rank > 0):
        broken += unreadable
        if clip is not None:
            clip = data.normalize(
                clip.to(processes.device, non_blocking=True), options.mean, options.std
            )  # (B, 3, T, H, W)
            # To whole cubes, right and below, with zeros: the mean color.
            clip = F.pad(clip, (0, -clip.shape[-1] % cube[2], 0, -clip.shape[-2] % cube[1]))
            with processes.autocast():
                logits = model(clip, rois.to(processes.device, non_blocking=True))  # (M, classes)
            found.append((scores, logits.float().sigmoid()))
    found, broken = gather([(scores, table.cpu()) for scores, table in found]), sorted(set(gather(broken)))
    if not found:
        raise UserError(f"none of the {len(persons)} key frames with persons can be read; the first: {broken[0]}")
    for scores, table in found if processes.rank == 0 else ():
        for ((frame, box), score), probabilities in zip(scores.items(), table.tolist(), strict=True):
            weight = score if options.person_score else 1.0
            rows += [ava.Row(frame, box, action, p * weight) for action, p in enumerate(probabilities, 1) if p > 0]
    return sorted(rows), broken


def test(
    model: nn.Module,
    test_set: TestSet,
    processes: Processes,
    config: SimpleNamespace,
    title: str,
    folder: Path | None = None,
    as_json: bool = False,
) -> float:
    """The mAP, for every process; with a folder, print it and write detections.csv, mAP.json and pictures.

    A key frame that cannot be read has no detections; its ground truth still counts.
    """
    rows, broken = detect(model, test_set.persons, test_set.movies, processes, config, title)
    rows, summary = [row for row in rows if row.action in test_set.actions], {}
    if processes.rank == 0:
        precisions = ava.average_precisions(test_set.ground_truth, rows, test_set.actions)
        summary = ava.summarize(precisions, test_set.actions)
    if folder and processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        ava.write_rows(folder / "detections.csv", rows)
        for reason in broken:
            say(f"no detections: {reason}")
        draw_key_frames(rows, test_set, config, folder / "pictures")
        ava.report(summary, folder / "mAP.json", as_json)
        persons, frames = {(row.frame, row.box) for row in rows}, {row.frame for row in rows}
        what = f"{len(persons):,} persons in {len(frames):,} frames: {folder / 'detections.csv'}"
        (say if as_json else print)(what)
    return gather([summary.get("mAP")])[0]


def draw_key_frames(rows: Rows, test_set: TestSet, config: SimpleNamespace, folder: Path) -> None:
    """Draw `run.pictures` of the key frames, evenly spaced: what was detected, and the ground truth."""
    names, actions = {number: name for number, (name, _) in test_set.actions.items()}, config.data.actions
    found, truth = ava.key_frames(rows), ava.key_frames(test_set.ground_truth)
    for index in torch.linspace(0, len(found) - 1, min(config.run.pictures, len(found))).long().tolist():
        video, second = frame = list(found)[index]
        image = read_clip(test_set.movies[video], second, config.data)[config.data.frames // 2]  # the key frame
        detected = draw_persons(image, *ava.to_persons(found[frame], actions), names, "orange")
        true = draw_persons(image, *ava.to_persons(truth.get(frame, []), actions), names, "lime")
        pictures = {f"detected, {video}, second {second}": detected, "ground truth": true}
        side_by_side(pictures, folder / f"{video}_{second:04.15g}.png")


def use_weights(arguments: argparse.Namespace) -> None:
    """`--test` and `--predict`: what any checkpoint of action detection finds in the validation set or in videos."""
    weights, config = arguments.weights, stored_config(arguments.weights, DEFAULT, arguments.settings)
    check(config)
    processes = start_processes(config.run.precision, config.data.workers)
    model = build_from_checkpoint(weights, ActionDetector, config.model.pretrained_clip).to(processes.device)
    if arguments.predict:
        return predict(model, arguments, processes, config)
    if (classes := model.options["classes"]) != config.data.actions:
        raise UserError(f"{weights} knows {classes} actions, the dataset {config.data.actions}: set data.actions")
    test_set = find_test(config.data, toy.find_ava(config.data))
    test(model, test_set, processes, config, "testing", arguments.out or weights.parent, arguments.json)


# ---- prediction: where persons are, what they do, a video that shows it ----


def predict(model: nn.Module, arguments: argparse.Namespace, processes: Processes, config: SimpleNamespace) -> None:
    """Write copies of videos in which boxes and actions are drawn, and the detections as csv files next to them.

    Persons are those in --boxes. Without it, at each second, they are those that --detector finds, or else one box: the
    whole frame. Videos without persons and those that cannot be read are named.
    """
    options, videos, out = config.data, named_videos(arguments.predict), arguments.out or Path("runs/detections")
    movies, done = {video.stem: video for video in videos}, 0
    if len(movies) < len(videos):
        raise UserError("two of the videos have the same name, as their results would: predict one after the other")
    boxes = find_persons(arguments.boxes, options, Path(options.root), movies) if arguments.boxes else {}
    person_detector = load_person_detector(arguments.detector).to(processes.device) if arguments.detector else None
    names = read_checkpoint(arguments.weights)[1].get("actions", {})
    for name, path in movies.items():
        try:
            persons = {frame: rows for frame, rows in boxes.items() if frame[0] == name}
            if not boxes:
                persons = persons_each_second(path, person_detector, processes.device, config.data)
            elif not persons:
                others = f"only of {next(iter(boxes))[0]}, ...: column 1 has to be the file's name"
                raise UserError(f"{arguments.boxes} has no boxes of video {name}, {others}")
            rows, broken = detect(model, persons, {name: path}, processes, config, f"predicting {name}")
            for reason in broken:
                say(f"no detections: {reason}")
            if processes.rank == 0:
                file = out if out.suffix == ".mp4" and len(videos) == 1 else out / f"{name}.mp4"
                draw_video(path, file, rows, names, model.options["classes"], options.starts_at)
            done += 1
        except (BrokenVideo, UserError) as error:
            say(f"left out: {error}")
    if not done:
        raise UserError("nothing could be predicted; the lines above say why")


def main() -> None:
    if "--evaluate" in sys.argv:
        return ava.main([word for word in sys.argv[1:] if word != "--evaluate"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, exclusive = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--test", action="store_true", help="test --weights, do not train")
    add("--predict", nargs="+", type=Path, metavar="VIDEO", help="draw actions into copies of videos, folders or lists")
    form = "rows video,second,x1,y1,x2,y2,,score in fractions of width and height"
    exclusive.add_argument("--boxes", type=Path, metavar="FILE", help=f"of --predict: {form}")
    exclusive.add_argument("--detector", type=Path, metavar="FILE", help="weights of fasterrcnn_resnet50_fpn_v2")
    add("--weights", type=Path, help="checkpoint of action detection: this project's or the official one")
    add("--evaluate", action="store_true", help="python -m support.ava, whose --help lists the options")
    add("--json", action="store_true", help="--test and --evaluate print their results as one JSON object")
    add("--out", type=Path, help="--test, --predict: folder, default that of the weights, runs/detections; or one .mp4")
    arguments = parse(parser, DEFAULT)
    if bool(arguments.weights) != bool(arguments.test or arguments.predict):
        example = "a checkpoint of action detection such as runs/detect/toy/checkpoint.pt"
        raise UserError(f"--test and --predict need --weights FILE, {example}; training starts from init=FILE")
    if arguments.weights:
        use_weights(arguments)
    else:
        train(load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    launch(main)
