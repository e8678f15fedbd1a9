"""What the model knows of a video once it is encoded: the reconstruction and the scene tokens.

Shapes: B videos, S frames, H W pixels, N scene-token slots, D language-model width.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import ModelOutput


SCENE_FORMAT = "vidllm_scene_1"


class _BatchedOutput(ModelOutput):
    """A `ModelOutput` of batch-first tensors: every method keeps the batch axis and None stays None."""

    def _map(self, function):  # noqa: ANN001
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _BatchedOutput):
                values[field.name] = value._map(function)
            else:
                values[field.name] = None if value is None else function(value)
        return type(self)(**values)

    @property
    def num_scenes(self) -> int:
        """Number of videos B."""
        return next(iter(self._tensors().values())).shape[0]

    def _tensors(self, prefix: str = "") -> dict:
        """All tensors under dotted names."""
        named = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _BatchedOutput):
                named.update(value._tensors(f"{prefix}{field.name}."))
            elif value is not None:
                named[f"{prefix}{field.name}"] = value
        return named

    def select(self, index):  # noqa: ANN001
        """Keep some videos.

        Args:
            index (`int`, `slice`, `list[int]` or `torch.Tensor` of shape `(k,)`, int64): Rows to keep, in this order.

        Returns:
            The same type with a batch of k rows (k = 1 for an `int`).

        Raises:
            ValueError: A row is out of range.

        Source:
            Ours: the batch axis is never dropped, so that what comes back can be given to `generate` again.
        """
        count = self.num_scenes
        if isinstance(index, slice):
            rows = list(range(*index.indices(count)))
        elif isinstance(index, torch.Tensor):
            rows = index.reshape(-1).tolist()
        else:
            rows = [index] if isinstance(index, int) else list(index)
        for row in rows:
            if not -count <= row < count:
                raise ValueError(f"select: wanted rows in 0..{count - 1}; got {row}")
        rows = torch.tensor([row % count for row in rows], dtype=torch.long)
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def expand(self, count: int):
        """Repeat each video `count` times, neighbours together (the order of beams).

        Args:
            count (`int`): Copies of each row.

        Returns:
            The same type with a batch of `count` times as many rows.

        Raises:
            ValueError: `count` is not positive.

        Source:
            Ours: same order as transformers' `_expand_inputs_for_generation`.
        """
        if count < 1:
            raise ValueError(f"expand: wanted a positive count; got {count}")
        return self._map(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def to(self, *args, **kwargs):
        """Move to a device; a dtype changes floating tensors of the language side only, geometry stays float32.

        Args:
            *args: As `torch.Tensor.to` takes them: a device, a dtype, or both.
            **kwargs: `device=`, `dtype=`.

        Returns:
            The same type.

        Source:
            Ours: positions, depth and poses lose centimetres in bfloat16.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return self._to(device, dtype)

    def _to(self, device, dtype):  # noqa: ANN001
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _BatchedOutput):
                values[field.name] = value._to(device, dtype)
            elif value is not None:
                values[field.name] = value.to(device, dtype if field.name == "tokens" else None)
        return type(self)(**values)


@dataclass
class VidLLMReconstruction(_BatchedOutput):
    """The room in 3D: one row per video.

    Args:
        cam_from_world (`torch.Tensor` of shape `(batch, frames, 4, 4)`): Poses, OpenCV axes; the world is the camera of the
            first sampled frame, whose own pose is exactly the identity.
        intrinsics_px (`torch.Tensor` of shape `(batch, frames, 3, 3)`): Pinhole cameras in pixels of the model input.
        depth (`torch.Tensor` of shape `(batch, frames, height, width)`): Along the optical axis, in `unit`; 0 marks invalid.
        depth_confidence (`torch.Tensor` of shape `(batch, frames, height, width)`): Above 1; higher is surer. 1 where depth was given.
        points_world (`torch.Tensor` of shape `(batch, frames, height, width, 3)`): Unprojected depth, world frame, in `unit`.
        scale (`torch.Tensor` of shape `(batch,)`): Factor by which the relative geometry was multiplied.
        scale_valid_mask (`torch.Tensor` of shape `(batch,)`, bool): False where no valid pixel or baseline gave a scale, which is then 1.
        room_from_world (`torch.Tensor` of shape `(batch, 3, 3)`): Rotation to z up and x, y along the dominant walls.
        metric_mask (`torch.Tensor` of shape `(batch,)`, bool): True where the row is in metres.
        video_size_shw (`torch.Tensor` of shape `(batch, 3)`, int64): Frames, height and width of each video without padding.
        frame_mask (`torch.Tensor` of shape `(batch, frames)`, bool, *optional*): Real frames; only where a batch is ragged.
        pixel_mask (`torch.Tensor` of shape `(batch, frames, height, width)`, bool, *optional*): Real pixels; only where a batch is ragged.

    Source:
        Paper: section 3.2 (poses, metric depth, points). Ours: room frame, masks, units.
    """

    cam_from_world: torch.Tensor | None = None
    intrinsics_px: torch.Tensor | None = None
    depth: torch.Tensor | None = None
    depth_confidence: torch.Tensor | None = None
    points_world: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scale_valid_mask: torch.Tensor | None = None
    room_from_world: torch.Tensor | None = None
    metric_mask: torch.Tensor | None = None
    video_size_shw: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None

    @property
    def is_metric(self) -> bool:
        """True if every row is in metres."""
        return bool(self.metric_mask.all())

    @property
    def unit(self) -> str:
        """`"m"` if every row is in metres, else `"relative"`."""
        return "m" if self.is_metric else "relative"

    @property
    def num_scenes(self) -> int:
        """Number of videos B."""
        return self.cam_from_world.shape[0]


