"""Read exact frames of a video file or of a part of it, and write mp4.

A file holds one packet for each frame, in the order of decoding. A packet's pts says when its frame is shown. Reading
packets is fast, decoding them is slow. A key frame can be decoded alone, any other only after the key frame before it
and the packets in between.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from itertools import chain, count, dropwhile, groupby, pairwise, takewhile
from pathlib import Path

import av
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from torch import Tensor

TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers that state when every frame is shown
SKIPPING = ("h264", "hevc")  # decoders that can skip unreferenced frames without changing the others
KEPT = 2**25  # bytes of the longest file whose packets stay in memory: reading them again costs 5 to 12 %
START = -(2**62)  # stands for the start of the file: a pts before all others
QP_18 = {"qp": "18", "preset": "ultrafast"}


class BrokenVideo(Exception):
    """A file that holds no readable video, or not the frames asked for. Its text names the file and the reason."""


class Video(AbstractContextManager):
    """A video file, opened for exact access to single frames; use it in a `with` statement. Raises BrokenVideo.

    `len(video)` is its number of frames; `video.frames(indices)` decodes these and as few others as possible.
    begin, end: seconds from the start of the file. With either, the video is an excerpt: the frames shown from `begin`
    to `end`, the nearest on both sides, and perhaps some more. The rest of the file is not read.
    """

    def __init__(self, path: str | Path, begin: Fraction | int = 0, end: Fraction | None = None) -> None:
        self.path = path
        self.reformatter = VideoReformatter()  # one for all frames: a new one each time costs a third of the decoding
        self.matrix = None  # how frames are turned and mirrored; read from the first that is decoded
        with _named_errors(path):
            self.stream = _open(path)
            self.size = self.stream.width, self.stream.height  # of all frames, even if it changes within the stream
            self.rate = Fraction(self.stream.average_rate or 25)  # average frames a second
            self.time_base = Fraction(self.stream.time_base)  # unit of pts in seconds
            origin = round(Fraction(self.stream.container.start_time or 0, 1_000_000) / self.time_base)
            start = math.floor(origin + begin / self.time_base) if begin > 0 else START
            last = math.inf if end is None else origin + end / self.time_base
            container = self.stream.container.format.name
            packets = _packets(self.stream, start, last)
            short = begin <= 0 and end is None and os.path.getsize(path) <= KEPT
            self.packets = list(packets) if short else []
            times, keys, key = _list_frames(self.packets or packets, container in TIMED)
            if start != START and not (keys and keys[0] <= start):
                start = START
                times, keys, key = _list_frames(_packets(_open(path), START, last), container in TIMED)
            if times:
                times = _decodable(times, _first_pts(path, self.stream, key) if start == START else key.pts)
            if not times:
                raise BrokenVideo(f"{path}: no frames")

        # Other containers may not state times, or FFmpeg guesses them, in AVI wrongly for B-frames.
        distinct = math.isfinite(sum(times)) and all(time < later for time, later in pairwise(times))
        self.counted = not distinct or container not in TIMED
        self.pts = range(len(times)) if self.counted else times
        self.keys = [START] if self.counted else [START, *sorted(keys)]
        self.ticks = [time - origin for time in times] if distinct and container != "avi" else []
        if self.counted and (begin > 0 or end is not None):
            raise BrokenVideo(f"{path}: only mp4 and Matroska files state the time of every frame; re-encode it")

    def __exit__(self, *exception: object) -> None:
        self.stream.container.close()

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def times(self) -> list[Fraction]:
        """Return when each frame is shown, in seconds from the start of the file."""
        if self.ticks:
            return [tick * self.time_base for tick in self.ticks]
        return [number / self.rate for number in range(len(self))]

    def frames(self, indices: list[int]) -> Tensor:
        """Return uint8 RGB (len(indices), 3, H, W), upright; frames are counted from 0 in the order of display."""
        if not indices or min(indices) < 0 or max(indices) >= len(self):
            raise IndexError(f"{self.path}: frames {indices} asked for, but it has frames 0 to {len(self) - 1}")
        shown = [self.pts[index] for index in indices]
        images = {}
        with _named_errors(self.path):
            for key, group in groupby(sorted(set(shown)), lambda pts: self.keys[bisect_right(self.keys, pts) - 1]):
                with suppress(av.FFmpegError, BrokenVideo):
                    images.update((pts, self._to_rgb(frame)) for pts, frame in self._decode(key, set(group)))
            if missing := set(shown) - images.keys():  # not all that a file calls key frames can be decoded alone
                images.update((pts, self._to_rgb(frame)) for pts, frame in self._decode(START, missing))
        frames = torch.stack([images[pts] for pts in shown])  # (len(indices), H, W, 3)
        return frames.permute(0, 3, 1, 2)  # channels stay last in memory: the fastest to copy and to resize

    def every_frame(self) -> Iterator[Tensor]:
        """Yield all frames in the order of display, uint8 RGB (3, H, W). Raise BrokenVideo if one is damaged."""
        with _named_errors(self.path):
            for number, (_, frame) in enumerate(self._decode(START, set(self.pts))):
                if frame.is_corrupt:
                    raise BrokenVideo(f"{self.path}: frame {number} of {len(self)} is damaged")
                yield self._to_rgb(frame).permute(2, 0, 1)

    def _decode(self, key: int, wanted: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield wanted frames with their pts, in the order of display, decoded from the key frame at `key` on."""
        if key == START and not self.packets:
            self.stream.container.close()
            self.stream = _open(self.path)
        packets = self.packets or _packets(self.stream, key)
        if key != START:
            packets = _needed(packets, key, wanted)
        codec = self.stream.codec_context
        codec.flush_buffers()
        numbers = count()
        exact = key == START
        for packet in chain(packets, [None]):
            if packet and key != START and codec.name in SKIPPING:
                codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in codec.decode(packet):
                pts = next(numbers) if self.counted else frame.pts
                exact = exact or (pts == key and frame.key_frame)  # files may flag others as key frames, too
                if exact and pts in wanted:
                    wanted.remove(pts)
                    yield pts, frame
                if not wanted:
                    return
        raise BrokenVideo(f"{self.path}: frame {self.pts.index(min(wanted))} of {len(self)} cannot be decoded")

    def _to_rgb(self, frame: av.VideoFrame) -> Tensor:
        """Return uint8 RGB (H, W, 3), upright: phones film sideways and say so in the file."""
        if self.matrix is None:
            self.matrix = 1, 0, 0, 1
            # Reading side data keeps a frame in memory until the next garbage collection, hence a copy of 2 x 2 pixels.
            copy = VideoReformatter().reformat(frame, 2, 2, interpolation="POINT", threads=1)
            with suppress(KeyError, ValueError):  # there is none, or other side data that PyAV does not know
                a, b, _, c, d, *_ = memoryview(bytes(copy.side_data["DISPLAYMATRIX"])).cast("i")
                self.matrix = a, b, c, d
        rgb = self.reformatter.reformat(frame, *self.size, format="rgb24", threads=1)
        image = torch.from_numpy(rgb.to_ndarray())  # (H, W, 3)
        a, b, c, d = self.matrix  # the pixel (x, y) is shown at (a x + c y, b x + d y)
        if abs(b) > abs(a):
            image = image.transpose(0, 1)
        flipped = [axis for axis, sign in enumerate((b + d, a + c)) if sign < 0]
        return image.flip(flipped) if flipped else image


