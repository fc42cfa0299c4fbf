"""Fine-tuning, testing and predicting: action classification (Sec. 4, Table 10).

    laptop:   torchrun finetune.py                     # toy videos, from the encoder that `torchrun pretrain.py` leaves
              torchrun finetune.py init=scratch run.folder=runs/finetune/toy_scratch
    8 GPUs:   torchrun --nproc_per_node=8 finetune.py configs/finetune/ssv2_base.yaml data.root=/data/ssv2 init=FILE
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 finetune.py ...
    test:     torchrun --nproc_per_node=8 finetune.py --test --weights runs/finetune/ssv2_base/checkpoint.pt
    predict:  python finetune.py --predict VIDEO... --weights runs/finetune/toy/checkpoint.pt
    compare:  python finetune.py --compare runs/a/scores.csv runs/b/scores.csv       # Figures 7 and 8

The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import data
from model import VideoClassifier, checkpoint_activations, cube_grid, parameter_groups
from support import toy
from support.config import UserError, load_config, parse, pick, say
from support.datasets import Classes, LabelledVideos, labelled_videos, named_videos
from support.processes import gather, launch
from support.randaugment import rand_augment
from support.run import Run, warmup_cosine
from support.scores import compare, most_probable, write_predictions, write_scores
from support.seeds import random_below
from support.weights import (
    build_from_checkpoint,
    encoder_options,
    find_init,
    load_weights,
    read_checkpoint,
    stored_config,
    weights_file,
)

DEFAULT = Path(__file__).parent / "configs" / "finetune" / "toy.yaml"


def check(config: SimpleNamespace) -> None:
    """Find most mistakes in a configuration before any work. Raises UserError."""
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    pick(data.SAMPLING, config.data.sampling, "data.sampling")
    for key in ("crop_area", "crop_aspect"):
        if (limits := getattr(config.data, key)) != sorted(limits):
            raise UserError(f"data.{key}={limits} has to name the smaller number first")


def build(config: SimpleNamespace, init: str, classes: int) -> VideoClassifier:
    """The classifier, with random weights (`init` "scratch", Table 1d) or those of any file `load_weights` reads."""
    torch.manual_seed(config.run.seed)
    encoder = encoder_options(config, init)
    model = VideoClassifier(**encoder, classes=classes, drop_path=config.model.drop_path, dropout=config.model.dropout)
    say(f"initialized from {init}")
    if init != "scratch":
        load_weights(model, init, fresh=("fc_norm.", "head."))
    return model


class Augmentation:
    """RandAugment, random resized crop, flip, erasing (Table 10), in the order of the authors' code.

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
        """A copy in which one box, the same in all frames, is noise.

        The authors' is N(0, 1) after normalization. This one is cut to 0..255, as it comes before.
        """
        top, left, height, width, _ = v2.RandomErasing.get_params(clip[0].float(), (0.02, 1 / 3), (0.3, 10 / 3), [0.0])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
        noise = torch.randn(len(clip), 3, height, width) * std + mean
        clip = clip.clone()  # a crop that changes nothing returns the decoded frames, which other repeats use too
        clip[:, :, top : top + height, left : left + width] = noise.mul(255).clamp(0, 255).byte()
        return clip


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Label smoothing (Table 10): labels (B,) to probabilities (B, classes)."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mixing(mixup: float, cutmix: float) -> v2.Transform:
    """Mixup or cutmix (Table 10), chosen at random for each micro-batch; one whose alpha is 0 is left out.

    Called with clips (B, 3, T, H, W) as a `tv_tensors.Video` (only the batch and the last two axes matter) and targets
    (B, classes). Each clip is mixed with the next one of the micro-batch. A cutmix box is the same in all frames.
    """
    chosen = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    return v2.RandomChoice(chosen) if chosen else v2.Identity()