@dataclass
class VidLLMScene(_BatchedOutput):
    """An encoded video: ask it as often as you like.

    Args:
        tokens (`torch.Tensor` of shape `(batch, slots, size)`): Projected scene tokens; empty slots are 0.
        positions (`torch.Tensor` of shape `(batch, slots, 3)`): Room frame, position units (see `position_scale`).
        mask (`torch.Tensor` of shape `(batch, slots)`, bool): True = the slot is filled.
        position_scale (`torch.Tensor` of shape `(batch,)`): Position units per unit of the reconstruction. 1 for metric scenes;
            relative scenes are brought to a median distance of 2, so that the position embedding sees a room-sized scene.
        reconstruction (`VidLLMReconstruction`): Poses, depth, points.

    Source:
        Ours: the paper encodes the video for each question; ScanQA asks about 66 questions per scene.
    """

    tokens: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    position_scale: torch.Tensor | None = None
    reconstruction: VidLLMReconstruction | None = None

    def __post_init__(self):
        super().__post_init__()
        # Language-model caches over this scene's prefix, filled by `generate`; neither saved nor copied.
        self.prefix_caches = {}

    def __reduce__(self):
        """Copies and pickles carry the fields only: a kept prefix belongs to one object and one model."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def num_scenes(self) -> int:
        """Number of videos B."""
        return self.tokens.shape[0]

    def point_at(
        self, frame: int, u: float, v: float, scene: int | None = None, frame_of: str = "world"
    ) -> torch.Tensor:
        """The 3D point under a pixel.

        Args:
            frame (`int`): Number of the sampled frame, from 0.
            u (`float`): Column in pixels of the model input, integer = pixel centre.
            v (`float`): Row in pixels of the model input.
            scene (`int`, *optional*): Row of the batch; needed where there are several.
            frame_of (`str`): `world` or `room`.

        Returns:
            `torch.Tensor` of shape `(3,)`: in `reconstruction.unit`, frame `frame_of`.

        Raises:
            ValueError: The row, frame or pixel does not exist, or the pixel has no valid depth.

        Source:
            Ours: nearest pixel; interpolating across an object's edge would give a point in the air.
        """
        recon = self.reconstruction
        if scene is None and self.num_scenes > 1:
            raise ValueError(
                f"point_at: wanted scene=0..{self.num_scenes - 1} for a batch of {self.num_scenes}; got None"
            )
        row = scene or 0
        if not 0 <= row < self.num_scenes:
            raise ValueError(f"point_at: scene: wanted 0..{self.num_scenes - 1}; got {row}")
        if frame_of not in ("world", "room"):
            raise ValueError(f"point_at: frame_of: wanted 'world' or 'room'; got {frame_of!r}")
        num_frames, height, width = recon.video_size_shw[row].tolist()
        if not 0 <= frame < num_frames:
            raise ValueError(f"point_at: frame: wanted 0..{num_frames - 1}; got {frame}")
        # written so that NaN fails too
        if not (-0.5 <= u < width - 0.5 and -0.5 <= v < height - 0.5):
            raise ValueError(
                f"point_at: pixel: wanted u in 0..{width - 1} and v in 0..{height - 1} (pixels of the model input); got u={u}, v={v}"
            )
        column, line = int(u + 0.5), int(v + 0.5)
        point_world = recon.points_world[row, frame, line, column]
        if not (recon.depth[row, frame, line, column] > 0 and torch.isfinite(point_world).all()):
            raise ValueError(f"point_at: frame {frame}, pixel u={column}, v={line}: no valid depth there")
        if frame_of == "room":
            return recon.room_from_world[row].to(point_world.dtype) @ point_world
        return point_world

    def save(self, path: str | Path) -> None:
        """Write the scene to a safetensors file.

        Args:
            path (`str` or `Path`): File to write.

        Source:
            Ours: safetensors, nothing is pickled.
        """
        tensors = {name: value.detach().contiguous() for name, value in self._tensors().items()}
        safetensors.torch.save_file(tensors, str(path), metadata={"format": SCENE_FORMAT})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "VidLLMScene":
        """Read a scene that `save` wrote.

        Args:
            path (`str` or `Path`): File to read.
            device (`str` or `torch.device`): Where the tensors go.

        Returns:
            `VidLLMScene`: equal to the saved one bit for bit.

        Raises:
            ValueError: The file is missing, broken, or holds something else.

        Source:
            Ours.
        """
        if not Path(path).is_file():
            raise ValueError(f"scene file: wanted a file; got {path}, which does not exist")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                found = (file.metadata() or {}).get("format")
                if found != SCENE_FORMAT:
                    raise ValueError(f"scene file {path}: wanted format {SCENE_FORMAT!r}; got {found!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"scene file {path}: not a complete safetensors file ({error})") from error
        inner = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith("reconstruction.")}
        outer = {name: value for name, value in tensors.items() if "." not in name}
        return cls(**outer, reconstruction=VidLLMReconstruction(**inner))


__all__ = ["VidLLMReconstruction", "VidLLMScene"]
