"""Fine-tuning, testing and predicting: action classification (Sec. 4, Table 10).

    laptop:   torchrun finetune.py                          # toy videos, from the encoder that `torchrun pretrain.py` leaves
              torchrun finetune.py init=scratch run.folder=runs/finetune/toy_scratch
    8 GPUs:   torchrun --nproc_per_node=8 finetune.py configs/finetune/ssv2_base.yaml data.root=/data/ssv2 init=pretrained.pt
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 finetune.py ...
    test:     torchrun --nproc_per_node=8 finetune.py --test --weights runs/finetune/ssv2_base/checkpoint.pt
    predict:  python finetune.py --predict VIDEO... --weights runs/finetune/toy/checkpoint.pt
    compare:  python finetune.py --compare runs/a/scores.csv runs/b/scores.csv       # Figures 7 and 8

The same command again goes on from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import csv
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import data
from model import (
    SIZES,
    VideoClassifier,
    cube_grid,
    recompute_blocks,
)
from support import toy
from support.config import UserError, as_dict, load_config, parse, pick
from support.datasets import (
    Classes,
    Entry,
    LabelledVideos,
    labelled,
    list_entries,
)
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
from support.weights import (
    build_from,
    load_weights,
    read_checkpoint,
    read_options,
)

CONFIGS = Path(__file__).parent / "configs" / "finetune"
DEFAULT = CONFIGS / "toy.yaml"


# ---- the model and its starting point (Tables 1d and 1e) ----


def check(config: SimpleNamespace) -> None:
    """Most mistakes in a configuration are found here, before any work."""
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    pick(data.SAMPLING, config.data.sampling, "data.sampling")
    for key, (least, most) in (("data.crop_area", config.data.crop_area), ("data.crop_aspect", config.data.crop_aspect)):
        if least > most:
            raise UserError(f"{key}=[{least}, {most}] has to name the smaller number first")


def check_init(init: str, *others: str) -> None:
    """UserError unless `init` is a file of weights, or one of the other words that the stage knows."""
    if init in others or Path(init).is_file():
        return
    what = f"init={init} is a folder, not a file of weights" if init and Path(init).is_dir() else f"no weights at init={init}"
    start = f", name another file, or start with init={others[0]}" if others else ", or name another file"
    raise UserError(f"{what}: make them with pretrain.py{start}")


def encoder_options(config: SimpleNamespace) -> dict[str, Any]:
    """The encoder's size, and the clips that its position table is made for: those that the weights `init` were trained on."""
    sizes = pick(SIZES, config.model.size, "model.size")
    if config.init == "scratch":
        clip_size = [config.data.frames, config.data.size, config.data.size]
    else:
        clip_size = read_checkpoint(config.init)[1].get("model_options", {}).get("clip_size", config.model.pretrained_clip)
    return {name: sizes[name] for name in ("width", "depth", "heads")} | dict(clip_size=clip_size, cube=config.model.cube)


def build(config: SimpleNamespace, classes: int) -> VideoClassifier:
    """The classifier, initialised as `init` says: "scratch" or the file of any weights that `model.load_weights` reads."""
    torch.manual_seed(config.run.seed)
    model = VideoClassifier(**encoder_options(config), classes=classes, drop_path=config.model.drop_path, dropout=config.model.dropout)
    say(f"initialised from {config.init}")
    if config.init != "scratch":
        load_weights(model, config.init, fresh=("fc_norm.", "head."))
    return model


# ---- layer-wise lr decay (Table 10) ----


def layer_of(name: str, depth: int) -> int:
    """Number of the layer that a parameter belongs to: 0 the cube embedding, then the blocks (`blocks.7` is 8), norm and head."""
    if name.startswith("encoder.patch_embed."):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def parameter_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict]:
    """With L blocks, layer i of 0 to L + 1 learns at layer_decay^(L + 1 - i) times the learning rate.

    Biases and norms have no weight decay.
    """
    depth = len(model.encoder.blocks)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        layer, decays = layer_of(name, depth), parameter.ndim > 1
        options = dict(params=[], lr_scale=layer_decay ** (depth + 1 - layer), weight_decay=weight_decay if decays else 0.0)
        group = groups.setdefault((layer, decays), options)
        group["params"].append(parameter)
    return list(groups.values())


