"""Action detection on AVA v2.2 (Sec. 4.3, Tables 5 and 12): which of 80 actions does each person do, once per second?

    laptop:   torchrun detect_ava.py                   # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 detect_ava.py configs/detect/k400_base.yaml data.root=/data/ava init=FILE
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 detect_ava.py ...
    test:     torchrun --nproc_per_node=8 detect_ava.py --test --weights runs/detect/k400_base/checkpoint.pt
    evaluate: python detect_ava.py --evaluate DETECTIONS.csv --ground-truth ava_val_v2.2.csv --labels LIST.pbtxt

AVA labels one frame per second of a movie, the key frame: a box around each person, and all that the person does. The
network sees a clip around it. The boxes are given: by people for training, by a person detector for testing.

From a detected box to its 80 scores, in the order of this file:

    read_person_boxes   (support/ava.py) rows video,second,x1,y1,x2,y2,,score of the detector, 0.8 or higher
    read_clip           16 frames around that second of the movie, 4 apart
    KeyFrameBatches     frames with a short side of 256 pixels, boxes in their pixels (KeyFrameClips: training, cropped)
    ActionDetector      tokens; mean over time; RoIAlign of the box, 7 x 7; maximum; linear: 80 logits
    detect              sigmoid: 80 probabilities; times the detector's score if data.person_score is set
    write_rows          (support/ava.py) rows video,second,x1,y1,x2,y2,action,score: detections.csv
    average_precisions  (support/average_precision.py) frame-mAP at IoU 0.5 of such rows

The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
from bisect import bisect_left
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
from model import Encoder, checkpoint_activations, cube_grid, initialize_from_scratch, parameter_groups
from support import ava, toy_ava
from support.average_precision import average_precisions, evaluate, report, summarize
from support.checkpoint import check_length, describe, load_checkpoint, save_checkpoint
from support.config import UserError, load_config, parse, say
from support.pictures import draw_persons, side_by_side
from support.processes import Processes, StopSignals, average, compiler, gather, launch, start_processes
from support.run import Log, check_writable, count_steps, split_batch, warmup_cosine
from support.seeds import random_below, seed_device
from support.video import BrokenVideo
from support.weight_files import weights_file
from support.weights import build_from_checkpoint, check_init, encoder_options, load_weights, stored_config

DEFAULT = Path(__file__).parent / "configs" / "detect" / "toy.yaml"


# ---- clips with boxes (Sec. B) ----


def nearest(times: list[Fraction], time: Fraction) -> int:
    """Return the index of the nearest to `time` of the sorted `times`, the earlier of two equally near."""
    right = bisect_left(times, time)
    neighbors = range(max(right - 1, 0), min(right + 1, len(times)))
    return min(neighbors, key=lambda index: abs(times[index] - time))


def read_clip(path: Path, second: float, options: SimpleNamespace) -> Tensor:
    """Read the clip around the key frame at `second` of a movie: uint8 (T, 3, H, W). Raises BrokenVideo.

    Frames are chosen by time, not by number: two are stride / rate seconds apart, whatever the movie's own rate. Frame
    T/2 is the key frame. Before and after the movie its first and last frame are repeated.
    """
    key_time = Fraction(str(second)) - options.starts_at  # in the file, exactly
    step = options.stride / Fraction(options.rate)
    clip_times = [key_time + (i - options.frames // 2) * step for i in range(options.frames)]
    with ava.open_movie(path, max(clip_times[0], 0), max(clip_times[-1], 0)) as movie:
        times = movie.times
        if not 0 <= key_time <= times[-1] + Fraction(1, 2):
            where = f"second {second} lies outside, if it starts at second {options.starts_at}"
            raise BrokenVideo(f"{path}: {where}; is the movie cut or whole?")
        return movie.frames([nearest(times, time) for time in clip_times])


def resized_clip(frame: ava.Frame, rows: ava.Rows, movies: ava.Movies, options: SimpleNamespace) -> tuple:
    """Read a key frame's clip uint8 (T, 3, H, W), its short side 256 in the paper; boxes (M, 4) in its pixels; labels.

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
    """Move the edges x1 y1 x2 y2 of boxes (M, 4) outward, by fractions (4,) or (M, 4) of their width or height."""
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (M, 4): width, height, width, height
    return tv_tensors.wrap(boxes + outward * extent * torch.tensor([-1, -1, 1, 1]), like=boxes)


