"""Deterministic weights and images of the VGGT fixtures, after the rule published with them.

`tests/goldens/vggt/weights.json` holds a CRC-32 of every tensor, so a wrong rule cannot pass unnoticed.
"""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn


GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "vggt"
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_LEARNED_TOKENS = re.compile(
    r"aggregator\.(camera_token|register_token|patch_embed\.(cls_token|register_tokens|pos_embed))|camera_head\.empty_pose_tokens"
)
_POSE_BIAS = (0.02, -0.03, 0.05, 0.01, -0.02, 0.015, 0.25, 0.20, 0.23)


def mean_and_sd(key: str, shape: tuple[int, ...]):
    """Mean (number or vector) and standard deviation of one tensor."""
    parts = key.split(".")
    if _LEARNED_TOKENS.fullmatch(key):
        return 0.0, 0.5
    if key == "aggregator.patch_embed.mask_token":
        return 0.0, 0.02
    if parts[-1] == "gamma":
        return 0.2, 0.1
    if "norm" in parts[-2]:
        return (1.0, 0.1) if parts[-1] == "weight" else (0.0, 0.05)
    if key == "camera_head.pose_branch.fc2.bias":
        return np.array(_POSE_BIAS, dtype=np.float32), 0.02
    if key == "camera_head.pose_branch.fc2.weight":
        return 0.0, 0.15 / math.sqrt(shape[1])
    if parts[-1] == "bias":
        return 0.0, 0.05
    if len(shape) == 2:
        return 0.0, 1 / math.sqrt(shape[1])
    if ".resize_layers.0." in key or ".resize_layers.1." in key:
        return 0.0, 1 / math.sqrt(shape[0])
    return 0.0, 1 / math.sqrt(shape[1] * shape[2] * shape[3])


def tensor_values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values of one tensor."""
    count = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(key.encode())).random_raw((count + 1) // 2)
    words = raw.astype("<u8", copy=False).view("<u4")[:count]
    words >>= 8
    values = words.astype(np.float32)
    values *= np.float32(2.0**-23)
    values -= np.float32(1)
    mean, sd = mean_and_sd(key, shape)
    values *= np.float32(sd * math.sqrt(3))
    if np.any(np.asarray(mean) != 0):
        values = values.reshape(shape) + np.asarray(mean, dtype=np.float32)
    return values.reshape(shape)


def images(num_videos: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Fixture images `(B, S, 3, H, W)`, values in [0.15, 0.85], not normalised."""
    b, s, c, y, x = np.meshgrid(
        *(np.arange(size) for size in (num_videos, num_frames, 3, height, width)), indexing="ij", sparse=True
    )
    waves = np.sin(0.11 * (c + 1) * x + 0.07 * y + 0.9 * s + 0.4 * b) * np.cos(0.05 * x - 0.13 * (c + 1) * y + 0.5 * s)
    noise = ((3 * x + 5 * y + 7 * c + 11 * s + 13 * b) % 17) / 16 - 0.5
    return torch.from_numpy((0.5 + 0.3 * waves + 0.1 * noise).astype(np.float32))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """`(B, S, 3, H, W)` in [0, 1] -> ImageNet-normalised."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels - mean) / std


def expected_tensors() -> dict:
    """Name -> [shape, CRC-32] of every tensor of the fixture's network."""
    return json.loads((GOLDENS / "weights.json").read_text())["tensors"]


@torch.no_grad()
def fill(root: nn.Module, key_map: dict, prefix: tuple[str, ...] = ("",)) -> int:
    """Write the fixture's values into the parameters of `root` whose names start with `prefix`; return how many numbers.

    Works tensor by tensor and keeps no second copy: a parameter on the meta device is replaced by one that owns the values.
    """
    expected = expected_tensors()
    count = 0
    for key, rule in key_map.items():
        targets = [(name, rows) for name, rows in rule.targets if name.startswith(prefix)]
        if not targets:
            continue
        values = tensor_values(key, rule.shape)
        shape, crc = expected[key]
        assert tuple(shape) == rule.shape, (key, shape, rule.shape)
        assert zlib.crc32(values.data) == crc, f"{key}: the filler made other values than the fixture's"
        values = torch.from_numpy(values)
        for name, rows in targets:
            module_name, _, leaf = name.rpartition(".")
            module = root.get_submodule(module_name)
            wanted = values if rows is None else values[rows]
            if getattr(module, leaf).is_meta:
                setattr(module, leaf, nn.Parameter(wanted, requires_grad=False))
            else:
                getattr(module, leaf).copy_(wanted)
            count += wanted.numel()
    return count