# ---- label smoothing, mixup and cutmix (Table 10) ----


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Label smoothing: labels (B,) to probabilities (B, classes)."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mixing(mixup: float, cutmix: float) -> v2.Transform:
    """Mixup or cutmix, chosen at random for each piece of a batch (see `train`); one whose alpha is 0 is left out.

    Called with clips (B, 3, T, H, W) as a Video, of which only the batch and the last two axes matter here, and targets
    (B, classes). Each clip is mixed with its neighbour in the piece. A cutmix box is the same in all frames.
    """
    chosen = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    return v2.RandomChoice(chosen) if chosen else v2.Identity()


# ---- test: the mean over K clips x 3 crops of their softmax (Sec. 4.2: K = 2 on SSV2, 5 on K400) ----


@torch.inference_mode()
def test(
    model: nn.Module, videos: list[Path], config: SimpleNamespace, clips: int, crops: int, title: str
) -> tuple[Tensor, list[str]]:
    """Class probabilities (videos, classes) from `clips` x `crops` views of each, and why some videos could not be read.

    Each process tests its share of the videos; all of them return the whole. An unreadable video's row is all nan.
    """
    device = next(model.parameters()).device
    bf16, _ = numerics(config.run)
    rank, world_size = position()
    dataset = data.TestViews(
        videos,
        frames=config.data.frames,
        stride=config.data.stride,
        sampling=config.data.sampling,
        size=config.data.size,
        clips=clips,
        crops=crops,
    )
    share = range(rank, len(videos), world_size)
    at_once = max(1, config.run.batch_per_device // (clips * crops))  # videos whose views fit on the device
    batches = data.loader(dataset, config.data.workers, batch_size=at_once, sampler=share, collate_fn=data.collate_views)
    model.eval()
    found, broken = [], []
    with tqdm(total=len(share), desc=title, unit="video", disable=rank > 0) as bar:
        for indices, views, unreadable in batches:
            broken += unreadable
            if views is not None:  # (B, V, T, 3, H, W), V = clips x crops
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    parts = views.to(device, non_blocking=True).flatten(0, 1).split(config.run.batch_per_device)
                    logits = torch.cat([model(data.normalize(part)) for part in parts])  # (B V, classes)
                probabilities = logits.float().softmax(dim=1).unflatten(0, (len(indices), -1)).mean(dim=1)  # (B, classes)
                found.append((indices, probabilities))
            bar.update(len(indices) + len(unreadable))
    found = gather([(indices, probabilities.cpu()) for indices, probabilities in found])
    scores = torch.full((len(videos), model.options["classes"]), float("nan"))
    for indices, probabilities in found:
        scores[indices] = probabilities
    return scores, [reason for _, reason in sorted(gather(broken))]


def accuracy(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent; a video that could not be read, its row nan, counts as wrong."""
    ranked = scores.nan_to_num(-1).topk(min(5, scores.shape[1]), dim=1).indices  # (videos, 5)
    right = (ranked == labels[:, None]) & ~scores.isnan().any(dim=1, keepdim=True)  # (videos, 5)
    return 100 * right[:, 0].float().mean().item(), 100 * right.any(dim=1).float().mean().item()


def write_scores(folder: Path, videos: LabelledVideos, scores: Tensor, names: list[str]) -> None:
    """scores.csv: each video's class, prediction and probabilities. classes.csv: videos and accuracy of each class."""
    right = [0] * len(names)
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "class", "prediction", *names])
        for (path, label), row in zip(videos, scores):
            readable = not row.isnan().any()
            prediction = names[int(row.argmax())] if readable else "unreadable"
            probabilities = [f"{p:.5f}" for p in row.tolist()] if readable else [""] * len(names)
            right[label] += prediction == names[label]
            writer.writerow([path, names[label], prediction, *probabilities])
    count = [sum(label == index for _, label in videos) for index in range(len(names))]
    with open(folder / "classes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "videos", "top1"])
        writer.writerows([name, n, f"{100 * r / n:.2f}" if n else ""] for name, n, r in zip(names, count, right))


def test_and_write(model: nn.Module, videos: LabelledVideos, names: list[str], config: SimpleNamespace, folder: Path) -> float:
    """Test as the paper does: print top-1 and top-5, write the scores into `folder`, return top-1."""
    clips, crops = config.data.test_clips, config.data.test_crops
    scores, broken = test(model, [path for path, _ in videos], config, clips, crops, f"testing {clips} x {crops} views")
    top1, top5 = accuracy(scores, torch.tensor([label for _, label in videos]))
    if position()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder, videos, scores, names)
        for reason in broken:
            say(f"counted as wrong: {reason}")
        tested = f"{len(videos):,} videos" + (f", {len(broken)} of them unreadable" if broken else "")
        print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {tested}, {clips} x {crops} views: {folder / 'scores.csv'}", flush=True)
    return top1


