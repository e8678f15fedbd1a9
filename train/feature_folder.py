"""Features of a teacher on disk, made once: one safetensors file per clip, and a manifest that says of which model, frames and clips.

A clip is known by its name and by what is in it, so that clips of two folders may have the same names.

Shapes: F frames, H W pixels, h w patch grid of the teacher, C teacher width.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


MANIFEST_NAME = "manifest.json"
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Bytes that are read at either end of a file.
_ENDS = 65536


@dataclass(frozen=True)
class FrameKey:
    """Which frame of which clip.

    Args:
        clip (`str`): Name of the clip.
        index (`int`): Number of the frame in it.
        identity (`str`): `content_identity` of the clip; empty where frames are not read from files, and then there are no features on disk.

    Source:
        Ours.
    """

    clip: str
    index: int
    identity: str = ""


def content_identity(path: str | Path) -> str:
    """What a clip holds, told from little of it.

    Args:
        path (`str` or `Path`): A file, or a folder with pictures in it or in its folders.

    Returns:
        `str`: 32 hexadecimal digits: SHA-256 of the size of a file and its first and last 64 KiB; of a folder, of the names and sizes of its pictures and
        of the same ends of the first and the last one.

    Raises:
        OSError: It cannot be read.

    Source:
        Ours: whole videos take minutes to read. Time stamps are left out: a copy is the same clip.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_file():
        _add_ends(digest, path)
        return digest.hexdigest()[:32]
    pictures = _pictures_of(path) or [picture for folder in sorted(path.iterdir()) for picture in _pictures_of(folder)]
    for picture in pictures:
        digest.update(f"{picture.relative_to(path).as_posix()}\0{picture.stat().st_size}\n".encode())
    for picture in [*pictures[:1], *pictures[1:][-1:]]:
        _add_ends(digest, picture)
    return digest.hexdigest()[:32]


def _pictures_of(folder: Path) -> list[Path]:
    """Pictures in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file())


def _add_ends(digest: "hashlib._Hash", path: Path) -> None:
    """Size and both ends of a file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size}\n".encode())
        file.seek(0)
        digest.update(file.read(_ENDS))
        file.seek(max(size - _ENDS, 0))
        digest.update(file.read(_ENDS))


@dataclass(frozen=True)
class FeatureFacts:
    """What a folder of features was made of; a folder made of something else is refused.

    Args:
        teacher (`str`): Place of the model.
        stream (`str`): See `VisionTeacher`.
        width (`int`): C.
        size_hw (`tuple[int, int]`, *optional*): Height and width of the frames, if they are all of one size.
        frames_kept (`int`): Frames per clip, spread evenly; 0 = all.

    Source:
        Ours.
    """

    teacher: str
    stream: str
    width: int
    size_hw: tuple[int, int] | None
    frames_kept: int


def is_feature_folder(place: str | Path) -> bool:
    """Whether a place of a teacher is a folder of features.

    Args:
        place (`str` or `Path`): As of `open_teacher`.

    Returns:
        `bool`

    Source:
        Ours.
    """
    return (Path(place).expanduser() / MANIFEST_NAME).is_file()


class FeatureFolder:
    """Features that were computed once: one safetensors file per clip, and a manifest; a `Teacher`.

    Args:
        folder (`str` or `Path`): Existing, complete.

    Raises:
        ValueError: There is no manifest, or it is not of this package, or it does not say what is in its clips.

    Source:
        Ours.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        path = self.folder / MANIFEST_NAME
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            self.facts = FeatureFacts(**document["facts"])
            self.clips = {name: dict(files) for name, files in document["clips"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"features: wanted {path} as `vidllm train precompute` writes it, with the identity of each clip's content; {error}: make them again"
            ) from error
        self.width = self.facts.width

    def file_of(self, clip: str, identity: str) -> Path:
        """Where the features of a clip are.

        Args:
            clip (`str`): Its name.
            identity (`str`): `content_identity` of it.

        Returns:
            `Path`

        Raises:
            ValueError: There are none, or those of another clip of this name.

        Source:
            Ours.
        """
        files = self.clips.get(clip)
        if not files:
            raise ValueError(
                f"features: {self.folder} holds nothing of the clip {clip}: vidllm train precompute ... --out {self.folder} adds what is missing, "
                "and clips that are held out need features too"
            )
        if identity not in files:
            raise ValueError(
                f"features: {self.folder} holds those of another clip {clip} (its content is {', '.join(files)}; wanted {identity or 'of no file'}): "
                f"vidllm train precompute ... --out {self.folder} with these clips adds theirs"
            )
        return self.folder / files[identity]

    def features(self, frames_rgb: torch.Tensor, keys: Sequence[FrameKey]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features of frames.

        Args:
            frames_rgb (`torch.Tensor` of shape `(F, 3, H, W)`): Read for its device and size.
            keys (`Sequence[FrameKey]`): Which frames these are.

        Returns:
            `tuple`: `torch.Tensor` of shape `(F, h * w, C)`, float32; rows and columns.

        Raises:
            ValueError: A clip or frame is not there, the clip of this name was another one, or frames of other sizes were written.

        Source:
            Ours.
        """
        rows, grids = [], set()
        for key in keys:
            with safe_open(self.file_of(key.clip, key.identity), "pt") as file:
                indices = file.get_tensor("indices").tolist()
                grid, size = (tuple(file.get_tensor(name).tolist()) for name in ("grid_hw", "size_hw"))
                if key.index not in indices:
                    raise ValueError(
                        f"features: {self.folder} holds the frames {indices} of {key.clip}; wanted {key.index}"
                    )
                if size != tuple(frames_rgb.shape[-2:]):
                    raise ValueError(
                        f"features: {key.clip}: wanted features of frames of {tuple(frames_rgb.shape[-2:])}; got those of {size}"
                    )
                rows.append(file.get_slice("features")[indices.index(key.index)])
                grids.add(grid)
        if len(grids) != 1:
            raise ValueError(f"features: wanted frames of one grid; got {sorted(grids)}")
        return torch.stack(rows).float().to(frames_rgb.device), grids.pop()


