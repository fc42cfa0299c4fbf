"""From video files to clips: exact frames, clip sampling (Sec. 3.3), MultiScaleCrop (Table 9), batches.

Everything random about a sample is a function of (seed, epoch, index) alone, so results depend neither on the number
of loader workers nor on the number of processes, and a resumed run sees what it would have seen.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import av
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as TF

from common import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
SUFFIXES = frozenset(".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split())
TRIES = 100  # videos in a row that may be unreadable before a run gives up


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


def list_videos(root: str, selection: str) -> list[Path]:
    """Paths of the videos that a configuration names.

    selection: a sub-folder of `root`, or a list file with lines `path [label]`, paths relative to `root` and the
    label a whole number; empty for everything below `root`. Raises UserError if there is none.
    """
    where = Path(root, selection) if not selection or Path(root, selection).exists() else Path(selection)
    if where.is_dir():
        videos = sorted(path for path in where.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    elif where.is_file():
        try:
            lines = [line.strip() for line in where.read_text().splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{where} is not a text file with lines 'path [label]'") from None
        videos = [Path(root, re.sub(r"[\s,]+\d+$", "", line)) for line in lines]  # without the label
    else:
        raise UserError(f"there is no folder or list file {where}: set data.root, and data.train or data.val below it")
    if not videos:
        raise UserError(f"no videos found in {where} (files ending in {' '.join(sorted(SUFFIXES))})")
    return videos


def write_mp4(path: Path, frames: Tensor, rate: int, quantizer: int = 18) -> None:
    """Write frames uint8 (T, 3, H, W), H and W even, as H.264; the same frames give the same file.

    With a constant quantizer, that is: x264's usual rate control is not reproducible to the bit.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": str(quantizer), "preset": "fast", "threads": "1"})
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            image = frame.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


# ---- from frames to a clip ----


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The source of all randomness of one sample: independent for every (seed, epoch, index)."""
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def pick_below(count: int, generator: torch.Generator) -> int:
    """A uniform whole number in [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def dense_clip(length: int, frames: int, stride: int, generator: torch.Generator | None = None) -> list[int]:
    """Indices of `frames` frames, `stride` apart (Sec. 3.3, "Temporal downsampling"), from a uniformly random start.

    Without a generator the clip is the one in the middle. In a video of `length` < frames * stride it starts at 0 and
    repeats the last index that it reaches.
    """
    spare = max(length - frames * stride, 0)
    start = pick_below(spare + 1, generator) if generator else spare // 2
    last = start + (length - 1 - start) // stride * stride
    return [min(start + i * stride, last) for i in range(frames)]


def multi_scale_crop(
    height: int, width: int, size: int, scales: list[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """MultiScaleCrop of TSN (Table 9): a random crop as (top, left, height, width), to be resized to size x size.

    Side lengths are the shorter side times one of `scales`, the two at most one scale apart; the place is one of 13.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[pick_below(len(pairs), generator)]
    step_y, step_x = (height - crop_height) // 4, (width - crop_width) // 4
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]  # corners, edges, centre; quarters
    y, x = places[pick_below(len(places), generator)]
    return y * step_y, x * step_x, crop_height, crop_width


def center_crop(frames: Tensor, size: int) -> Tensor:
    """The largest central square of frames (T, 3, H, W), resized to size x size."""
    side = min(frames.shape[-2:])
    return TF.resize(TF.center_crop(frames, [side, side]), [size, size], antialias=True)


def normalize(clip: Tensor) -> Tensor:
    """uint8 (B, T, 3, H, W), as the loader hands it over, to the model's input: float (B, 3, T, H, W)."""
    mean, std = _statistics(clip.device)
    return clip.transpose(1, 2).float().sub_(mean).div_(std)


@functools.cache  # copied to a GPU once: every copy would make the loop wait
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (MEAN, STD))


# ---- datasets and batches ----


class PretrainingClips(Dataset):
    """Random clips and their masks, by (epoch, index).

    Each item: clip uint8 (T, 3, H, W), positions of visible (N_vis,) and masked (N_mask,) cubes, and a list with the
    reasons why videos could not be read: a broken video is replaced by another one, chosen by the sample's own generator.
    """

    def __init__(
        self, videos: list[Path], *, frames: int, stride: int, size: int, scales: list[float], flip: bool,
        draw_mask: Callable[[torch.Generator], tuple[Tensor, Tensor]], seed: int
    ) -> None:  # fmt: skip
        self.videos, self.frames, self.stride, self.size = videos, frames, stride, size
        self.scales, self.flip, self.draw_mask, self.seed = scales, flip, draw_mask, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        epoch, index = key
        generator = sample_generator(self.seed, epoch, index)
        broken = []
        while True:
            try:
                clip = self._clip(self.videos[index], generator)  # (T, 3, H, W)
                break
            except BrokenVideo as error:
                broken.append(str(error))
                if len(broken) == TRIES:
                    raise UserError(f"{TRIES} videos in a row could not be read; look at data.root and at the last one, {error}") from None
                index = pick_below(len(self), generator)
        return clip, *self.draw_mask(generator), broken

    def _clip(self, path: Path, generator: torch.Generator) -> Tensor:
        with Video(path) as video:
            indices = dense_clip(len(video), self.frames, self.stride, generator)
            frames = video.frames(indices)  # (T, 3, H_video, W_video)
        top, left, height, width = multi_scale_crop(*frames.shape[-2:], self.size, self.scales, generator)
        clip = TF.resized_crop(frames, top, left, height, width, [self.size, self.size], antialias=True)  # (T, 3, H, W)
        if self.flip and pick_below(2, generator):
            clip = clip.flip(-1)
        return clip.contiguous()


def collate(samples: list[tuple[Tensor, Tensor, Tensor, list[str]]]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Stack clips (B, T, 3, H, W) and positions (B, N_vis), (B, N_mask); join the reports of broken videos."""
    clips, visible, masked, broken = zip(*samples)
    return torch.stack(clips), torch.stack(visible), torch.stack(masked), sum(broken, [])


class GlobalBatches(Sampler):
    """One process's share of every global batch, in pieces of `per_device` clips, as lists of (epoch, index).

    Every epoch is a new shuffle of the videos, the last incomplete batch dropped. Which videos form the batch of a step
    does not depend on the number of processes. Begins at `start`, the step at which a run resumes, ends before `steps`.
    """

    def __init__(self, *, length: int, batch_size: int, per_device: int, rank: int, world_size: int, seed: int, start: int, steps: int) -> None:
        self.length, self.batch_size, self.per_device, self.seed = length, batch_size, per_device, seed
        self.rank, self.world_size, self.start, self.steps = rank, world_size, start, steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.length // self.batch_size
        shuffled = None
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or shuffled is None:
                shuffled = torch.randperm(self.length, generator=sample_generator(self.seed, epoch, -1)).tolist()
            mine = shuffled[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            for piece in range(0, len(mine), self.per_device):
                yield [(epoch, index) for index in mine[piece : piece + self.per_device]]

    def __len__(self) -> int:
        return (self.steps - self.start) * self.batch_size // (self.world_size * self.per_device)