def read_frames(path: str | Path, indices: list[int]) -> Tensor:
    """Return uint8 RGB (len(indices), 3, H, W), upright: exactly these frames, counted in the order of display."""
    with Video(path) as video:
        return video.frames(indices)


@contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    """Turn any exception into a BrokenVideo that names the file, except running out of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BrokenVideo | MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        raise BrokenVideo(f"{path}: {error} ({type(error).__name__})") from error


def _open(path: str | Path) -> av.VideoStream:
    container = av.open(f"file:{path}")  # "file:", as names may contain colons
    stream = container.streams.best("video")  # a file may hold several, such as a cover picture
    if stream is None or stream.codec_context is None:
        container.close()
        raise BrokenVideo(f"{path}: no {'video stream' if stream is None else 'decoder for its video'}")
    stream.thread_type, stream.thread_count = "NONE", 1  # loader workers are the parallelism
    return stream


def _packets(stream: av.VideoStream, start: int, end: float = math.inf) -> Iterator[av.Packet]:
    """Yield packets from the key frame before `start` to the frame after `end`; at START, the stream has to be new."""
    if start != START:
        stream.container.seek(start, stream=stream)
    nearest = math.inf
    packets = (packet for packet in stream.container.demux(stream) if packet.size)
    for packet in dropwhile(lambda packet: not packet.is_keyframe, packets):
        if packet.dts is not None and packet.dts >= nearest:  # nothing is shown before it is decoded
            return
        yield packet
        if packet.pts is not None and packet.pts >= end:
            nearest = min(nearest, packet.pts)


def _needed(packets: Iterable[av.Packet], key: int, wanted: set[int]) -> Iterator[av.Packet]:
    """Yield the packets from a key frame to the last of the wanted frames."""
    missing = set(wanted)
    for packet in dropwhile(lambda packet: packet.pts != key, packets):
        yield packet
        missing.discard(packet.pts)
        if not missing:
            return


def _list_frames(packets: Iterable[av.Packet], timed: bool) -> tuple[list[float], list[int], av.Packet]:
    """Return when frames are shown, in the order of decoding, the pts of key frames, and the first packet."""
    missing = -math.inf if timed else math.inf  # Matroska omits only times below zero
    times, keys, first = [], [], None
    for packet in packets:
        first = first or packet
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        if not packet.is_discard:  # by an edit list
            times.append(missing if packet.pts is None else packet.pts)
    return times, keys, first


def _decodable(times: list[float], first: float) -> list[float]:
    """Return the sorted times without those of frames that refer to others before the start of a recording or a cut."""
    leading = list(takewhile(lambda time: time <= first, times))
    return sorted([first] * leading.count(first) + times[len(leading) :])


def _first_pts(path: str | Path, stream: av.VideoStream, key: av.Packet) -> float:
    """Return when the first frame is shown that can be decoded if decoding starts at a file's first key frame."""
    time = key.pts
    if stream.codec_context.name == "h264":
        # Without an IDR picture (unit type 5) it may start an intra refresh, whose first frames are incomplete.
        with suppress(av.FFmpegError):
            if not BitStreamFilterContext("filter_units=pass_types=5", stream).filter(av.Packet(bytes(key))):
                other = _open(path)
                time = next(other.container.decode(other), key).pts
    return -math.inf if time is None else time


def write_mp4(
    path: Path, frames: Iterable[Tensor], rate: Fraction, options: dict = QP_18, times: Sequence = ()
) -> None:
    """Write frames uint8, each (3, H, W) with H and W even, as H.264.

    options: x264's own. With a constant quantizer, as by default, the same frames give the same file.
    times: when each frame is shown, in seconds; without them, `rate` frames a second.
    """
    unit = Fraction(1, math.lcm(*(time.denominator for time in times))) if times else 1 / Fraction(rate)
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options | {"threads": "1"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[1:]
            image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")  # (H, W, 3)
            image.pts = int(times[number] / unit) if times else number
            image.time_base = unit
            container.mux(stream.encode(image))
        container.mux(stream.encode())
