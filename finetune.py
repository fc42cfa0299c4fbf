"""Fine-tuning, testing and predicting: action classification (Sec. 4, Table 10).

    laptop:   torchrun finetune.py                     # toy videos, from the encoder that `torchrun pretrain.py` leaves
              torchrun finetune.py configs/finetune/toy_scratch.yaml
    8 GPUs:   torchrun --nproc_per_node=8 finetune.py configs/finetune/ssv2_base.yaml data.root=/data/ssv2 init=FILE
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 finetune.py ...
    test:     torchrun --nproc_per_node=8 finetune.py --test --weights runs/finetune/ssv2_base/checkpoint.pt
    predict:  python finetune.py --predict VIDEO... --weights runs/finetune/toy/checkpoint.pt
    compare:  python finetune.py --compare runs/a/scores.csv runs/b/scores.csv       # Figures 7 and 8

The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import data
from model import VideoClassifier, checkpoint_activations, cube_grid, parameter_groups
from support import toy
from support.checkpoint import check_length, describe, load_checkpoint, save_checkpoint
from support.config import UserError, load_config, parse, pick, say
from support.datasets import Classes, LabelledVideos, labelled_videos
from support.lists import named_videos
from support.processes import Processes, StopSignals, average, compiler, gather, launch, loader_workers, start_processes
from support.randaugment import rand_augment
from support.run import Log, check_writable, count_steps, split_batch, warmup_cosine
from support.scores import compare, describe_accuracy, most_probable, write_predictions, write_scores
from support.seeds import random_below, seed_device
from support.weight_files import read_checkpoint, weights_file
from support.weights import build_from_checkpoint, check_init, encoder_options, load_weights, stored_config

DEFAULT = Path(__file__).parent / "configs" / "finetune" / "toy.yaml"


def check(config: SimpleNamespace) -> None:
    """Find most mistakes in a configuration before any work. Raises UserError."""
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    pick(data.SAMPLING, config.data.sampling, "data.sampling")
    for key in ("crop_area", "crop_aspect"):
        if (limits := getattr(config.data, key)) != sorted(limits):
            raise UserError(f"data.{key}={limits} has to name the smaller number first")


def build(config: SimpleNamespace, classes: int, checkpoint: dict | None = None) -> VideoClassifier:
    """Return the classifier: with random weights (Table 1d), those of `config.init`, or the shape of a checkpoint's.

    checkpoint: of a run that resumes, whose weights are loaded afterwards. Raises UserError.
    """
    torch.manual_seed(config.run.seed)
    regularization = dict(drop_path=config.model.drop_path, dropout=config.model.dropout)
    if checkpoint:
        model = VideoClassifier(**checkpoint["model_options"], **regularization)
        model.encoder.pos_embed.copy_(checkpoint["positions"])
        return model
    check_init(config.init, "scratch")
    model = VideoClassifier(**encoder_options(config, config.init), classes=classes, **regularization)
    say(f"initialized from {config.init}")
    if config.init != "scratch":
        load_weights(model, config.init, optional=("fc_norm.", "head."))
    return model


class Augmentation:
    """RandAugment and flip (Table 10), random resized crop and erasing (not in the paper), as in the authors' code.

    config: the group `data` of a configuration for fine-tuning. Called with frames uint8 (T, 3, H, W) it returns uint8
    (T, 3, size, size). Every choice holds for all frames.
    """

    def __init__(self, config: SimpleNamespace) -> None:
        self.randaugment = config.randaugment
        self.crop = v2.RandomResizedCrop(config.size, config.crop_area, config.crop_aspect, antialias=False)
        self.flip = v2.RandomHorizontalFlip(0.5 if config.flip else 0.0)
        self.erase = config.erase

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision samples from PyTorch's global generator
            torch.manual_seed(random_below(2**62, generator))
            clip = rand_augment(frames, *self.randaugment)  # (T, 3, H, W)
            clip = self.flip(self.crop(clip)).contiguous()  # (T, 3, size, size)
            if torch.rand(()) < self.erase:
                clip = self._erased(clip)
        return clip

    def _erased(self, clip: Tensor) -> Tensor:
        """Return a copy in which one box, the same in all frames, is noise.

        The authors' is N(0, 1) after normalization. This one is cut to 0..255, as it comes before.
        """
        options = dict(scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3), value=[0.0])  # area, height / width; no noise yet
        top, left, height, width, _ = v2.RandomErasing.get_params(clip[0].float(), **options)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
        noise = torch.randn(len(clip), 3, height, width) * std + mean  # (T, 3, height, width)
        clip = clip.clone()  # a crop that changes nothing returns the decoded frames, which other repeats use too
        clip[:, :, top : top + height, left : left + width] = noise.mul(255).clamp(0, 255).byte()
        return clip


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Label smoothing (Table 10): labels (B,) to probabilities (B, classes)."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mixing(mixup: float, cutmix: float) -> v2.Transform:
    """Mixup or cutmix (Table 10), chosen at random for each micro-batch; one whose alpha is 0 is left out.

    Called with clips (B, 3, T, H, W) as a `tv_tensors.Video` (only the batch and the last two axes matter) and targets
    (B, classes). Each clip is mixed with the one before it in the micro-batch. A cutmix box is the same in all frames.
    """
    chosen = []
    if mixup > 0:
        chosen.append(v2.MixUp(alpha=mixup))
    if cutmix > 0:
        chosen.append(v2.CutMix(alpha=cutmix))
    return v2.RandomChoice(chosen) if chosen else v2.Identity()


def train(config: SimpleNamespace) -> None:
    """Fine-tune as `config` says (Table 10), or resume; test at the end."""
    check(config)
    processes = start_processes(config.run.precision, config.data.workers)
    rank, world_size, device = processes.rank, processes.world_size, processes.device
    compiled = compiler(config.run.compile, device)
    folder = Path(config.run.folder)
    splits = toy.find(config.data)  # the toy videos if there is no data.root
    videos, val_videos, names = labelled_videos(*splits, config.data.per_class)
    identity = dict(videos=describe(videos), classes=names)  # the same when a run resumes
    checkpoint = load_checkpoint(config, DEFAULT, **identity)
    model = build(config, len(names), checkpoint).to(device)
    if config.run.recompute:
        checkpoint_activations(model)
    repeats = config.data.repeats  # R augmentations of each video (Table 10)
    augment = Augmentation(config.data)
    clips = data.LabelledClips(videos, config.run.seed, data_config=config.data, augment=augment, repeats=repeats)
    clips[0, 0]  # raises UserError if no video can be read

    # batch = processes x accumulation x micro-batch, in videos. Unlike in pre-training, optim.batch_size counts videos.
    batch = config.optim.batch_size
    micro_batch, accumulation = split_batch(len(videos), batch, world_size, config.run.batch_per_device // repeats)
    if micro_batch == 1 and config.optim.mixup + config.optim.cutmix > 0:
        what = "one video at a time has no other to be mixed with"
        raise UserError(f"{what}: raise run.batch_per_device, or set optim.mixup=0 optim.cutmix=0")
    steps_per_epoch = len(videos) // batch
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
        f"{len(videos):,} videos for training, {len(val_videos):,} for validation, {len(names)} classes; {repeats} "
        f"clips of each video, of {config.data.frames} frames, {config.data.size} x {config.data.size} pixels\n"
        f"peak learning rate {config.optim.base_lr:g} x {batch} / 256 = {peak_lr:.4g}{in_first_layer}"
    )
    log = Log(config, processes, start, total, steps_per_epoch, clips_per_step=batch * repeats)
    network = compiled(model)
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, broadcast_buffers=False)
    sampler = data.MicroBatchSampler(len(videos), batch, micro_batch, range(start, total), processes, config.run.seed)
    batches = data.Batches(clips, sampler, config.data.workers, folder)
    mix = mixing(config.optim.mixup, config.optim.cutmix)

    model.train()
    loss_sum = torch.zeros((), device=device)
    with StopSignals() as stop:
        for step in log.progress(range(start, total)):
            lr = warmup_cosine(step, total, warmup, peak_lr, end_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            for number in range(accumulation):
                frames, labels = (x.to(device, non_blocking=True) for x in next(batches))  # (B, R, T, 3, H, W), (B,)
                seed_device(config.run.seed, step * accumulation + number, rank)
                targets = soft_targets(labels, len(names), config.optim.label_smoothing)  # (B, classes)
                targets = targets.repeat(repeats, 1)  # (R B, classes)
                # First one augmentation of all videos, then the next: mixup mixes clips of different videos.
                clip = data.normalize(rearrange(frames, "B R T c H W -> (R B) T c H W"))  # (R B, 3, T, H, W)
                clip, targets = mix(tv_tensors.Video(clip), targets)  # without Video, v2 expects images
                clip = clip.as_subclass(Tensor)  # (R B, 3, T, H, W)
                # gradients are averaged over the processes in the last backward pass of the step
                last = number == accumulation - 1
                with nullcontext() if last or world_size == 1 else network.no_sync():
                    with processes.autocast():
                        logits = network(clip)  # (R B, classes)
                    loss = F.cross_entropy(logits.float(), targets)
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
                with log.clock_stopped(), stop.at_once():
                    log.write(step=done, **validate(model, val_videos, processes, config, done // steps_per_epoch))
                model.train()

        with stop.at_once():
            top1 = test_and_write(model, val_videos, names, processes, config, folder)
    log.write(step=total, test_top1=top1)
    log.draw()
    weights = (folder / "checkpoint.pt").as_posix()
    say(
        f"{folder}: top-1 {top1:.2f} %: scores.csv, classes.csv, loss.png, accuracy.png. "
        f"Next: python finetune.py --predict VIDEO... --weights {quote(weights)}"
    )


@torch.inference_mode()
def test(
    model: nn.Module,
    videos: list[Path],
    processes: Processes,
    config: SimpleNamespace,
    clips: int,
    crops: int,
    title: str,
) -> tuple[Tensor, list[str]]:
    """Return class probabilities (videos, classes): the mean softmax of clips x crops views (Sec. 4.2, Kinetics 5 x 3).

    Also returns why some videos could not be read; their rows are nan. Each process tests a shard of the videos; all
    return the whole.
    """
    views = data.TestViews(
        videos, config.data.frames, config.data.stride, config.data.sampling, config.data.size, clips, crops
    )
    shard = range(processes.rank, len(videos), processes.world_size)
    at_once = config.run.batch_per_device  # views that fit on the device
    batch = max(1, at_once // (clips * crops))  # videos
    batches = data.loader(views, config.data.workers, batch_size=batch, sampler=shard, collate_fn=data.collate_views)
    model.eval()
    results, broken = [], []
    with tqdm(total=len(shard), desc=title, unit="video", disable=processes.rank > 0) as bar:
        for indices, clip, unreadable in batches:
            broken += unreadable
            bar.update(len(indices) + len(unreadable))
            if clip is None:
                continue
            clip = clip.to(processes.device, non_blocking=True)  # (B, V, T, 3, H, W), V = clips x crops
            with processes.autocast():
                logits = [model(data.normalize(part)) for part in clip.flatten(0, 1).split(at_once)]
            logits = torch.cat(logits).float()  # (B V, classes)
            probabilities = rearrange(logits.softmax(dim=1), "(B V) classes -> B V classes", B=len(indices))
            results.append((indices, probabilities.mean(dim=1)))  # (B, classes)
    scores = torch.full((len(videos), model.options["classes"]), float("nan"))
    for indices, probabilities in gather([(indices, probabilities.cpu()) for indices, probabilities in results]):
        scores[indices] = probabilities
    return scores, [reason for _, reason in sorted(gather(broken))]


def accuracy(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 in percent. A video that could not be read, its row nan, counts as wrong."""
    ranked = scores.nan_to_num(-1).topk(min(5, scores.shape[1]), dim=1).indices  # (videos, 5)
    right = (ranked == labels[:, None]) & ~scores.isnan().any(dim=1, keepdim=True)  # (videos, 5)
    return 100 * right[:, 0].float().mean().item(), 100 * right.any(dim=1).float().mean().item()