def jitter_boxes(boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Move each edge on its own: by up to 0.2 and 0.1 of width and height outward, or half of that inward."""
    most = torch.tensor([0.2, 0.1, 0.2, 0.1])
    return move_edges(boxes, torch.rand(boxes.shape, generator=generator) * 1.5 * most - 0.5 * most)


def jitter_colors(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Move the hue of frames uint8 (T, 3, H, W) by up to 10 of 180 steps, saturation and value by up to 26 of 255."""
    hue, saturation, value = (random_below(2 * most + 1, generator) - most for most in (10, 26, 26))
    shift = torch.tensor([round(hue * 255 / 180), saturation, value])[:, None, None]  # a full turn of hue is 255 in PIL
    jittered = []
    for frame in frames:
        hsv = TF.pil_to_tensor(TF.to_pil_image(frame).convert("HSV")).int() + shift
        hsv = torch.cat([hsv[:1] % 255, hsv[1:].clamp(0, 255)]).byte()
        jittered.append(TF.pil_to_tensor(TF.to_pil_image(hsv, "HSV").convert("RGB")))
    return torch.stack(jittered)


@dataclass(eq=False, kw_only=True)
class KeyFrameClips(data.TrainingVideos):
    """Random crops around labelled key frames: uint8 (T, 3, H, W), boxes (M, 4) in pixels, labels (M, classes)."""

    movies: ava.Movies
    options: SimpleNamespace  # the group `data` of a configuration

    def sample(self, key_frame: tuple[ava.Frame, ava.Rows], generator: torch.Generator) -> tuple[Tensor, ...]:
        options, size = self.options, self.options.size
        clip, boxes, labels = resized_clip(*key_frame, self.movies, options)
        top, left = (random_below(side - size + 1, generator) for side in clip.shape[-2:])
        # Persons outside the crop stay, as boxes without area at its edge, as in the authors' code.
        clip, boxes = (TF.crop(item, top, left, size, size) for item in (clip, boxes))  # (T, 3, H, W), (M, 4)
        if options.flip and random_below(2, generator):
            clip, boxes = TF.horizontal_flip(clip), TF.horizontal_flip(boxes)
        if options.jitter_boxes:
            boxes = TF.clamp_bounding_boxes(jitter_boxes(boxes, generator))
        if options.jitter_colors:
            clip = jitter_colors(clip, generator)
        return clip.contiguous(), boxes.as_subclass(Tensor), labels


def to_rois(boxes: list[Tensor]) -> Tensor:
    """Join the boxes of each clip, (M_i, 4), to one tensor (M, 5) whose first column is the clip's index."""
    return torch.cat([F.pad(clip_boxes, (1, 0), value=index) for index, clip_boxes in enumerate(boxes)])


def collate(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Return clips (B, T, 3, H, W), boxes (M, 5) of `to_rois`, labels (M, classes), sentences on broken videos."""
    clips, boxes, labels, broken = zip(*samples, strict=True)
    return default_collate(clips), to_rois(boxes), torch.cat(labels), sum(broken, [])


class KeyFrameBatches(Dataset):
    """Test batches: whole frames around at most `size` key frames of one movie, whose frames have one size.

    An item holds the score of each person (frame, box), B clips uint8 (T, 3, H, W), their boxes (M_i, 4), and why key
    frames could not be read.
    """

    def __init__(self, persons: ava.KeyFrames, movies: ava.Movies, options: SimpleNamespace, size: int) -> None:
        self.movies, self.options = movies, options
        self.batches = []
        for _, key_frames in groupby(persons.items(), key=lambda item: item[0][0]):  # by movie
            key_frames = list(key_frames)
            self.batches += [key_frames[i : i + size] for i in range(0, len(key_frames), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict, list[Tensor], list[Tensor], list[str]]:
        scores, clips, boxes, broken = {}, [], [], []
        outward = torch.tensor([0.05, 0.025, 0.05, 0.025]) * self.options.widen_boxes
        for frame, rows in self.batches[index]:
            try:
                clip, clip_boxes, _ = resized_clip(frame, rows, self.movies, self.options)
            except BrokenVideo as error:
                broken.append(str(error))
                continue
            clips.append(clip)
            boxes.append(TF.clamp_bounding_boxes(move_edges(clip_boxes, outward)))
            # in the order of `boxes`: both are sorted, by ava.key_frames and ava.to_persons
            scores |= {(row.frame, row.box): row.score for row in rows}
        return scores, clips, boxes, broken


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
        """Turn normalized clips (B, 3, T, H, W) and boxes (M, 5), of `to_rois`, into logits (M, classes)."""
        time, height, _ = cube_grid(clip.shape[2:], self.options["cube"])
        x = self.encoder(clip)  # (B, N, D)
        x = rearrange(x, "B (t h w) D -> t B D h w", t=time, h=height).mean(dim=0)  # (B, D, H/16, W/16)
        # torchvision's defaults, the authors' too: no shift by half a cube (aligned), more samples in larger boxes.
        x = roi_align(x.float(), rois, output_size=7, spatial_scale=1 / self.options["cube"][1])  # (M, D, 7, 7)
        x = x.amax(dim=(2, 3))  # (M, D)
        return self.head(x)  # (M, classes)


def detection_loss(logits: Tensor, labels: Tensor, clips: int) -> Tensor:
    """Return the binary cross-entropy of (M, classes): mean over actions, sum over persons, divided by the clips."""
    # Processes have equally many clips, not persons. So each person weighs the same in the mean over processes.
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / (labels.shape[1] * clips)


def build(config: SimpleNamespace, labels: Tensor, checkpoint: dict | None = None) -> ActionDetector:
    """Return the detector: with random weights, those of `config.init`, or the shape of a checkpoint's.

    labels (M, classes): of all persons to train on. The head starts at each action's frequency, which neither the paper
    nor its code does: started at probability 0.5, its bias would take thousands of steps.
    checkpoint: of a run that resumes, whose weights are loaded afterwards. Raises UserError.
    """
    torch.manual_seed(config.run.seed)
    if checkpoint:
        model = ActionDetector(**checkpoint["model_options"], drop_path=config.model.drop_path)
        model.encoder.pos_embed.copy_(checkpoint["positions"])
        return model
    check_init(config.init, "scratch")
    options = encoder_options(config, config.init)
    model = ActionDetector(**options, classes=config.data.actions, drop_path=config.model.drop_path)
    say(f"initialized from {config.init}")
    if config.init != "scratch":
        load_weights(model, config.init, fresh=("head.",), optional=("encoder.norm.",))
    with torch.no_grad():
        model.head.bias.copy_(((labels.sum(dim=0) + 0.5) / (len(labels) + 1)).logit())  # never quite 0 or 1
    return model


def check(config: SimpleNamespace) -> None:
    """Raise UserError if a clip is not made of whole cubes, or cannot be cropped from the frames."""
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
    root = toy_ava.find(config.data)  # the toy videos if there is no data.root
    key_frames, movies = ava.find_training(config.data, root)
    test_set = ava.find_validation(config.data, root)
    names = {number: name for number, (name, _) in test_set.actions.items()}
    identity = dict(videos=describe(list(key_frames.items())), actions=names)  # the same when a run resumes
    checkpoint = load_checkpoint(config, DEFAULT, **identity)
    truth = torch.cat([ava.to_persons(rows, config.data.actions)[1] for rows in key_frames.values()])  # (M, classes)
    model = build(config, truth, checkpoint).to(device)
    if config.run.recompute:
        checkpoint_activations(model)
    clips = KeyFrameClips(list(key_frames.items()), config.run.seed, movies=movies, options=config.data)
    clips[0, 0]  # raises UserError if no movie can be read

    # batch = processes x accumulation x micro-batch, counted in clips
    batch = config.optim.batch_size
    micro_batch, accumulation = split_batch(len(clips), batch, world_size, config.run.batch_per_device)
    steps_per_epoch = len(clips) // batch
    total, warmup = count_steps(config.optim, steps_per_epoch)
    peak_lr = config.optim.base_lr * batch / 256  # Sec. B: the linear scaling rule
    end_lr = config.optim.min_lr * batch / 256

    groups = parameter_groups(model, config.optim.weight_decay, config.optim.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=processes.dtype == torch.float16)  # small gradients would be 0
    stored = identity | dict(model_options=model.options, positions=model.encoder.pos_embed)  # not in the state_dict
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):  # {} if the run was not in fp16: the scale starts as in a new run
            scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
        check_length(checkpoint, config, steps_per_epoch)
    in_first_layer = ""
    if config.optim.layer_decay < 1:
        in_first_layer = f", in the cube embedding {peak_lr * groups[0]['lr_scale']:.3g}"
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{len(clips):,} key frames with {len(truth):,} boxes for training, {len(test_set.persons):,} for validation, "
        f"{len(test_set.actions)} of {config.data.actions} actions evaluated; clips of {config.data.frames} frames\n"
        f"peak learning rate {config.optim.base_lr:g} x {batch} / 256 = {peak_lr:.4g}{in_first_layer}"
    )
    log = Log(config, processes, start, total, steps_per_epoch, clips_per_step=batch)
    network = compiled(model)
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, broadcast_buffers=False)
    sampler = data.MicroBatchSampler(len(clips), batch, micro_batch, range(start, total), processes, config.run.seed)
    batches = data.Batches(clips, sampler, config.data.workers, folder, collate_fn=collate)

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
                    scaler.scale(loss / accumulation).backward()
                loss_sum += loss.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            if done % config.run.log_every == 0 or done == total:
                mean_loss = average(loss_sum) / ((done - log.step) * accumulation)  # since the last line
                log.write_step(done, mean_loss.item(), batches.waited, lr=lr)
                loss_sum.zero_()
            stopped = stop.requested()
            kept = log.epoch_ends(done, config.run.keep_every)
            # validating saves first, since a signal ends it at once
            validating = log.epoch_ends(done, config.run.validate_every) and done < total
            if stopped or validating or done % config.run.checkpoint_every == 0 or kept or done == total:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
                save_checkpoint(log, config, **state, step=done, **stored)
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
    pictures = ", pictures/" if config.run.pictures else ""
    weights = (folder / "checkpoint.pt").as_posix()
    say(
        f"{folder}: mAP {mean_ap:.2f} at IoU 0.5: detections.csv, mAP.json, loss.png, accuracy.png{pictures}. "
        f"Next: python -m tools.draw_detections VIDEO... --weights {quote(weights)}"
    )


@torch.inference_mode()
def detect(
    model: nn.Module, batches: KeyFrameBatches, processes: Processes, config: SimpleNamespace, title: str
) -> tuple[ava.Rows, list[str]]:
    """Return the probability of each action of each person as rows, on rank 0, and why key frames could not be read."""
    options, device, cube = config.data, processes.device, model.options["cube"]
    own = range(processes.rank, len(batches), processes.world_size)
    loaded = data.loader(batches, options.workers, batch_size=None, sampler=own)
    model.eval()
    results, broken = [], []
    for scores, clips, boxes, unreadable in tqdm(loaded, title, unit="batch", disable=processes.rank > 0):
        broken += unreadable
        if not clips:
            continue
        clip = torch.stack(clips).to(device, non_blocking=True)  # (B, T, 3, H, W)
        clip = data.normalize(clip, options.mean, options.std)  # (B, 3, T, H, W)
        height, width = clip.shape[-2:]
        clip = F.pad(clip, (0, -width % cube[2], 0, -height % cube[1]))  # whole cubes; zero is the mean color
        with processes.autocast():
            logits = model(clip, to_rois(boxes).to(device, non_blocking=True))  # (M, classes)
        results.append((scores, logits.float().sigmoid()))
    results = gather([(scores, probabilities.cpu()) for scores, probabilities in results])
    broken = sorted(set(gather(broken)))
    if not results:
        raise UserError(f"none of the key frames with boxes can be read; the first: {broken[0]}")
    rows = []
    if processes.rank == 0:
        for scores, probabilities in results:
            for ((frame, box), score), by_action in zip(scores.items(), probabilities.tolist(), strict=True):
                factor = score if options.person_score else 1.0
                rows += [ava.Row(frame, box, action, factor * p) for action, p in enumerate(by_action, 1)]
    return sorted(rows), broken


def test(
    model: nn.Module,
    validation: ava.ValidationSet,
    processes: Processes,
    config: SimpleNamespace,
    title: str,
    folder: Path | None = None,
    as_json: bool = False,
) -> float:
    """Return the mAP, on every process; with a folder, report it and write detections there."""
    batches = KeyFrameBatches(validation.persons, validation.movies, config.data, config.run.batch_per_device)
    rows, broken = detect(model, batches, processes, config, title)
    rows = [row for row in rows if row.action in validation.actions]
    results = []
    if processes.rank == 0:
        summary = summarize(average_precisions(validation.ground_truth, rows, validation.actions), validation.actions)
        results = [summary["mAP"]]
        if folder:
            for reason in broken:
                say(f"no detections: {reason}")  # their ground truth still counts
            folder.mkdir(parents=True, exist_ok=True)
            report(summary, folder / "mAP.json", as_json)
            ava.write_rows(folder / "detections.csv", rows)
            boxes, frames = {(row.frame, row.box) for row in rows}, {row.frame for row in rows}
            note = say if as_json else print
            note(f"{len(boxes):,} boxes in {len(frames):,} key frames: {folder / 'detections.csv'}")
            draw_key_frames(rows, validation, config, folder / "pictures")
    return gather(results)[0]


def draw_key_frames(rows: ava.Rows, validation: ava.ValidationSet, config: SimpleNamespace, folder: Path) -> None:
    """Draw detections in `run.pictures` key frames, evenly spaced, next to their ground truth."""
    detected, truth = ava.key_frames(rows), ava.key_frames(validation.ground_truth)
    names = {number: name for number, (name, _) in validation.actions.items()}
    frames = list(detected)
    for video, second in [frames[i] for i in data.evenly_spaced(len(frames), config.run.pictures)]:
        image = read_clip(validation.movies[video], second, config.data)[config.data.frames // 2]  # the key frame
        left = draw_persons(image, *ava.to_persons(detected[video, second], config.data.actions), names, "orange")
        persons = ava.to_persons(truth.get((video, second), []), config.data.actions)
        right = draw_persons(image, *persons, names, "lime")
        pictures = {f"detected, {video}, second {second}": left, "ground truth": right}
        side_by_side(pictures, folder / f"{video}_{second:04.15g}.png")


def run_test(arguments: argparse.Namespace) -> None:
    """Test any checkpoint of action detection on the validation set: `--test`."""
    weights, config = arguments.weights, stored_config(arguments.weights, DEFAULT, arguments.settings)
    check(config)
    folder = arguments.out or weights_file(weights).parent
    check_writable(folder)
    processes = start_processes(config.run.precision, config.data.workers)
    model = build_from_checkpoint(weights, ActionDetector, config.model.pretrained_clip).to(processes.device)
    if (classes := model.options["classes"]) != config.data.actions:
        raise UserError(f"{weights} knows {classes} actions, the dataset {config.data.actions}: set data.actions")
    validation = ava.find_validation(config.data, toy_ava.find(config.data))
    test(model, validation, processes, config, "testing", folder, arguments.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--test", action="store_true", help="test --weights, do not train")
    add("--weights", type=Path, help="checkpoint of action detection: this project's or the official one")
    add("--evaluate", type=Path, metavar="DETECTIONS.csv", help="print the mAP of detections, whatever made them")
    add("--ground-truth", type=Path, metavar="GT.csv", help="--evaluate: AVA's annotations")
    add("--labels", type=Path, metavar="LIST.pbtxt", help="--evaluate: the actions to evaluate")
    add("--exclude", type=Path, metavar="X.csv", help="--evaluate: frames to leave out, video,second")
    add("--skip-frames-without-ground-truth", action="store_true", help="--evaluate: as mmaction2 does, not official")
    add("--json", action="store_true", help="--test and --evaluate print their results as one JSON object")
    add("--out", type=Path, help="--test: folder, default that of the weights; --evaluate: file, DETECTIONS_mAP.json")
    arguments = parse(parser, DEFAULT)
    if bool(arguments.weights) != arguments.test:
        raise UserError("--test needs --weights FILE, a checkpoint of action detection; training starts from init=FILE")
    if arguments.evaluate:
        evaluate(arguments)
    elif arguments.test:
        run_test(arguments)
    else:
        train(load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    launch(main)
