"""Exact frames from any video file, excerpts of long movies, writing mp4."""

import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import TracebackType

import av
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

RATE = 30  # frames a second that a stride counts, whatever the movie's own rate
START = 900  # second of each movie at which AVA's 15 minutes begin


class BrokenVideo(Exception):
    """A file that holds no readable video, or not the frames asked for. Its text names the file and the reason."""


# ---- frames from a file ----


class Video:
    """A video file, opened for exact access to single frames; use it in a `with` statement. Raises BrokenVideo.

    `len(video)` is its number of frames, `video.frames(indices)` decodes those wanted and as little else as possible.

    Every packet is read (2 ms for 10 s of video) but none decoded to learn when each frame is shown. A wanted frame is
    then decoded from the key frame before it, and frames on the way that no other frame refers to are skipped.
    Only mp4 and Matroska files state the time of every frame. In others, AVI above all (UCF101, HMDB51), FFmpeg guesses
    times and guesses wrong for B-frames: there frames are counted from the start.
    """

    TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.reformatter = VideoReformatter()  # one for all frames: a new one each time costs a third of the decoding
        try:
            self.container = av.open(str(path))
            try:
                self._index_packets()
            except BaseException:
                self.container.close()
                raise
        except (av.FFmpegError, ValueError, UnicodeError) as error:
            raise BrokenVideo(f"{path}: {error}") from error

    def _index_packets(self) -> None:
        self.stream = self.container.streams.best("video")  # a file may hold several, such as a cover picture
        if self.stream is None:
            raise BrokenVideo(f"{self.path}: no video stream")
        self.stream.thread_type, self.stream.thread_count = "NONE", 1  # loader workers are the parallelism
        self.packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        shown = [position for position, packet in enumerate(self.packets) if not packet.is_discard]
        if not shown:
            raise BrokenVideo(f"{self.path}: no frames")
        times = [self.packets[position].pts for position in shown]
        self.timed = self.container.format.name in self.TIMED and None not in times and len(set(times)) == len(times)
        # positions[i]: where, in the order of decoding, the packet of the i-th shown frame stands
        self.positions = sorted(shown, key=lambda position: self.packets[position].pts) if self.timed else shown

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.container.close()

    def __len__(self) -> int:
        return len(self.positions)

    def frames(self, indices: list[int]) -> Tensor:
        """uint8 RGB (len(indices), 3, H, W), upright, frames counted from 0 in the order of display."""
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"{self.path}: frames {indices} asked for, but it has frames 0 to {len(self) - 1}")
        try:
            found = self._decode_by_time(wanted) if self.timed else self._decode_by_counting(wanted)
        except (av.FFmpegError, ValueError) as error:
            raise BrokenVideo(f"{self.path}: {error}") from error
        if len(found) < len(wanted):
            missing = next(index for index in wanted if index not in found)
            raise BrokenVideo(f"{self.path}: frame {missing} of {len(self)} cannot be decoded")
        frames = torch.stack([found[index] for index in indices])  # (len(indices), H, W, 3)
        return frames.permute(0, 3, 1, 2)  # channels stay last in memory: the fastest to copy and to resize

    def every_frame(self) -> Iterator[Tensor]:
        """All frames in the order of display, uint8 RGB (3, H, W), upright. Raises BrokenVideo at the first that is missing."""
        codec, count = self.stream.codec_context, 0
        codec.flush_buffers()
        codec.skip_frame = "DEFAULT"
        try:
            for packet in (*self.packets, None):
                for frame in codec.decode(packet):
                    if frame.is_corrupt:
                        raise BrokenVideo(f"{self.path}: frame {count} of {len(self)} is damaged")
                    count += 1
                    yield self._to_rgb(frame).permute(2, 0, 1)
        except (av.FFmpegError, ValueError) as error:
            raise BrokenVideo(f"{self.path}: frame {count} of {len(self)}: {error}") from error
        if count != len(self):
            raise BrokenVideo(f"{self.path}: only {count} of {len(self)} frames can be decoded")

    def _decode_by_time(self, wanted: list[int]) -> dict[int, Tensor]:
        packets, codec = self.packets, self.stream.codec_context
        index_of = {packets[self.positions[index]].pts: index for index in wanted}
        stretches = []  # packets from the key frame that a wanted frame needs to the frame itself: [first, last]
        for last in (self.positions[index] for index in wanted):
            first = last
            # In an open GOP, frames shown before a key frame are stored after it and need the one before that.
            while first and not (packets[first].is_keyframe and packets[first].pts <= packets[last].pts):
                first -= 1
            stretches.append([first, last])
        runs: list[list[int]] = []  # the same where they overlap or touch, as one
        for first, last in sorted(stretches):
            if runs and first <= runs[-1][1] + 1:
                runs[-1][1] = max(runs[-1][1], last)
            else:
                runs.append([first, last])
        found = {}
        for first, last in runs:
            codec.flush_buffers()
            for packet in (*packets[first : last + 1], None):
                if packet is not None:
                    codec.skip_frame = "DEFAULT" if packet.pts in index_of else "NONREF"
                for frame in codec.decode(packet):
                    if frame.pts in index_of:
                        found[index_of[frame.pts]] = self._to_rgb(frame)
        return found

    def _decode_by_counting(self, wanted: list[int]) -> dict[int, Tensor]:
        codec, shown, found = self.stream.codec_context, 0, {}
        codec.flush_buffers()
        codec.skip_frame = "DEFAULT"
        for packet in (*self.packets, None):
            for frame in codec.decode(packet):
                if shown in wanted:
                    found[shown] = self._to_rgb(frame)
                shown += 1
            if shown > wanted[-1]:
                break
        return found

    def _to_rgb(self, frame: av.VideoFrame) -> Tensor:
        size = dict(width=self.stream.width, height=self.stream.height)  # should the size change within a stream
        image = torch.from_numpy(self.reformatter.reformat(frame, format="rgb24", threads=1, **size).to_ndarray())  # (H, W, 3)
        quarter_turns = round(frame.rotation / 90)  # phones film sideways and say so in the container
        return image.rot90(quarter_turns) if quarter_turns else image


