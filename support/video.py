"""Exact frames from any video file or a part of it, and writing mp4."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from itertools import chain, count, dropwhile, pairwise
from pathlib import Path

import av
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from torch import Tensor

TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers that state when every frame is shown
SKIPPING = ("h264", "hevc")  # decoders known to leave out unreferenced frames without any effect on the others
KEPT = 2**25  # bytes of packets that are kept in memory, so that short files are read once
QP_18 = {"qp": "18", "preset": "ultrafast"}


class BrokenVideo(Exception):
    """A file that holds no readable video, or not the frames asked for. Its text names the file and the reason."""


class Video(AbstractContextManager):
    """A video file, opened for exact access to single frames; use it in a `with` statement. Raises BrokenVideo.

    `len(video)` is its number of frames; `video.frames(indices)` decodes those wanted and as few others as possible.

    begin, end: seconds from the start of the file. With either, the video is an excerpt: the frames shown from `begin`
    to `end`, the nearest on both sides, and perhaps some more. The rest of the file is not read.

    Opening reads all packets: they say when each frame is shown and which are key frames. Wanted frames are decoded
    from the key frame before them. Only mp4 and Matroska files state the time of every frame. In others, AVI above all
    (UCF101, HMDB51), FFmpeg guesses the times, wrongly for B-frames: there, frames are counted from the start.
    """

    def __init__(self, path: str | Path, begin: Fraction | int = 0, end: Fraction | None = None) -> None:
        self.path, self.container = path, None
        self.reformatter = VideoReformatter()  # one for all frames: a new one each time costs a third of the decoding
        with self._broken_if_it_fails():
            self._open()
            self._index(begin, end)

    def __exit__(self, *exception: object) -> None:
        if self.container:
            self.container.close()

    def __len__(self) -> int:
        return len(self.shown)

    @property
    def times(self) -> list[Fraction]:
        """When each frame is shown, in seconds from the start of the file."""
        if self.stated:
            return [(time - self.origin) * self.time_base for time in self.stated]
        return [index / self.rate for index in range(len(self))]

    def frames(self, indices: list[int]) -> Tensor:
        """uint8 RGB (len(indices), 3, H, W), upright, frames counted from 0 in the order of display."""
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"{self.path}: frames {indices} asked for, but it has frames 0 to {len(self) - 1}")
        with self._broken_if_it_fails():
            found = self._find(wanted)
        frames = torch.stack([found[index] for index in indices])  # (len(indices), H, W, 3)
        return frames.permute(0, 3, 1, 2)  # channels stay last in memory: the fastest to copy and to resize

    def every_frame(self) -> Iterator[Tensor]:
        """All frames in the order of display, uint8 RGB (3, H, W). BrokenVideo at the first missing or damaged."""
        done = 0
        with self._broken_if_it_fails():
            for frame in self._decode(self.start):
                if frame.is_corrupt:
                    raise BrokenVideo(f"{self.path}: frame {done} of {len(self)} is damaged")
                yield self._to_rgb(frame).permute(2, 0, 1)
                done += 1
            if done != len(self):
                raise BrokenVideo(f"{self.path}: only {done} of {len(self)} frames can be decoded")

    @contextmanager
    def _broken_if_it_fails(self) -> Iterator[None]:
        """Make any exception a BrokenVideo, except running out of memory, and close the file."""
        try:
            yield
        except Exception as error:
            self.__exit__()
            if isinstance(error, BrokenVideo | MemoryError) and not isinstance(error, av.FFmpegError):
                raise
            raise BrokenVideo(f"{self.path}: {error} ({type(error).__name__})") from error

    # ---- reading packets; from here on, times are integers in units of `time_base` on the file's own clock ----

    def _open(self) -> None:
        self.__exit__()
        self.container, self.unread = av.open(f"file:{self.path}"), True  # "file:", as names may contain colons
        self.stream = self.container.streams.best("video")  # a file may hold several, such as a cover picture
        if self.stream is None or self.stream.codec_context is None:
            raise BrokenVideo(f"{self.path}: no {'video stream' if self.stream is None else 'decoder for its video'}")
        self.stream.thread_type, self.stream.thread_count = "NONE", 1  # loader workers are the parallelism

    def _index(self, begin: Fraction | int, end: Fraction | None) -> None:
        """Read packets to learn which frames there are, when they are shown and which are key frames."""
        self.time_base: Fraction = self.stream.time_base
        self.rate: Fraction = self.stream.average_rate or Fraction(25)  # average frames a second
        self.size = self.stream.width, self.stream.height  # of all frames, should it change within the stream
        self.origin = round(Fraction(self.container.start_time or 0, 1_000_000) / self.time_base)
        self.end = math.inf if end is None else self.origin + end / self.time_base
        self.timed, self.start, self.first, self.matrix = True, None, -math.inf, None  # until known
        self.kept, self.place_of = [], {}

        container = self.container.format.name
        unknown = -(2**63) if container in TIMED else 2**63 - 1  # Matroska leaves out only times below zero
        first = math.floor(self.origin + begin / self.time_base)
        for start in (first, None) if begin > 0 else (None,):
            times, keys, kept, size = array("q"), array("q"), [], 0
            for packet in self._read(start):
                time = unknown if packet.pts is None else packet.pts
                if packet.is_keyframe:
                    keys.append(time)
                if not packet.is_discard:
                    times.append(time)
                size += packet.size
                if size <= KEPT or not kept:
                    kept.append(packet)
            if keys and (start is None or keys[0] <= first):
                break
        if not times:
            raise BrokenVideo(f"{self.path}: no frames")
        self.start, self.keys = start, array("q", sorted(keys))
        if size <= KEPT:
            self.kept, self.place_of = kept, {packet.pts: place for place, packet in enumerate(kept)}

        # Frames that refer to others from before the start of a recording or a cut are lost and do not count.
        self.first = self._first_time(kept[0])
        clean = next((place for place, time in enumerate(times) if time > self.first), len(times))
        times = array("q", sorted(time for place, time in enumerate(times) if place >= clean or time == self.first))
        distinct = unknown not in times and all(time < later for time, later in pairwise(times))
        self.timed = distinct and container in TIMED
        self.stated = times if distinct and container != "avi" else []
        self.shown = times if self.timed else range(len(times))
        if not self.timed and (begin > 0 or end is not None):
            raise BrokenVideo(f"{self.path}: only mp4 and Matroska files state the time of every frame; re-encode it")

    def _first_time(self, key: av.Packet) -> float:
        """When the first frame is shown that can be decoded from the packet `key` on."""
        time = key.pts
        if self.start is None and not key.is_discard and self.stream.codec_context.name == "h264":
            # Without an IDR picture (unit type 5) it may start an intra refresh, whose first frames are incomplete.
            with suppress(av.FFmpegError):
                if not BitStreamFilterContext("filter_units=pass_types=5", self.stream).filter(av.Packet(bytes(key))):
                    time = next((frame.pts for frame in self._decode(None)), time)
        return -math.inf if time is None else time

    def _read(self, start: int | None, times: Collection[int] = ()) -> Iterator[av.Packet]:
        """Packets in the order of decoding from a key frame near `start` on, of which those up to `times` are enough.

        None stands for the first key frame of the file.
        """
        times = times if start is not None else ()
        place = 0 if start == self.start else self.place_of.get(start)
        if self.kept and place is not None and self.kept[place].is_keyframe:
            self.stream.codec_context.flush_buffers()
            yield from self.kept[place : 1 + max(map(self.place_of.get, times), default=len(self.kept))]
            return
        if start is not None:
            self.container.seek(start, stream=self.stream)
        elif not self.unread:
            self._open()
        self.unread, end, after = False, max(times, default=self.end), math.inf
        packets = (packet for packet in self.container.demux(self.stream) if packet.size)
        for packet in dropwhile(lambda packet: not packet.is_keyframe, packets):
            if packet.dts is not None and packet.dts >= after:  # nothing is shown before it is decoded
                return
            yield packet
            if packet.pts is not None and packet.pts >= end:
                after = min(after, packet.pts)

    def _key_before(self, index: int) -> int | None:
        """When the key frame is shown from which frame `index` is to be decoded; None for the file's first."""
        place = bisect_right(self.keys, self.shown[index]) if self.timed else 0
        return self.keys[place - 1] if place else None

    # ---- decoding them ----

    def _find(self, wanted: list[int]) -> dict[int, Tensor]:
        """Frames (H, W, 3) by index, decoded from the key frame before each or, if that does not do, an earlier one."""
        found = {}
        while left := [index for index in wanted if index not in found]:
            start = self._key_before(left[0])
            times = {self.shown[index]: index for index in left if self._key_before(index) == start}
            try:
                for frame in self._decode(start, set(times)):
                    if frame.pts in times:
                        found[times.pop(frame.pts)] = self._to_rgb(frame)
                    if not times:
                        break
            except av.FFmpegError:
                if start is None:
                    raise
            if times and start is None:
                raise BrokenVideo(f"{self.path}: frame {min(times.values())} of {len(self)} cannot be decoded")
            if times:
                del self.keys[self.keys.index(start) // 2 :]  # next from halfway back, and no longer from later ones
        return found

    def _decode(self, start: int | None, times: Collection[int] = ()) -> Iterator[av.VideoFrame]:
        """Frames in the order of display from `start` on, of which those at `times` are enough; pts as in `shown`."""
        skip = times and start is not None and self.stream.codec_context.name in SKIPPING
        key, started, numbers = None, False, count()
        for packet in chain(self._read(start, times), [None]):
            codec = self.stream.codec_context
            if packet is not None:
                key = key or packet
                codec.skip_frame = "NONREF" if skip and packet.pts not in times else "DEFAULT"
            for frame in codec.decode(packet):
                if not started and frame.pts is not None and frame.pts < (self.first if start is None else key.pts):
                    continue
                if not started and start is not None and not (frame.pts == key.pts and frame.key_frame):
                    return  # the file calls it a key frame, but what follows also needs frames from before it
                started = True
                if not self.timed:
                    frame.pts = next(numbers)
                yield frame

    def _to_rgb(self, frame: av.VideoFrame) -> Tensor:
        """uint8 RGB (H, W, 3), upright: phones film sideways and say so in the container."""
        if self.matrix is None:
            self.matrix = [1, 0, 0, 0, 1]
            # PyAV's side data keeps its frame alive until the next garbage collection: let that be one of 2 x 2 pixels.
            tiny = VideoReformatter().reformat(frame, 2, 2, interpolation="POINT", threads=1)
            with suppress(KeyError, ValueError):  # there is none, or other side data that PyAV does not know
                self.matrix = memoryview(bytes(tiny.side_data["DISPLAYMATRIX"])).cast("i").tolist()
        a, b, _, c, d, *_ = self.matrix  # the pixel (x, y) is shown at (a x + c y, b x + d y)
        rgb = self.reformatter.reformat(frame, *self.size, format="rgb24", threads=1)
        image = torch.from_numpy(rgb.to_ndarray())  # (H, W, 3)
        if abs(b) > abs(a):
            image, a, d = image.transpose(0, 1), c, b
        flipped = [axis for axis, sign in enumerate((d, a)) if sign < 0]
        return image.flip(flipped) if flipped else image


def read_frames(path: str | Path, indices: list[int]) -> Tensor:
    """uint8 RGB (len(indices), 3, H, W), upright: exactly the frames asked for, in the order of display."""
    with Video(path) as video:
        return video.frames(indices)


def write_mp4(
    path: Path, frames: Iterable[Tensor], rate: Fraction | int, options: dict = QP_18, times: Sequence[Fraction] = ()
) -> None:
    """Write frames uint8, each (3, H, W) with H and W even, as H.264.

    options: x264's own. With a constant quantizer, as by default, the same frames give the same file; x264's usual rate
    control is not reproducible to the bit.
    times: when each frame is shown, in seconds; without them, `rate` frames a second.
    """
    unit = Fraction(1, math.lcm(*(time.denominator for time in times))) if times else 1 / Fraction(rate)
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options | {"threads": "1"})
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", unit
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[1:]
            image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")  # (H, W, 3)
            image.pts, image.time_base = int(times[number] / unit) if times else number, unit
            container.mux(stream.encode(image))
        container.mux(stream.encode())
