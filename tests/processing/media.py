"""Synthetic videos, damaged files and a byte-level tokenizer for the tests of the processor."""

import contextlib
import warnings
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<video>", "<coord>", "<loc>"]
NUM_SCENE_TOKENS = 5


def picture(index, height=48, width=64):
    """A frame that differs from all others and from its own mirror images: colours per corner, a bar that tells the index."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[: height // 2, : width // 2] = (200, 40, 40)
    rgb[: height // 2, width // 2 :] = (40, 200, 40)
    rgb[height // 2 :, : width // 2] = (40, 40, 200)
    rgb[height // 2 :, width // 2 :] = (20 + (index * 37) % 200,) * 3
    return rgb


def write_video(
    path,
    frames,
    rate=10,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    container_options=None,
    times=None,
    rotation=None,
    mirror=False,
    aspect=None,
    audio=False,
):
    """Encode frames (uint8 arrays). `times` are presentation times in units of 1/1000 s, for a variable frame rate."""
    path = str(path)
    with av.open(path, "w", options=container_options or {}) as container:
        stream = None
        for index, rgb in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options or {})
                stream.height, stream.width = rgb.shape[:2]
                stream.pix_fmt = pix_fmt
                if aspect is not None:
                    stream.codec_context.sample_aspect_ratio = Fraction(aspect)
                if rotation is not None:
                    stream.set_display_rotation(rotation, hflip=mirror)
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path, seconds=0.5):
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, int(16000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def cut(path, target, share):
    """A copy of the first part of a file."""
    data = Path(path).read_bytes()
    Path(target).write_bytes(data[: int(len(data) * share)])
    return str(target)


def decode_all(path):
    """The slow obvious version: every frame of a file as RGB, in order."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def write_folder(folder, frames, names=None):
    """Frames as PNG files."""
    folder.mkdir()
    for index, rgb in enumerate(frames):
        Image.fromarray(rgb).save(folder / (names[index] if names else f"frame_{index}.png"))
    return str(folder)


def template(family):
    """The shipped chat template of a family."""
    name = {"chatml": "chat_template.jinja", "llama3": "chat_template_llama3.jinja"}[family]
    return files("vidllm.processing").joinpath(name).read_text(encoding="utf-8")


def byte_tokenizer():
    """256 bytes and the special tokens; no merges, nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def tiny_processor(**changes):
    """A processor for small frames: shorter side 28, two patches."""
    settings = {"size": {"shortest_edge": 28}, "num_frames": 4, **changes}
    return VidLLMProcessor(
        VidLLMVideoProcessor(**settings),
        byte_tokenizer(),
        num_scene_tokens=NUM_SCENE_TOKENS,
        chat_template=template("chatml"),
    )


@contextlib.contextmanager
def no_warning():
    """Fail on any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
