"""Draw detected actions into copies of your own videos, and write the detections as csv files next to them.

    python -m tools.draw_detections VIDEO... --weights runs/detect/toy/checkpoint.pt --boxes PERSONS.csv

The persons are those in --boxes: rows video,second,x1,y1,x2,y2,,score, where video is the file's name without suffix.
Or they are those that --detector finds once a second. Without both, there is one box a second: the whole frame.
Videos without persons and those that cannot be read are named and left out.
"""

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
from tqdm import tqdm

import detect_ava
from support import ava
from support.config import UserError, parse, say
from support.lists import named_videos
from support.pictures import draw_persons
from support.processes import launch, start_processes
from support.video import BrokenVideo, Video, write_mp4
from support.weights import build_from_checkpoint, read_checkpoint, stored_config


def load_person_detector(path: Path) -> nn.Module:
    """Return torchvision's Faster R-CNN for COCO's classes, with the weights from a file. Raises UserError."""
    person_detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    try:
        person_detector.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # many types for one mistake
        raise UserError(f"{path} does not hold the weights of torchvision's fasterrcnn_resnet50_fpn_v2") from None
    return person_detector.eval()


@torch.inference_mode()
def persons_each_second(path: Path, person_detector: nn.Module | None, options: SimpleNamespace) -> ava.KeyFrames:
    """Return the persons that a detector finds at each second of a video, or without one, whole frames."""
    rows = []
    with Video(path) as video:
        times = video.times
        for second in range(round(times[-1]) + 1):
            boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
            if person_detector:
                image = video.frames([detect_ava.nearest(times, Fraction(second))])[0]  # (3, H, W)
                height, width = image.shape[1:]
                found = person_detector([image.to(next(person_detector.parameters()).device) / 255])[0]
                kept = (found["labels"] == 1) & (found["scores"] >= options.threshold)  # COCO's class 1: person
                boxes = found["boxes"][kept].cpu() / torch.tensor([width, height] * 2)  # (P, 4)
                scores = found["scores"][kept]
            for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
                rows.append(ava.Row((path.stem, options.starts_at + second), tuple(box), 0, score))
    return ava.key_frames(rows)


def draw_video(path: Path, out: Path, rows: ava.Rows, names: dict[int, str], classes: int, starts_at: int) -> None:
    """Write rows as csv, and a video as mp4 in which each frame has the nearest, if within half a second."""
    if out.exists() and out.samefile(path):
        raise UserError(f"{path} would be overwritten: give another --out")
    frames = ava.key_frames(rows)
    persons = list(frames.values())
    key_times = [Fraction(str(second)) - starts_at for _, second in frames]

    def drawn(movie: Video) -> Iterator[Tensor]:
        images = tqdm(movie.every_frame(), "drawing", len(movie), unit="frame")
        for time, image in zip(movie.times, images, strict=True):
            index = detect_ava.nearest(key_times, time)
            near = abs(key_times[index] - time) <= Fraction(1, 2)
            picture = draw_persons(image, *ava.to_persons(persons[index] if near else [], classes), names, "orange")
            yield picture[:, : picture.shape[1] // 2 * 2, : picture.shape[2] // 2 * 2]  # H.264 wants even sizes

    out.parent.mkdir(parents=True, exist_ok=True)
    ava.write_rows(out.with_suffix(".csv"), rows)
    with Video(path) as movie:
        write_mp4(out, drawn(movie), movie.rate)
    print(f"{len({(row.frame, row.box) for row in rows})} boxes in {len(frames)} key frames: {out}", flush=True)


def draw_detections(arguments: argparse.Namespace) -> None:
    """Detect and draw in all videos that can be read. Raises UserError if there is none."""
    weights, videos, out = arguments.weights, named_videos(arguments.videos), arguments.out
    config = stored_config(weights, detect_ava.DEFAULT, arguments.settings)
    detect_ava.check(config)
    options = config.data
    movies = {video.stem: video for video in videos}
    if len(movies) < len(videos):
        raise UserError("two of the videos have the same name, and so would their results: draw them one at a time")
    processes = start_processes(config.run.precision, config.data.workers)
    model = build_from_checkpoint(weights, detect_ava.ActionDetector, config.model.pretrained_clip).to(processes.device)
    boxes, person_detector = {}, None
    if arguments.boxes:
        file_list = Path(options.root, options.file_list) if options.file_list else None
        sizes = ava.movie_sizes(movies) if arguments.boxes.suffix == ".json" else {}
        boxes = ava.read_person_boxes(arguments.boxes, options.threshold, file_list, sizes)
    if arguments.detector:
        person_detector = load_person_detector(arguments.detector).to(processes.device)
    names = read_checkpoint(weights)[1].get("actions", {})
    done = 0
    for name, path in movies.items():
        try:
            persons = {frame: rows for frame, rows in boxes.items() if frame[0] == name}
            if not arguments.boxes:
                persons = persons_each_second(path, person_detector, options)
            if not persons:
                raise UserError(f"no person in video {name} has a score of {options.threshold} or more")
            batches = detect_ava.KeyFrameBatches(persons, movies, options, config.run.batch_per_device)
            rows, broken = detect_ava.detect(model, batches, processes, config, f"detecting in {name}")
            for reason in broken:
                say(f"no detections: {reason}")
            file = out if out.suffix == ".mp4" and len(videos) == 1 else out / f"{name}.mp4"
            if processes.rank == 0:
                draw_video(path, file, rows, names, model.options["classes"], options.starts_at)
            done += 1
        except (BrokenVideo, UserError) as error:
            say(f"left out: {error}")
    if not done:
        raise UserError("nothing could be drawn; the lines above say why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, exclusive = parser.add_argument, parser.add_mutually_exclusive_group()
    add("videos", nargs="+", type=Path, metavar="VIDEO", help="videos (mp4 or Matroska), folders or lists of videos")
    add("--weights", type=Path, required=True, help="checkpoint of action detection, this project's or the official")
    exclusive.add_argument("--boxes", type=Path, metavar="FILE", help="persons: csv, or json as AIA has it")
    exclusive.add_argument("--detector", type=Path, metavar="FILE", help="weights of fasterrcnn_resnet50_fpn_v2")
    add("--out", type=Path, default=Path("runs/detections"), help="folder, default runs/detections; or one .mp4")
    draw_detections(parse(parser, detect_ava.DEFAULT))


if __name__ == "__main__":
    launch(main)