# ---- training ----


def find_videos(
    config: SimpleNamespace, world_size: int, known: list[str] | None = None
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Labelled videos for training and for testing, and the names of the classes.

    If the classes are `known`, from a checkpoint, testing needs no training videos.
    """
    root, train, val = toy.find(config.data, world_size)
    classes = config.data.classes if config.data.root else "classes.txt"
    if known and val:
        table = Classes(root, classes, [Entry(Path(), name, "") for name in known])
        names = known if sorted(known) == sorted(table.names) else table.names  # in the order of the model's outputs
        videos, val_videos = [], []
        for entry in list_entries(root, val):
            name = table.names[table.index(entry)]
            val_videos.append((entry.path, names.index(name)))
    else:
        videos, val_videos, names = labelled(root, train, val, classes, config.data.per_class)
    if not any(path.exists() for path, _ in val_videos):  # known now, not after days of training
        raise UserError(f"none of the {len(val_videos)} test videos is there, the first one being {val_videos[0][0]}: look at data.root and data.val")
    return videos, val_videos, names


def train(config: SimpleNamespace) -> None:
    """Run, or go on with, the experiment that `config` describes; test it at the end."""
    check(config)
    check_init(config.init, "scratch")
    bf16, compiled = numerics(config.run)
    rank, world_size, device = start_processes(config.data.workers)
    chief = rank == 0
    videos, val_videos, names = find_videos(config, world_size)
    model = build(config, len(names)).to(device)
    if config.run.recompute:
        recompute_blocks(model)
    clips = data.LabelledClips(
        videos,
        frames=config.data.frames,
        stride=config.data.stride,
        sampling=config.data.sampling,
        augment=data.Augmentation(
            size=config.data.size,
            randaugment=config.data.randaugment,
            area=config.data.crop_area,
            aspect=config.data.crop_aspect,
            flip=config.data.flip,
            erase=config.data.erase,
        ),
        repeats=config.data.repeats,
        seed=config.run.seed,
    )
    clips[0, 0]  # stops here if no video can be read

    batch_size = config.optim.batch_size
    at_most = max(1, config.run.batch_per_device // config.data.repeats)  # videos at a time on a device
    per_device, accumulation = share_batch(batch_size, len(videos), world_size, at_most)
    if per_device == 1 and config.optim.mixup + config.optim.cutmix > 0:
        raise UserError(
            "one video at a time has no other to be mixed with: raise run.batch_per_device, or set optim.mixup=0 optim.cutmix=0"
        )
    steps_per_epoch = len(videos) // batch_size
    steps, warmup = config.optim.epochs * steps_per_epoch, config.optim.warmup_epochs * steps_per_epoch
    peak_lr, end_lr = config.optim.base_lr * batch_size / 256, config.optim.min_lr * batch_size / 256  # Sec. B; repeats do not count

    groups = parameter_groups(model, config.optim.layer_decay, config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    folder, checkpoint = open_folder(config)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters, on {world_size} x {device.type}\n"
        f"{len(videos):,} videos for training, {len(val_videos):,} for testing, {len(names)} classes; "
        f"clips of {config.data.frames} frames, {config.data.size} x {config.data.size} pixels\n"
        f"batch {batch_size} = {world_size} processes x {accumulation} accumulated x {per_device} videos, "
        f"each {config.data.repeats} times; learning rate {config.optim.base_lr:g} x {batch_size} / 256 = {peak_lr:.4g}, "
        f"times {groups[0]['lr_scale']:.3g} in the cube embedding\n"
        f"{steps:,} steps = {config.optim.epochs} epochs x {steps_per_epoch:,}; starting at step {start:,}"
    )

    predict = torch.compile(model) if compiled else model
    if world_size > 1:
        predict = DistributedDataParallel(predict, gradient_as_bucket_view=True, broadcast_buffers=False)
    batches = data.training_batches(clips, config.data.workers, batch_size=batch_size, per_device=per_device, start=start, steps=steps)
    mix = mixing(config.optim.mixup, config.optim.cutmix)
    progress = Progress(config.run, start, steps, batch_size * config.data.repeats, device)

    model.train()
    for step in progress:
        learning_rate = warmup_cosine(step, steps, warmup, peak_lr, end_lr)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        for piece in range(accumulation):
            frames, labels, broken = progress.next(batches)  # (B, repeats, T, 3, H, W), (B,)
            progress.report(broken)
            frames, labels = (x.to(device, non_blocking=True) for x in (frames, labels))
            targets = soft_targets(labels, len(names), config.optim.label_smoothing).repeat(config.data.repeats, 1)  # (repeats B, classes)
            # First one augmentation of all videos, then the next: neighbours, which mixup mixes, are different videos.
            clip = data.normalize(rearrange(frames, "B repeats T c H W -> (repeats B) T c H W"))  # (repeats B, 3, T, H, W)
            # Mixup, drop path and dropout are a function of the step, so that a resumed run repeats them.
            torch.manual_seed(pick_below(2**62, sample_generator(config.run.seed, step * accumulation + piece, -2 - rank)))
            clip, targets = mix(tv_tensors.Video(clip), targets)
            with predict.no_sync() if world_size > 1 and piece < accumulation - 1 else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = predict(clip.as_subclass(Tensor))  # (repeats B, classes)
                loss = F.cross_entropy(logits.float(), targets)
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
                # Positions are no parameter. Most can be computed again, but not those that came with image weights.
                content = dict(model=model.state_dict(), model_options=model.options, positions=model.encoder.pos_embed, classes=names)
                content |= dict(optimizer=optimizer.state_dict(), step=done, config=as_dict(config))
                save_checkpoint(folder / "checkpoint.pt", **content)
        if config.run.validate_every and done % (config.run.validate_every * steps_per_epoch) == 0 and done < steps:
            progress.flush()
            scores, _ = test(model, [path for path, _ in val_videos], config, 1, 1, f"epoch {done // steps_per_epoch}, one view")
            top1, top5 = accuracy(scores, torch.tensor([label for _, label in val_videos]))
            if chief:
                progress.log.write(step=done, epoch=done // steps_per_epoch, top1=top1, top5=top5)
            say(f"epoch {done // steps_per_epoch}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(val_videos):,} videos, one view")
            model.train()

    if progress.broken:
        say(f"{len(progress.broken)} broken videos were replaced by others: {folder / 'broken_videos.txt'}")
    top1 = test_and_write(model, val_videos, names, config, folder)
    if chief:
        progress.log.write(step=steps, test_top1=top1)


# ---- testing and predicting with weights from anywhere ----


def stored_config(weights: Path, settings: list[str]) -> SimpleNamespace:
    """The configuration for weights: a .yaml file if given, else the checkpoint's own, else Kinetics' for weights from elsewhere."""
    if "classes" not in read_options(weights):
        raise UserError(f"{weights} is not a fine-tuned checkpoint, with its classes: make one with finetune.py")
    stored = read_checkpoint(weights)[1].get("config")
    if not stored:
        stored = as_dict(load_config(DEFAULT, [str(CONFIGS / "k400_base.yaml")]))
    config = load_config(DEFAULT, settings, stored)
    check(config)
    return config


def class_names(weights: Path, config: SimpleNamespace, classes: int) -> list[str]:
    """Names of a checkpoint's classes: its own, those of data.classes, of a config.json beside it (Hugging Face), or numbers."""
    own = read_checkpoint(weights)[1].get("classes")
    beside = weights.with_name("config.json")
    if own:
        names = own
    elif config.data.classes:
        names = Classes(config.data.root, config.data.classes, []).names
    elif beside.exists() and "id2label" in (content := json.loads(beside.read_text())):
        names = [content["id2label"][str(number)] for number in range(len(content["id2label"]))]
    else:
        names = [str(number) for number in range(classes)]
    if len(names) != classes:
        raise UserError(f"{weights} has {classes} classes, but data.classes={config.data.classes} names {len(names)}")
    return names


def test_weights(arguments: argparse.Namespace) -> None:
    """`--test`: the accuracy of any fine-tuned checkpoint, the scores of each video beside it or in `--out`."""
    config = stored_config(arguments.weights, arguments.settings)
    _, world_size, device = start_processes(config.data.workers)
    known = read_checkpoint(arguments.weights)[1].get("classes")
    _, videos, names = find_videos(config, world_size, known)
    model = build_from(VideoClassifier, arguments.weights, config.model.pretrained_clip).to(device)
    if known and known != names:
        raise UserError(f"{arguments.weights} was trained on other classes than these videos have: set data.classes")
    if model.options["classes"] != len(names):
        raise UserError(f"{arguments.weights} has {model.options['classes']} classes, the dataset {len(names)}: set data.classes")
    test_and_write(model, videos, names, config, arguments.out or arguments.weights.parent)


def predict_videos(arguments: argparse.Namespace) -> None:
    """`--predict`: the five most probable classes of each video."""
    config = stored_config(arguments.weights, arguments.settings)
    _, _, device = start_processes(config.data.workers)
    model = build_from(VideoClassifier, arguments.weights, config.model.pretrained_clip).to(device)
    names = class_names(arguments.weights, config, model.options["classes"])
    scores, broken = test(model, arguments.predict, config, config.data.test_clips, config.data.test_crops, "predicting")
    for reason in broken:
        say(f"cannot be read: {reason}")
    for video, row in zip(arguments.predict, scores):
        if position()[0] == 0 and not row.isnan().any():
            print(video)
            for probability, index in zip(*(x.tolist() for x in row.topk(min(5, len(names))))):
                print(f"  {100 * probability:5.1f} %  {names[index]}")
    if len(broken) == len(arguments.predict):
        raise UserError("none of the videos can be read; see above")


# ---- two models compared class by class (Sec. D, Figures 7 and 8) ----


def compare(files: list[Path], out: Path, most: int = 20) -> None:
    """Print and draw the classes in which either of two tested models is most ahead of the other; `files`: two scores.csv."""
    accuracies = [class_accuracy(file) for file in files]
    shared = accuracies[0].keys() & accuracies[1].keys()
    if not shared:
        raise UserError(f"{files[0]} and {files[1]} have no class in common: they have to be of the same dataset")
    rows = sorted(((accuracies[1][name] - accuracies[0][name], name) for name in shared), reverse=True)
    if len(rows) > 2 * most:
        rows = rows[:most] + rows[-most:]
    print(f"top-1 by class: {files[1]} (second) against {files[0]} (first)\n{'first':>7} {'second':>7} {'ahead':>7}  class")
    for ahead, name in rows:
        print(f"{accuracies[0][name]:7.2f} {accuracies[1][name]:7.2f} {ahead:+7.2f}  {name}")
    font, line, middle, unit = ImageFont.load_default(12), 18, 460, 2  # pixels; a percent is two wide
    sheet = Image.new("RGB", (middle + 220 + 60, line * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), f"ahead: {files[1]} (right, blue), {files[0]} (left, orange)", "black", font)
    for row, (ahead, name) in enumerate(rows, 1):
        top, end = row * line + 4, middle + unit * ahead
        draw.text((4, top - 2), name[:36], "black", font)
        draw.rectangle((min(middle, end), top, max(middle, end), top + line - 6), "steelblue" if ahead > 0 else "orange")
        draw.text((max(middle, end) + 6, top - 2), f"{ahead:+.1f}", "black", font)
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "comparison.png")
    say(f"{out / 'comparison.png'}")


