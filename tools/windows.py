"""Windows along a long video, for tools/extract_features.py."""

from collections.abc import Iterator
from pathlib import Path

import torch

import data
from support.video import BrokenVideo, Video


def windows(path: Path, frames: int, stride: int, size: int, window_stride: int, last: str) -> Iterator[tuple]:
    """Yield clips uint8 (T, 3, size, size) along a video, and when their first and last frames are shown, in seconds.

    A clip starts every `window_stride` frames. If the last one leaves frames at the end of the video, last="repeat"
    adds a clip that repeats the last frame that it reaches. Frames are cropped as for a single test view. Each frame is
    decoded once, and only frames that later windows need are kept. Raises BrokenVideo.
    """
    with Video(path) as video:
        count, span = len(video), frames * stride
        starts = list(range(0, count - (frames - 1) * stride, window_stride))
        after = len(starts) * window_stride
        if last == "repeat" and after < count and (not starts or starts[-1] + span < count):
            starts.append(after)
        if not starts:
            raise BrokenVideo(f"{path}: its {count} frames do not fill a window; --last repeat would fill it")
        decoded, kept = enumerate(video.every_frame()), {}
        for start in starts:
            indices = [start + i for i in data.dense_clip(min(span, count - start), frames, stride)]
            kept = {index: frame for index, frame in kept.items() if index >= start}
            while indices[-1] not in kept:
                index, frame = next(decoded)
                if any((index - first) % stride == 0 for first in range(start, index + 1, window_stride)):
                    kept[index] = data.crop_views(frame[None], size, 1)[0, 0]  # (3, size, size)
            yield torch.stack([kept[index] for index in indices]), [float(video.times[i]) for i in indices]