def train(config: SimpleNamespace) -> None:
    """Fine-tune as `config` says (Table 10), or resume; test at the end."""
    check(config)
    init = find_init(config, DEFAULT)
    run = Run(config, DEFAULT)
    videos, val_videos, names = labelled_videos(*toy.find(config.data), config.data.per_class)
    model = build(config, init, len(names)).to(run.device)
    if config.run.recompute:
        checkpoint_activations(model)
    augment, repeats = Augmentation(config.data), config.data.repeats
    clips = data.LabelledClips(videos, config.run.seed, data_config=config.data, augment=augment, repeats=repeats)
    clips[0, 0]  # stops here if no video can be read
    run.plan(videos, config.optim.batch_size, repeats)
    if run.per_device == 1 and config.optim.mixup + config.optim.cutmix > 0:
        what = "one video at a time has no other to be mixed with"
        raise UserError(f"{what}: raise run.batch_per_device, or set optim.mixup=0 optim.cutmix=0")

    groups = parameter_groups(model, config.optim.weight_decay, config.optim.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    say(
        f"{run.folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{len(videos):,} videos for training, {len(val_videos):,} for testing, {len(names)} classes; "
        f"clips of {config.data.frames} frames, {config.data.size} x {config.data.size} pixels, "
        f"{repeats} of each video\nlearning rate x {groups[0]['lr_scale']:.3g} in the cube embedding"
    )
    facts = dict(model_options=model.options, positions=model.encoder.pos_embed, classes=names)
    run.open(dict(model=model, optimizer=optimizer), **facts)
    network = run.parallel(run.compile(model))
    batches = data.training_batches(clips, run)
    mix = mixing(config.optim.mixup, config.optim.cutmix)
    peak_lr, end_lr = (lr * config.optim.batch_size / 256 for lr in (config.optim.base_lr, config.optim.min_lr))

    model.train()
    for step in run.steps():
        lr = warmup_cosine(step, run.total, run.warmup, peak_lr, end_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for frames, labels in run.micro_batches(batches):  # (B, repeats, T, 3, H, W), (B,)
            targets = soft_targets(labels, len(names), config.optim.label_smoothing)  # (B, classes)
            targets = targets.repeat(repeats, 1)  # (repeats B, classes)
            # First one augmentation of all videos, then the next: mixup mixes clips of different videos.
            clip = rearrange(frames, "B repeats T c H W -> (repeats B) T c H W")
            clip = data.normalize(clip)  # (repeats B, 3, T, H, W)
            clip, targets = mix(tv_tensors.Video(clip), targets)
            with run.autocast():
                logits = network(clip.as_subclass(Tensor))  # (repeats B, classes)
            loss = F.cross_entropy(logits.float(), targets)
            (loss / run.accumulation).backward()
            run.add_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(lr=lr)
        if run.validation_due():
            validate(model, val_videos, run)
            model.train()

    run.log(step=run.total, test_top1=test_and_write(model, val_videos, names, run, run.folder))


@torch.inference_mode()
def test(
    model: nn.Module, videos: list[Path], run: Run, clips: int, crops: int, title: str
) -> tuple[Tensor, list[str]]:
    """Class probabilities (videos, classes): the mean softmax of clips x crops views (Sec. 4.2, 5 x 3 on Kinetics).

    Also returns why some videos could not be read; their rows are nan. Each process tests a part of the videos and
    returns the whole.
    """
    options = run.config.data
    sampling = dict(frames=options.frames, stride=options.stride, sampling=options.sampling, size=options.size)
    mine, at_most = range(run.rank, len(videos), run.world_size), run.config.run.batch_per_device
    batches = data.loader(
        data.TestViews(videos, **sampling, clips=clips, crops=crops),
        options.workers,
        batch_size=max(1, at_most // (clips * crops)),  # videos whose views fit on the device
        sampler=mine,
        collate_fn=data.collate_views,
    )
    model.eval()
    found, broken = [], []
    with tqdm(total=len(mine), desc=title, unit="video", disable=run.rank > 0) as bar:
        for indices, views, unreadable in batches:
            broken += unreadable
            if views is not None:  # (B, V, T, 3, H, W), V = clips x crops
                with run.autocast():
                    parts = views.to(run.device, non_blocking=True).flatten(0, 1).split(at_most)
                    logits = torch.cat([model(data.normalize(part)) for part in parts])  # (B V, classes)
                probabilities = logits.float().softmax(dim=1).unflatten(0, (len(indices), -1))  # (B, V, classes)
                probabilities = probabilities.mean(dim=1)  # (B, classes)
                found.append((indices, probabilities))
            bar.update(len(indices) + len(unreadable))
    scores = torch.full((len(videos), model.options["classes"]), float("nan"))
    for indices, probabilities in gather([(indices, probabilities.cpu()) for indices, probabilities in found]):
        scores[indices] = probabilities
    return scores, [reason for _, reason in sorted(gather(broken))]


def accuracy(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent. A video that could not be read, its row nan, counts as wrong."""
    ranked = scores.nan_to_num(-1).topk(min(5, scores.shape[1]), dim=1).indices  # (videos, 5)
    right = (ranked == labels[:, None]) & ~scores.isnan().any(dim=1, keepdim=True)  # (videos, 5)
    return 100 * right[:, 0].float().mean().item(), 100 * right.any(dim=1).float().mean().item()


def validate(model: nn.Module, videos: LabelledVideos, run: Run) -> None:
    """Log and print the accuracy from one view of each video."""
    epoch = (run.step + 1) // run.steps_per_epoch
    scores, broken = test(model, [path for path, _ in videos], run, 1, 1, f"epoch {epoch}, one view")
    top1, top5 = accuracy(scores, torch.tensor([label for _, label in videos]))
    run.log(step=run.step + 1, epoch=epoch, top1=top1, top5=top5)
    tested = f"{len(videos):,} videos" + (f", {len(broken)} of them unreadable" if broken else "")
    say(f"epoch {epoch}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {tested}, one view")


def test_and_write(
    model: nn.Module, videos: LabelledVideos, names: list[str], run: Run, folder: Path, as_json: bool = False
) -> float:
    """Test as the paper does: print top-1 and top-5, write scores.csv and classes.csv into `folder`, return top-1."""
    clips, crops = run.config.data.test_clips, run.config.data.test_crops
    scores, broken = test(model, [path for path, _ in videos], run, clips, crops, f"testing {clips} x {crops} views")
    top1, top5 = accuracy(scores, torch.tensor([label for _, label in videos]))
    if run.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder, videos, scores, names)
        for reason in broken:
            say(f"counted as wrong: {reason}")
        tested = f"{len(videos):,} videos" + (f", {len(broken)} of them unreadable" if broken else "")
        result = f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {tested}, {clips} x {crops} views: {folder / 'scores.csv'}"
        facts = dict(top1=top1, top5=top5, videos=len(videos), unreadable=len(broken), clips=clips, crops=crops)
        print(json.dumps(facts) if as_json else result, flush=True)
    return top1


def test_weights(arguments: argparse.Namespace) -> None:
    """`--test`: the accuracy of any fine-tuned checkpoint; the scores go next to it or into `--out`."""
    weights, config = arguments.weights, stored_config(arguments.weights, DEFAULT, arguments.settings)
    check(config)
    run = Run(config, DEFAULT)
    known = read_checkpoint(weights)[1].get("classes")
    _, videos, names = labelled_videos(*toy.find(config.data), config.data.per_class, known)
    model = build_from_checkpoint(weights, VideoClassifier, config.model.pretrained_clip).to(run.device)
    if known and known != names:
        raise UserError(f"{weights} was trained on other classes than these videos have: set data.classes")
    if model.options["classes"] != len(names):
        what = f"{weights} has {model.options['classes']} classes, the dataset {len(names)}"
        raise UserError(f"{what}: set data.classes")
    test_and_write(model, videos, names, run, arguments.out or weights_file(weights).parent, arguments.json)


def predict_videos(arguments: argparse.Namespace) -> None:
    """`--predict`: print the five most probable classes of each video, and write them to `--out`."""
    if arguments.out and arguments.out.suffix not in (".csv", ".json"):
        raise UserError(f"--out {arguments.out}: predictions are written to a .csv or .json file")
    weights, config = arguments.weights, stored_config(arguments.weights, DEFAULT, arguments.settings)
    check(config)
    run = Run(config, DEFAULT)
    model = build_from_checkpoint(weights, VideoClassifier, config.model.pretrained_clip).to(run.device)
    names = class_names(weights, config, model.options["classes"])
    videos, (clips, crops) = named_videos(arguments.predict), (config.data.test_clips, config.data.test_crops)
    scores, broken = test(model, videos, run, clips, crops, "predicting")
    for reason in broken:
        say(f"cannot be read: {reason}")
    if run.rank == 0:
        found = most_probable(videos, scores, names)
        if arguments.out:
            write_predictions(arguments.out, found)
        if arguments.json:
            print(json.dumps(found))
        for video, classes in found.items() if not arguments.json else ():
            print(video, *(f"  {100 * p:5.1f} %  {name}" for name, p in classes.items()), sep="\n")
    if len(broken) == len(videos):
        raise UserError("none of the videos can be read; see above")


def class_names(weights: Path, config: SimpleNamespace, classes: int) -> list[str]:
    """A checkpoint's classes: its own, those of data.classes, of a config.json (Hugging Face) or numbers."""
    content = read_checkpoint(weights)[1]
    names, labels = content.get("classes"), content["config.json"].get("id2label", {})
    if not names and config.data.classes:
        names = Classes(config.data.root, config.data.classes, []).names
    names = names or [labels[str(number)] for number in range(len(labels))] or [str(i) for i in range(classes)]
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
    add(
        "--out",
        type=Path,
        help="--test, --compare: folder, default that of the weights, of the second scores.csv; "
        "--predict: a .csv or .json file",
    )
    arguments = parse(parser)
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