def class_accuracy(file: Path) -> dict[str, float]:
    """Top-1 in percent by class, from a scores.csv."""
    try:
        with open(file, newline="") as opened:
            rows = [(row["class"], row["prediction"]) for row in csv.DictReader(opened)]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{file} is not a scores.csv as --test writes it") from None
    right: dict[str, list[bool]] = {}
    for name, prediction in rows:
        right.setdefault(name, []).append(name == prediction)
    return {name: 100 * sum(of_class) / len(of_class) for name, of_class in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="test --weights instead of training")
    parser.add_argument("--predict", nargs="+", type=Path, metavar="VIDEO", help="print the classes of these videos according to --weights")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="SCORES.csv", help="compare two tested models class by class")
    parser.add_argument("--weights", type=Path, help="fine-tuned checkpoint: this project's, official or Hugging Face's")
    parser.add_argument("--out", type=Path, help="folder for results; default: that of the weights, or of the second scores.csv")
    arguments = parse(parser)
    if (arguments.test or arguments.predict) and not arguments.weights:
        raise UserError("--test and --predict need --weights FILE, a fine-tuned checkpoint such as runs/finetune/toy/checkpoint.pt")
    if arguments.weights and not (arguments.test or arguments.predict):
        raise UserError("--weights goes with --test or --predict; training starts from weights with init=FILE")
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