def rates(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1, its mean over the classes that occur, and top-5, in percent."""
    top1, top5 = accuracy(scores, labels)
    by_class = [accuracy(scores[labels == label], labels[labels == label])[0] for label in labels.unique()]
    return dict(top1=top1, class_mean=sum(by_class) / len(by_class), top5=top5)


def validate(
    model: nn.Module, videos: LabelledVideos, processes: Processes, config: SimpleNamespace, epoch: int
) -> dict[str, float]:
    """Print and return the accuracy from one view of each video."""
    scores, broken = test(model, [path for path, _ in videos], processes, config, 1, 1, f"epoch {epoch}, one view")
    result = rates(scores, torch.tensor([label for _, label in videos]))
    say(f"epoch {epoch}: {describe_accuracy(result, len(videos), len(broken), scores.shape[1])}, one view")
    return dict(epoch=epoch, **result)


def test_and_write(
    model: nn.Module,
    videos: LabelledVideos,
    names: list[str],
    processes: Processes,
    config: SimpleNamespace,
    folder: Path,
    as_json: bool = False,
) -> float:
    """Test as the paper does: print top-1 and top-5, write scores.csv and classes.csv into `folder`, return top-1."""
    clips, crops = config.data.test_clips, config.data.test_crops
    paths = [path for path, _ in videos]
    scores, broken = test(model, paths, processes, config, clips, crops, f"testing {clips} x {crops} views")
    result = rates(scores, torch.tensor([label for _, label in videos]))
    if processes.rank == 0:
        for reason in broken:
            say(f"counted as wrong: {reason}")
        text = f"{describe_accuracy(result, len(videos), len(broken), len(names))}, {clips} x {crops} views"
        result |= dict(videos=len(videos), unreadable=len(broken), clips=clips, crops=crops)
        print(json.dumps(result) if as_json else f"{text}: {folder / 'scores.csv'}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder, videos, scores, names)
    return result["top1"]


def test_weights(arguments: argparse.Namespace) -> None:
    """`--test`: the accuracy of any fine-tuned checkpoint; the scores go next to it or into `--out`."""
    weights = arguments.weights
    config = stored_config(weights, DEFAULT, arguments.settings)
    check(config)
    folder = arguments.out or weights_file(weights).parent
    check_writable(folder)
    processes = start_processes(config.run.precision, config.data.workers)
    model = build_from_checkpoint(weights, VideoClassifier, config.model.pretrained_clip).to(processes.device)
    known = read_checkpoint(weights)[1].get("classes")
    _, videos, names = labelled_videos(*toy.find(config.data), config.data.per_class, known)
    if known and known != names:
        raise UserError(f"{weights} was trained on other classes than these videos have: set data.classes")
    if model.options["classes"] != len(names):
        what = f"{weights} has {model.options['classes']} classes, the dataset {len(names)}"
        raise UserError(f"{what}: set data.classes")
    test_and_write(model, videos, names, processes, config, folder, arguments.json)


def predict_videos(arguments: argparse.Namespace) -> None:
    """`--predict`: print the five most probable classes of each video, and write them to `--out`."""
    if arguments.out and arguments.out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {arguments.out}: predictions are written to a .csv or .json file")
    weights = arguments.weights
    config = stored_config(weights, DEFAULT, arguments.settings)
    check(config)
    videos = named_videos(arguments.predict)
    config.data.workers = min(loader_workers(config.data.workers), len(videos) - 1)
    processes = start_processes(config.run.precision, config.data.workers)
    model = build_from_checkpoint(weights, VideoClassifier, config.model.pretrained_clip).to(processes.device)
    names = class_names(weights, config, model.options["classes"])
    clips, crops = config.data.test_clips, config.data.test_crops
    scores, broken = test(model, videos, processes, config, clips, crops, "predicting")
    for reason in broken:
        say(f"cannot be read: {reason}")
    if processes.rank == 0:
        predictions = most_probable(videos, scores, names)
        if arguments.out:
            write_predictions(arguments.out, predictions)
        if arguments.json:
            print(json.dumps(predictions))
        else:
            print_predictions(predictions)
    if broken:
        raise UserError(f"{len(broken)} of {len(videos)} videos cannot be read; see above")


def print_predictions(predictions: dict[str, dict[str, float]]) -> None:
    """Print the most probable classes of each video."""
    for video, classes in predictions.items():
        print(video)
        for name, probability in classes.items():
            print(f"  {100 * probability:5.1f} %  {name}")


def class_names(weights: Path, config: SimpleNamespace, classes: int) -> list[str]:
    """Return a checkpoint's classes: its own, those of data.classes, of a config.json (Hugging Face) or numbers."""
    content = read_checkpoint(weights)[1]
    labels = content["config.json"].get("id2label", {})
    if "classes" in content:
        names = content["classes"]
    elif config.data.classes:
        names = Classes(config.data.root, config.data.classes, []).names
    elif labels:
        names = [labels[str(number)] for number in range(len(labels))]
    else:
        names = [str(number) for number in range(classes)]
    if len(names) != classes:
        raise UserError(f"{weights} has {classes} classes, but data.classes={config.data.classes} names {len(names)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--test", action="store_true", help="test --weights, do not train")
    add("--predict", nargs="+", type=Path, metavar="VIDEO", help="print the classes of videos, folders or lists")
    add("--compare", nargs=2, type=Path, metavar="SCORES.csv", help="compare two tested models class by class")
    add("--weights", type=Path, help="fine-tuned checkpoint: this project's, official or Hugging Face's")
    add("--json", action="store_true", help="--test and --predict print their results as one JSON object")
    add("--out", type=Path, help="folder, default that of weights or second scores.csv; --predict: .csv or .json file")
    arguments = parse(parser, DEFAULT)
    if bool(arguments.weights) != bool(arguments.test or arguments.predict):
        raise UserError("--test and --predict need --weights FILE, a fine-tuned one; training starts from init=FILE")
    if arguments.compare:
        compare(arguments.compare, arguments.out or arguments.compare[1].parent)
    elif arguments.predict:
        predict_videos(arguments)
    elif arguments.test:
        test_weights(arguments)
    else:
        train(load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    launch(main)
