"""Decoding of video files with PyAV: exact frame count, only the chosen frames converted and kept.

Shapes: h w stored pixels of one frame, H W pixels as a player shows it (rotation and pixel aspect applied).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging


try:
    import av
except ImportError:
    av = None

logger = logging.get_logger(__name__)

# Text, playlists and other things that FFmpeg takes for a video although nobody filmed a room with them; playlists
# would also open further files.
REFUSED_FORMATS = ("tty", "hls", "concat", "dash", "sdp", "rtsp", "lavfi", "applehttp", "srt", "webvtt", "ass")
DECODER_BYTES = 100_000_000
MISSING_SECONDS = 1.0


class VidLLMInputError(ValueError):
    """Something that a user gave cannot be used; the message says what, where, wanted and got.

    Source:
        Ours: one class, so that a command can turn it into one line and an exit code.
    """


class VidLLMMissingFileError(VidLLMInputError, FileNotFoundError):
    """A path that does not exist. Is a `ValueError` and a `FileNotFoundError`.

    Source:
        Ours: callers may catch either.
    """


def spread_indices(num_source_frames: int, num_frames: int) -> list[int]:
    """Evenly spread frame indices, first and last included.

    Args:
        num_source_frames (`int`): Frames that there are.
        num_frames (`int`): Frames wanted.

    Returns:
        `list[int]`: Rising indices without repeats; all of them if there are not more than wanted, `[0]` if one is wanted.

    Source:
        Paper: implementation details (uniform sampling). Ours: the last frame is included, no repeats, halves round up.
    """
    if num_source_frames <= num_frames:
        return list(range(num_source_frames))
    if num_frames == 1:
        return [0]
    gaps = num_frames - 1
    return [(2 * i * (num_source_frames - 1) + gaps) // (2 * gaps) for i in range(num_frames)]


def choose_frames(
    num_source_frames: int,
    times_s: list[float] | None,
    num_frames: int | None,
    fps: float | None,
    name: str = "video",
) -> list[int]:
    """Which frames of a video to keep.

    Args:
        num_source_frames (`int`): Frames that there are.
        times_s (`list[float]`, *optional*): Presentation time of each, seconds; needed for `fps`.
        num_frames (`int`, *optional*): Spread this many evenly over the frames (also at a variable frame rate).
        fps (`float`, *optional*): Take the frame nearest to each multiple of `1 / fps` seconds after the first frame.
        name (`str`): What is read, for messages.

    Returns:
        `list[int]`: Rising indices without repeats. All frames if neither `num_frames` nor `fps` is given.

    Raises:
        VidLLMInputError: `fps` is asked for, but the frames have no times.

    Source:
        Ours: see `spread_indices`; times rather than a nominal rate, because phones film at a variable rate.
    """
    if fps is None:
        return spread_indices(num_source_frames, num_frames or num_source_frames)
    if times_s is None:
        raise VidLLMInputError(
            f"{name}: fps={fps} wants frames with times, and these have none; give num_frames instead"
        )
    times = np.asarray(times_s, dtype=np.float64) - times_s[0]
    steps = np.arange(0, int(np.floor(times[-1] * fps + 1e-6)) + 1) / fps
    after = np.clip(np.searchsorted(times, steps), 1, max(len(times) - 1, 1))
    if len(times) == 1:
        return [0]
    nearest = np.where(steps - times[after - 1] <= times[after] - steps, after - 1, after)
    return [int(index) for index in np.unique(nearest)]


def decode_video(
    path: str,
    choose: Callable[[int, list[float] | None], list[int]],
    convert: Callable[[np.ndarray, tuple[int, int], str], Any],
) -> tuple[list[Any], dict[str, Any]]:
    """Decode a video file from start to end; convert and keep the chosen frames only.

    A first pass reads the packets without decoding them, which gives the number of frames and their times whatever the
    container claims. Where decoding then yields another number (hidden frames, field pairs), the frames are chosen
    anew by the true number and decoded once more.

    Args:
        path (`str`): A video file.
        choose (callable): `(number of frames, their times in seconds or None) -> rising indices`.
        convert (callable): `(rgb, size_hw, frame name) -> anything`, called once per kept frame. rgb is a `numpy.ndarray` of
            shape `(height, width, 3)`, uint8, upright; size_hw are its height and width with square pixels.

    Returns:
        `tuple`: what `convert` returned, in order, and the metadata (see `VidLLMVideoProcessor`).

    Raises:
        VidLLMInputError: Not a video, no picture in it, truncated or damaged.

    Source:
        Ours: no seeking, so that the result equals sequential decoding by construction.
    """
    if av is None:
        raise ImportError("decoding a video file needs PyAV: pip install av")
    scan = _scan_packets(path)
    expected, times_s = scan.num_frames, scan.times_s
    for _ in range(2):
        wanted = choose(expected, times_s) if expected else []
        kept, decoded_times_s, error = _decode_pass(path, scan.num_skipped, set(wanted), convert)
        num_decoded = len(decoded_times_s)
        if error or scan.damage:
            raise VidLLMInputError(
                f"{path}: {scan.damage or 'damaged video'}: {num_decoded} of {max(expected, num_decoded)} frames could be "
                "decoded" + (f" ({error})" if error else "")
            )
        if num_decoded == 0:
            raise VidLLMInputError(f"{path}: no frame could be decoded")
        times_s = _times_or_nominal(decoded_times_s, scan.rate)
        if num_decoded == expected and choose(num_decoded, times_s) == wanted:
            break
        logger.info(f"{path}: {expected} packets, but {num_decoded} frames; choosing frames anew")
        expected = num_decoded
    fps = scan.rate
    if times_s is not None and num_decoded > 1 and times_s[-1] > times_s[0]:
        fps = (num_decoded - 1) / (times_s[-1] - times_s[0])
    return kept, {
        "source": path,
        "total_num_frames": num_decoded,
        "frames_indices": list(wanted),
        "timestamps_s": None if times_s is None else [times_s[index] - times_s[0] for index in wanted],
        "fps": fps,
        "duration": num_decoded / fps if fps else None,
        "frame_names": None,
        "video_backend": "pyav",
    }


@dataclass
class _Scan:
    """What the packets say: frames to expect, their times in display order, packets to skip, nominal rate, damage."""

    num_frames: int
    times_s: list[float] | None
    num_skipped: int
    rate: float | None
    damage: str | None


def _open_container(path: str) -> Any:
    """Open a local file and nothing else, with one clear error for all that is not a video."""
    if not os.access(path, os.R_OK):
        raise VidLLMInputError(f"{path}: this file may not be read (permission denied)")
    if os.path.getsize(path) == 0:
        raise VidLLMInputError(f"{path}: the file is empty (0 bytes); wanted a video")
    try:
        # The prefix keeps a colon in a file name from being read as a protocol.
        container = av.open(
            "file:" + os.path.abspath(path), options={"protocol_whitelist": "file"}, metadata_errors="ignore"
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        with open(path, "rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        reason = (
            "an mp4 without its index (truncated?): 0 frames could be decoded"
            if is_mp4
            else "not a video that can be read"
        )
        raise VidLLMInputError(f"{path}: {reason} ({error.strerror or error})") from None
    if set(container.format.name.split(",")) & set(REFUSED_FORMATS):
        container.close()
        raise VidLLMInputError(f"{path}: wanted a video; got a file of the format {container.format.name!r}")
    return container


def _video_stream(container: Any, path: str) -> Any:
    """The stream that a player shows; cover pictures of music files are none."""
    streams = [s for s in container.streams.video if not int(s.disposition) & int(av.stream.Disposition.attached_pic)]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise VidLLMInputError(f"{path}: no video in this file; it holds {', '.join(kinds) or 'nothing'} only")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _scan_packets(path: str) -> _Scan:
    """Read all packets of a file without decoding them."""
    damage = None
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        time_base = float(stream.time_base) if stream.time_base else 1.0
        rate = float(stream.average_rate) if stream.average_rate else None
        packets, end_s = [], 0.0
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
                if packet.is_corrupt:
                    damage = "truncated or damaged video"
                if packet.pts is not None:
                    end_s = max(end_s, (packet.pts + (packet.duration or 0)) * time_base)
        except av.error.FFmpegError as error:
            damage = f"truncated or damaged video ({error.strerror})"
        # No decoder can show what comes before the first keyframe.
        num_skipped = next((i for i, packet in enumerate(packets) if packet[1]), 0)
        shown = [pts for pts, _, is_discard in packets[num_skipped:] if not is_discard]
        num_frames = len(shown)
        entries = [entry for entry in getattr(stream, "index_entries", None) or () if not entry.is_discard]
        declared_s = _declared_duration_s(stream)
        if "mp4" in container.format.name and entries:
            # The index lists every sample with its place in the file; what lies behind the end of the file is missing.
            if max(entry.pos + entry.size for entry in entries) > os.path.getsize(path):
                damage, num_frames = "truncated video", max(num_frames, len(entries))
        elif declared_s and packets and declared_s - end_s > MISSING_SECONDS:
            damage = f"truncated video ({end_s:.1f} of {declared_s:.1f} s)"
            num_frames = max(num_frames, round(declared_s * rate)) if rate else num_frames
        elif damage:
            num_frames = max(num_frames, stream.frames)
    times_s = [None if pts is None else pts * time_base for pts in shown]
    times_s = times_s if None in times_s else sorted(times_s)
    return _Scan(num_frames, _times_or_nominal(times_s, rate), num_skipped, rate, damage)


def _times_or_nominal(times_s: list[float | None], rate: float | None) -> list[float] | None:
    """The times if all are known, else those of the nominal rate, else None."""
    if None not in times_s:
        return times_s
    return [index / rate for index in range(len(times_s))] if rate else None


def _declared_duration_s(stream: Any) -> float | None:
    """Length of this stream as a Matroska tag states it, seconds."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None