def read_frames(path: str | Path, indices: list[int]) -> Tensor:
    """uint8 RGB (len(indices), 3, H, W), upright: exactly the frames asked for, in the order of display."""
    with Video(path) as video:
        return video.frames(indices)


def write_mp4(
    path: Path, frames: Iterable[Tensor], rate: int | Fraction, quantizer: int = 18,
    options: dict[str, str] | None = None, times: Sequence[int] | None = None, unit: Fraction | None = None
) -> None:  # fmt: skip
    """Write frames uint8, each (3, H, W) with H and W even, as H.264.

    With a constant `quantizer` the same frames give the same file; x264's usual rate control, which `options` can ask
    for, is not reproducible to the bit.
    times: when each frame is shown, in units of `unit` seconds; without them, `rate` frames a second.
    """
    options = options or {"qp": str(quantizer), "preset": "ultrafast"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={**options, "threads": "1"})
        stream.pix_fmt = "yuv420p"
        if times:
            stream.codec_context.time_base = unit
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[1:]
            image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")  # (H, W, 3)
            if times:
                image.pts, image.time_base = times[number], unit
            container.mux(stream.encode(image))
        container.mux(stream.encode())


# ---- the clip around a key frame: time, not a frame's number, decides ----


def clip_times(second: int, frames: int, stride: int, rate: float = RATE) -> list[Fraction]:
    """When, in seconds, the frames of the clip around `second` are shown; the key frame is the first of the second half.

    Frames are `stride` frames apart at the nominal `rate`: 16 x 4 at 30 a second reach from -32/30 s to +28/30 s.
    """
    return [second + Fraction((i - frames // 2) * stride) / Fraction(rate) for i in range(frames)]


def read_clip(path: Path, second: int, *, frames: int, stride: int, rate: float = RATE, starts_at: int = START) -> Tensor:
    """The clip of T = `frames` frames around the key frame at `second` of a movie: uint8 (T, 3, H, W). Raises BrokenVideo.

    path: a movie file, or a folder of frames extracted at 30 a second, as SlowFast has them: <video>_000001.jpg, ...
    starts_at: the second of the movie at which the file or folder starts: 900 if it was cut to AVA's part, 0 if it is whole.
    Before the start and after the end the first and the last frame stand in.
    """
    times = [time - starts_at for time in clip_times(second, frames, stride, rate)]
    too_far = f"{path}: second {second} lies outside, if it starts at second {starts_at}; is the movie cut or whole?"
    if path.is_dir():
        numbers = [1 + math.ceil(time * 30 - Fraction(1, 2)) for time in times]  # the nearest frame, of two the earlier
        last = _last_frame(path)
        if not 1 <= numbers[frames // 2] <= last + 15:
            raise BrokenVideo(too_far)
        return torch.stack([_read_frame(path, min(max(number, 1), last)) for number in numbers])  # (T, 3, H, W)
    if second < starts_at:
        raise BrokenVideo(too_far)
    with Excerpt(path, times[0], times[-1]) as excerpt:
        if second - starts_at > excerpt.times[-1] + Fraction(1, 2):
            raise BrokenVideo(too_far)
        return excerpt.frames([nearest(excerpt.times, time) for time in times])  # (T, 3, H, W)


def nearest(times: list[Fraction], time: Fraction) -> int:
    """Index of the nearest to `time` of the sorted `times`, the earlier of two equally near."""
    right = bisect_left(times, time)
    neighbours = range(max(right - 1, 0), min(right + 1, len(times)))
    return min(neighbours, key=lambda index: abs(times[index] - time))


class Excerpt(Video):
    """The part of a movie around the times from `begin` to `end`, in seconds from its start; the rest of the file is not read.

    `excerpt.times` says when each of its frames is shown, `excerpt.frames(indices)` decodes some. Raises BrokenVideo.
    """

    def __init__(self, path: Path, begin: Fraction, end: Fraction) -> None:
        self.begin, self.end = begin, end
        super().__init__(path)

    def _index_packets(self) -> None:
        self.stream = self.container.streams.best("video")
        if self.stream is None:
            raise BrokenVideo(f"{self.path}: no video stream")
        if self.container.format.name not in self.TIMED:
            raise BrokenVideo(f"{self.path}: only mp4 and Matroska files state the time of every frame; encode it anew as one of them")
        self.stream.thread_type, self.stream.thread_count = "NONE", 1  # loader workers are the parallelism
        self.timed, unit = True, self.stream.time_base
        origin = Fraction(self.container.start_time or 0, 1_000_000)
        begin, end = (origin + self.begin) / unit, (origin + self.end) / unit  # on the file's own clock
        start, back = self.stream.start_time or 0, 0
        # A key frame decoded at or before the target may be shown after it: then seek again, 1, 3, 7, ... seconds further back.
        while True:
            target = max(int(begin - back / unit), start)
            self.container.seek(target, stream=self.stream)
            self.packets = self._read_until(end)
            if target == start or self.packets and self.packets[0].pts <= begin:
                break
            back = 2 * back + 1
        if not self.packets:
            raise BrokenVideo(f"{self.path}: no frames around {float(self.begin):.1f} s")
        first = self.packets[0].pts  # what is shown before this key frame needs frames that have not been read
        shown = [position for position, packet in enumerate(self.packets) if not packet.is_discard and packet.pts >= first]
        self.positions = sorted(shown, key=lambda position: self.packets[position].pts)
        self.times = [self.packets[position].pts * unit - origin for position in self.positions]

    def _read_until(self, end: Fraction) -> list:
        """Packets from the next key frame on, in the order of decoding: a frame at or after `end` and all shown before it."""
        packets, after = [], math.inf
        for packet in self.container.demux(self.stream):
            if not packet.size or not packets and not packet.is_keyframe:
                continue
            if packet.pts is None:
                raise BrokenVideo(f"{self.path}: frames without a time; encode it anew")
            if packet.dts is not None and packet.dts >= after:  # nothing is shown before it is decoded
                break
            packets.append(packet)
            if packet.pts >= end:
                after = min(after, packet.pts)
        return packets


@cache  # a folder may hold 27,000 frames
def _last_frame(folder: Path) -> int:
    """The highest number of a frame in a folder of extracted frames."""
    pattern = re.compile(re.escape(folder.name) + r"_(\d{6})\.jpg")
    numbers = [int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match]
    if not numbers:
        raise BrokenVideo(f"{folder}: no frames named {folder.name}_000001.jpg and so on")
    return max(numbers)


def _read_frame(folder: Path, number: int) -> Tensor:
    """A frame in a folder of extracted frames, uint8 (3, H, W)."""
    path = folder / f"{folder.name}_{number:06d}.jpg"
    try:
        return TF.pil_to_tensor(Image.open(path).convert("RGB"))
    except OSError as error:
        raise BrokenVideo(f"{path}: {error}") from None
