"""Detections drawn into videos: persons from a file, from a detector, or whole frames."""

from pathlib import Path

import av
import pytest
import torch
from conftest import number_of, run, write_numbered
from test_detect_ava import configured

from support import ava
from support import toy_ava as toy
from support.config import UserError
from tools import draw_detections


@pytest.fixture
def weights(finished) -> Path:
    return finished("detect_ava") / "checkpoint.pt"


def film(path: Path, frames: int) -> Path:
    """Ten frames a second, each showing its number."""
    return write_numbered(path, frames, times=[100 * number for number in range(frames)])


def seconds_of(path: Path) -> list[float]:
    return sorted({row.frame[1] for row in ava.read_detections(path, 12)})


def orange_in(path: Path) -> torch.Tensor:
    """Where the frames of a video are orange, as boxes are: (T, H, W)."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")).int() for frame in container.decode(video=0)]
    red, green, blue = torch.stack(frames).unbind(dim=3)
    return (red > 200) & ((green - 165).abs() < 40) & (blue < 60)


def test_whole_frames_of_videos_folders_and_lists(weights, tmp_path):
    """One box at each second, which is drawn. A video that cannot be read is named and the others are drawn."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    (folder / "below").mkdir(parents=True)
    film(folder / "one.mp4", 31), film(folder / "below/two.mkv", 6), film(tmp_path / "three.mp4", 12)
    (folder / "text.mp4").write_text("not a video")
    (tmp_path / "list.txt").write_text("three.mp4\n")
    options = ["--weights", weights, "--out", out, "data.workers=0"]
    done = run("tools.draw_detections", folder, tmp_path / "list.txt", *options)
    assert "left out: " in done.stderr and "text.mp4" in done.stderr and "Traceback" not in done.stderr
    names = [f"{name}.{suffix}" for name in ("one", "three", "two") for suffix in ("csv", "mp4")]
    assert sorted(path.name for path in out.iterdir()) == names
    seconds = {name: seconds_of(out / f"{name}.csv") for name in ("one", "two", "three")}
    assert seconds == dict(one=[900, 901, 902, 903], two=[900], three=[900, 901])  # the toy's start at second 900
    assert {row.box for row in ava.read_detections(out / "one.csv", 12)} == {(0, 0, 1, 1)}
    assert len(orange_in(out / "one.mp4")) == 31

    (folder / "below/three.mp4").write_bytes((tmp_path / "three.mp4").read_bytes())
    mistakes = {
        (folder / "text.mp4", *options): "nothing could be drawn",
        (folder / "below", tmp_path / "three.mp4", *options): "two of the videos have the same name",
        (tmp_path / "three.mp4", *options[:2], "--out", tmp_path): "three.mp4 would be overwritten",
    }
    before = (tmp_path / "three.mp4").read_bytes()
    for words, sentence in mistakes.items():
        done = run("tools.draw_detections", *words, ok=False)
        assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "three.mp4").read_bytes() == before


def test_persons_from_a_file(weights, toy_ava, tmp_path):
    videos, out = toy_ava / "videos", tmp_path / "out/drawn.mp4"
    options = ["--boxes", toy_ava / "boxes/ava_val_predicted_boxes.csv", "data.workers=0"]
    options += ["--weights", weights]
    done = run("tools.draw_detections", videos / "val_00001.mp4", *options, "--out", out)
    orange = orange_in(out)
    assert len(orange) == toy.FRAMES and orange.any() and "key frames: " in done.stdout
    rows = ava.read_detections(out.with_suffix(".csv"), 8)
    assert {row.frame[0] for row in rows} == {"val_00001"} and {row.action for row in rows} == set(range(1, 9))
    done = run("tools.draw_detections", videos / "train_00001.mp4", *options, ok=False)
    assert done.returncode and "no person in video train_00001" in done.stderr and "Traceback" not in done.stderr


def test_boxes_at_fractions_of_a_second_are_drawn_on_the_nearest_frames(weights, tmp_path):
    film(tmp_path / "film.mp4", 40)
    (tmp_path / "boxes.csv").write_text("film,1.5,0.25,0.25,0.75,0.75,,0.9\nfilm,1.7,0,0,0.5,0.5,,0.9\n")
    options = ["--boxes", tmp_path / "boxes.csv", "--weights", weights, "data.starts_at=0", "data.workers=0"]
    run("tools.draw_detections", tmp_path / "film.mp4", *options, "--out", tmp_path / "drawn.mp4")
    assert seconds_of(tmp_path / "drawn.csv") == [1.5, 1.7]
    orange = orange_in(tmp_path / "drawn.mp4")
    height, width = orange.shape[1:]
    right, left = orange[:, :, round(0.75 * width)].any(dim=1), orange[:, round(0.1 * height), 0:4].any(dim=1)
    assert right.nonzero().flatten().tolist() == list(range(10, 17))  # 1.0 to 1.6 s, the earlier of two equally near
    assert left.nonzero().flatten().tolist() == list(range(17, 23))  # to 2.2 s


def test_torchvisions_detector_finds_persons_once_a_second(tmp_path, monkeypatch):
    """It is never downloaded. Persons are COCO's class 1; the detector sees each second's frame in [0, 1]."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    path, seen = tmp_path / "weights.pth", []
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="weights.pth does not hold the weights of .*fasterrcnn_resnet50_fpn_v2"):
        draw_detections.load_person_detector(path)
    torch.manual_seed(0)
    source = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    with torch.no_grad():
        source.roi_heads.box_predictor.cls_score.bias[1] = 20  # everything is a person
    torch.save(source.state_dict(), path)
    detector = draw_detections.load_person_detector(path)
    path.unlink()  # 170 MB
    assert not detector.training
    detector.transform.min_size, detector.transform.max_size = (32,), 64  # as it is, it enlarges a frame to 800 pixels
    detector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    options = configured("data.starts_at=0").data
    found = draw_detections.persons_each_second(film(tmp_path / "film.mp4", 25), detector, options)
    assert list(found) == [("film", second) for second in range(3)]
    assert [number_of((image * 255).round()) for image in seen] == [0, 10, 20]
    boxes = torch.tensor([row.box for row in sum(found.values(), [])])
    assert boxes.min() >= 0 and boxes.amax(dim=0)[2:].tolist() == [1, 1]  # some reach the frame's right and lower edges
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias[2] = 40  # now everything is a bicycle
    assert not draw_detections.persons_each_second(tmp_path / "film.mp4", detector, options)