def _decode_pass(
    path: str, num_skipped: int, wanted: set[int], convert: Callable
) -> tuple[list[Any], list[float | None], str | None]:
    """Decode all frames in order; what `convert` made of the wanted ones, the times of all, and a decoder's complaint."""
    kept, times_s = [], []
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        num_bytes = 3 * max(stream.codec_context.width * stream.codec_context.height, 1)
        # Each decoding thread holds frames of its own: bounded by memory, so that 8K video stays small.
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = max(1, min(os.cpu_count() or 1, 8, DECODER_BYTES // num_bytes))
        aspect = stream.sample_aspect_ratio
        aspect = float(aspect) if aspect and 0.1 < aspect < 10 else 1.0
        turn = None
        try:
            for position, packet in enumerate(container.demux(stream)):
                if position < num_skipped:
                    continue
                for frame in packet.decode():
                    if len(times_s) in wanted:
                        # Asked of one frame only: a frame whose side data was read lives on until garbage collection.
                        turn = _display_turn(frame) if turn is None else turn
                        kept.append(_convert_frame(frame, aspect, turn, f"{path}, frame {len(times_s)}", convert))
                    times_s.append(frame.time)
        except av.error.FFmpegError as error:
            return kept, times_s, error.strerror or str(error)
    return kept, times_s, None


def _convert_frame(frame: Any, aspect: float, turn: tuple[bool, bool, bool], name: str, convert: Callable) -> Any:
    """One decoded frame to upright RGB, then to what the caller keeps."""
    rgb_frame = frame.reformat(format="rgb24")
    height, width, plane = rgb_frame.height, rgb_frame.width, rgb_frame.planes[0]
    # A view, not a copy: (height, padded line) -> (height, width, 3)
    rgb = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : 3 * width].reshape(height, width, 3)
    # Pixels that are not square: enlarge the short direction, so that nothing is lost.
    size_hw = (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)
    is_transposed, flip_vertical, flip_horizontal = turn
    if is_transposed:
        rgb, size_hw = rgb.swapaxes(0, 1), size_hw[::-1]
    rgb = rgb[:: -1 if flip_vertical else 1, :: -1 if flip_horizontal else 1]
    return convert(rgb, size_hw, name)


def _display_turn(frame: Any) -> tuple[bool, bool, bool]:
    """Quarter turn and mirrors of the display matrix (phones film sideways): transpose, then flip vertically, horizontally."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    # A point (p, q) of the stored picture is shown at (a p + c q, b p + d q).
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].astype(np.int64)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, bool(b < 0), bool(c < 0)
    return False, bool(d < 0), bool(a < 0)