class FeatureWriter:
    """Writes features clip by clip; a run that was killed goes on where it stopped.

    Args:
        folder (`str` or `Path`): New, or of a run with the same facts.
        facts (`FeatureFacts`): What is written.

    Raises:
        ValueError: The folder holds features of something else.

    Source:
        Ours.
    """

    def __init__(self, folder: str | Path, facts: FeatureFacts):
        self.folder, self.facts = Path(folder).expanduser(), facts
        self.clips: dict[str, dict[str, str]] = {}
        path = self.folder / MANIFEST_NAME
        if path.is_file():
            before = FeatureFolder(self.folder)
            known = (
                before.facts
                if before.facts.size_hw is None
                else FeatureFacts(**{**asdict(before.facts), "size_hw": tuple(before.facts.size_hw)})
            )
            if known != facts:
                raise ValueError(f"features: {self.folder} holds those of {known}; wanted {facts}")
            self.clips = before.clips
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"features: wanted a new folder or one with features; got {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest()

    def holds(self, clip: str, identity: str) -> bool:
        """Whether a clip was written whole.

        Args:
            clip (`str`): Its name.
            identity (`str`): `content_identity` of it.

        Returns:
            `bool`

        Source:
            Ours.
        """
        name = self.clips.get(clip, {}).get(identity)
        if name is None:
            return False
        try:
            with safe_open(self.folder / name, "pt"):
                return True
        except (SafetensorError, OSError):
            return False

    def write(
        self,
        clip: str,
        identity: str,
        indices: Sequence[int],
        features: torch.Tensor,
        grid_hw: tuple[int, int],
        size_hw: tuple[int, int],
    ) -> None:
        """Write the features of a clip's frames.

        Args:
            clip (`str`): Its name.
            identity (`str`): `content_identity` of it.
            indices (`Sequence[int]`): Numbers of the frames.
            features (`torch.Tensor` of shape `(F, h * w, C)`): Stored as float16.
            grid_hw (`tuple[int, int]`): Rows and columns.
            size_hw (`tuple[int, int]`): Height and width of the frames, pixels.
        """
        name = f"features-{hashlib.sha256(f'{clip}{chr(0)}{identity}'.encode()).hexdigest()[:20]}.safetensors"
        part = self.folder / f"{name}.part"
        save_file(
            {
                "features": features.to("cpu", torch.float16).contiguous(),
                "indices": torch.tensor(list(indices)),
                "grid_hw": torch.tensor(grid_hw),
                "size_hw": torch.tensor(size_hw),
            },
            part,
        )
        os.replace(part, self.folder / name)
        self.clips.setdefault(clip, {})[identity] = name
        self._write_manifest()

    def _write_manifest(self) -> None:
        """Appears whole or not at all."""
        document = {"facts": asdict(self.facts), "clips": self.clips}
        part = self.folder / f"{MANIFEST_NAME}.part"
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / MANIFEST_NAME)


__all__ = [
    "MANIFEST_NAME",
    "FeatureFacts",
    "FeatureFolder",
    "FeatureWriter",
    "FrameKey",
    "content_identity",
    "is_feature_folder",
]
