"""Small video files, made on the spot, for the tests."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.stream import Disposition

SIZE = (96, 64)  # width, height: 6 x 4 black or white squares of 16 pixels, the bits of the frame's number


def numbered_frame(number: int, width: int = SIZE[0], height: int = SIZE[1]) -> av.VideoFrame:
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    columns = width // 16
    for bit in range(12):
        row, column = divmod(bit, columns)
        image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 230 if number >> bit & 1 else 20
    image[32:, :, 0] = torch.arange(width) * 2  # something smooth besides, for the encoder to predict
    image[32:, :, 1] = number * 7 % 200
    return av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")


def number_of(frame: torch.Tensor) -> int:
    """The number that a decoded frame (3, H, W) shows."""
    gray, columns, number = frame.float().mean(0), frame.shape[2] // 16, 0
    for bit in range(12):
        row, column = divmod(bit, columns)
        square = gray[row * 16 + 4 : row * 16 + 12, column * 16 + 4 : column * 16 + 12]
        number += int(square.mean() > 125) << bit
    return number


def write_numbered(
    path: Path, count: int, codec: str = "libx264", options=None, times=None, pixel_format="yuv420p", size=SIZE
) -> Path:
    """A video whose every frame shows its own number; `times` are presentation times in 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = numbered_frame(number, *size)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Set the display matrix in an mp4 file's track header: the pixel (x, y) is shown at (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44  # fields of a version 0 track header before the matrix
    content[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def turn_by_90(path: Path) -> Path:
    """A quarter turn clockwise, as phones do it."""
    return set_matrix(path, 0, 1, -1, 0)


def two_streams(path: Path, count: int) -> Path:
    """A small track first, then the one that the file declares the default."""
    with av.open(str(path), "w") as container:
        small, stream = container.add_stream("libx264", rate=25), container.add_stream("libx264", rate=25)
        (small.width, small.height), (stream.width, stream.height) = (64, 48), SIZE
        stream.disposition = Disposition.default.value  # PyAV 17.0 takes no Disposition
        for number in range(count):
            container.mux(small.encode(numbered_frame(count - number, 64, 48)))
            container.mux(stream.encode(numbered_frame(number)))
        container.mux(stream.encode())
    return path


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def remux(source: Path, path: Path, first: int = 0, shift: int = 0, **options: str) -> Path:
    """Copy the packets of a video from the one numbered `first` on, `shift` later in units of its time base."""
    with av.open(str(source)) as original, av.open(str(path), "w", options=options) as container:
        stream = original.streams.best("video")
        copy = container.add_stream_from_template(stream)
        for packet in [packet for packet in original.demux(stream) if packet.size][first:]:
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
            container.mux(packet)
    return path


def broken_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    whole = write_numbered(folder / "truncated.mp4", 40).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"not a video\n" * 50)
    (folder / "unreadable.mp4").symlink_to("unreadable.mp4")  # leads to itself: not even root can read it
    audio_only(folder / "audio.mp4")
    damaged = bytearray(write_numbered(folder / "damaged.mkv", 40, options={"g": "1"}).read_bytes())
    damaged[len(damaged) // 4 : -200] = os.urandom(len(damaged) - 200 - len(damaged) // 4)
    (folder / "damaged.mkv").write_bytes(damaged)
    return {path.name: path for path in [*folder.iterdir(), folder / "missing.mp4"]}


def coordinates(height: int, width: int, frames: int = 2) -> torch.Tensor:
    """Frames (T, 3, H, W) whose red is the column and whose green is the row."""
    clip = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    clip[:, 0], clip[:, 1] = torch.arange(width), torch.arange(height)[:, None]
    return clip


def frame_folder(folder: Path, count: int, size: tuple[int, int] = SIZE) -> Path:
    """A folder of extracted frames, as SlowFast has: NAME/NAME_000001.jpg, each showing its number from 0."""
    folder.mkdir()
    for number in range(count):
        picture = numbered_frame(number, *size).to_image()
        picture.save(folder / f"{folder.name}_{number + 1:06d}.jpg", quality=95)
    return folder
