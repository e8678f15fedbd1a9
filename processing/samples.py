"""One thing to train or to be scored on, whatever data set it comes from: a `Sample`, checked when it is made.

Shapes: M boxes, P points of a sample.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from vidllm.processing.video_reading_vidllm import VidLLMInputError


TASKS = ("qa", "sqa", "ground", "caption", "chat")
ROLES = ("system", "user", "assistant")
POINT_FRAMES = ("annotation", "world")
RIGID_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Sample:
    """A question, description, caption or conversation about one scene. Frames are not in it: see `frames_of`.

    Args:
        sample_id (`str`): Unique within a data set's split and variant.
        scene_id (`str`): The scene, as `open_scene` knows it.
        task (`str`): `qa`, `sqa` (from a standpoint), `ground` (boxes wanted), `caption` (of a place), `chat`.
        messages (`list[dict]`): Turns `{"role", "content": [blocks]}`; blocks `{"type": "video"}` (once, first in the first user's turn),
            `{"type": "text", "text"}`, `{"type": "point"}`, `{"type": "box"}`. The last turn is the assistant's where a reply is known.
        benchmark (`str`): Which data set.
        split (`str`): Which split of it.
        official_id (`str`): Id by which its authors' scorer knows it.
        question (`str`): Question or description as the file has it, without a prompt around it.
        answers (`tuple[str, ...]`): All accepted answers; empty where they are hidden.
        references (`tuple[str, ...]`): All descriptions of a captioned object.
        object_ids (`tuple[int, ...]`): Objects that it is about, `objectId` of the aggregation file.
        object_names (`tuple[str, ...]`): Their names as the file has them.
        boxes_annotation (`np.ndarray` of shape `(M, 6)`, float64, *optional*): `(cx, cy, cz, dx, dy, dz)`, metres. None: not known.
        box_frame (`str`): Frame of the boxes, always `annotation`.
        box_block (`tuple[int, ...]`): Which `box` block each box belongs to, counted over the messages; by default all the first.
        points (`np.ndarray` of shape `(P, 3)`, float64, *optional*): Places of the `point` blocks in order, metres. None: not known.
        point_frame (`str`): Frame of the points: `annotation` or `world`.
        question_type (`str`, *optional*): Kind by the benchmark's own rule.
        situation (`str`, *optional*): Standpoint in words.
        alternative_situations (`tuple[str, ...]`): Other wordings of it.
        position_m (`np.ndarray` of shape `(3,)`, float64, *optional*): Standpoint as SQA3D gives it: scene shifted to its mean, not aligned.
        rotation_xyzw (`np.ndarray` of shape `(4,)`, float64, *optional*): Heading as SQA3D gives it, read by key name.
        video (`str`, *optional*): Path of the video below `data_root`, instead of a scene in a known layout.
        poses (`str`, *optional*): Path of its poses below `data_root`.
        annotation_from_world (`np.ndarray` of shape `(4, 4)`, float64, *optional*): Where the annotation frame is, seen from the video's
            first frame. None: the scene's files say it.
        data_root (`str`, *optional*): Folder that the scene lies in.
        official (`dict`): The row as its authors wrote it.

    Raises:
        VidLLMInputError: A field contradicts another or has a wrong form; names the sample and the field.

    Source:
        Ours: one type for all benchmarks, for people's own videos, and for procedural rooms.
    """

    sample_id: str
    scene_id: str
    task: str
    messages: list[dict]
    benchmark: str = ""
    split: str = ""
    official_id: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    object_ids: tuple[int, ...] = ()
    object_names: tuple[str, ...] = ()
    boxes_annotation: np.ndarray | None = None
    box_frame: str = "annotation"
    box_block: tuple[int, ...] = ()
    points: np.ndarray | None = None
    point_frame: str = "annotation"
    question_type: str | None = None
    situation: str | None = None
    alternative_situations: tuple[str, ...] = ()
    position_m: np.ndarray | None = None
    rotation_xyzw: np.ndarray | None = None
    video: str | None = None
    poses: str | None = None
    annotation_from_world: np.ndarray | None = None
    data_root: str | None = None
    official: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sample_id", "scene_id", "benchmark", "split", "official_id", "question"):
            self._check(isinstance(getattr(self, name), str), name, "text", getattr(self, name))
        for name in ("sample_id", "scene_id"):
            self._check(bool(getattr(self, name)), name, "a text that is not empty", getattr(self, name))
        for name in ("question_type", "situation", "video", "poses", "data_root"):
            self._check(isinstance(getattr(self, name), str | None), name, "text or None", getattr(self, name))
        self._check(self.task in TASKS, "task", f"one of {', '.join(TASKS)}", self.task)
        self._check(self.box_frame == "annotation", "box_frame", "annotation", self.box_frame)
        self._check(self.point_frame in POINT_FRAMES, "point_frame", " or ".join(POINT_FRAMES), self.point_frame)
        for name in ("answers", "references", "object_names", "alternative_situations"):
            self._set_tuple(name, str, "a list of texts")
        for name in ("object_ids", "box_block"):
            self._set_tuple(name, int, "a list of whole numbers")
        self._set_array("boxes_annotation", (-1, 6))
        self._set_array("points", (-1, 3))
        self._set_array("position_m", (3,))
        self._set_array("rotation_xyzw", (4,))
        self._set_array("annotation_from_world", (4, 4))
        self._check(isinstance(self.official, Mapping), "official", "a dict", self.official)
        self._check_messages()
        self._check_geometry()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Sample":
        """A sample of a row of `load_benchmark`.

        Args:
            row (`dict`): Columns as the features name them.

        Returns:
            `Sample`

        Raises:
            VidLLMInputError: A column has an unknown name, or a value is not usable.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(row) - known)
        if unknown:
            raise VidLLMInputError(
                f"sample: wanted columns among {', '.join(sorted(known))}; got {', '.join(unknown)}"
            )
        values = {name: value for name, value in row.items() if value is not None}
        # Arrow fills every key of a block with None.
        values["messages"] = [
            {
                "role": turn["role"],
                "content": [
                    {key: value for key, value in block.items() if value is not None} for block in turn["content"]
                ],
            }
            for turn in row["messages"]
        ]
        if isinstance(values.get("official"), str):
            values["official"] = json.loads(values["official"])
        return cls(**values)

    def to_row(self) -> dict[str, Any]:
        """Plain lists and texts, as `load_benchmark` returns them and `from_row` takes them."""
        row = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            row[item.name] = list(value) if isinstance(value, tuple) else value
        row["messages"] = [
            {
                "role": turn["role"],
                "content": [{"type": block["type"], "text": block.get("text")} for block in turn["content"]],
            }
            for turn in self.messages
        ]
        row["official"] = json.dumps(self.official, ensure_ascii=False)
        return row

    @property
    def has_reply(self) -> bool:
        """Whether the last turn is the assistant's."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def num_box_blocks(self) -> int:
        """How many times an assistant answers with boxes."""
        return sum(block["type"] == "box" for turn in self.messages for block in turn["content"])

    @property
    def num_point_blocks(self) -> int:
        """How many places the prompts name."""
        return sum(block["type"] == "point" for turn in self.messages for block in turn["content"])

    @property
    def replies(self) -> tuple[str, ...]:
        """Texts that are equally good as the last turn of an assistant: the answers, or a caption's references."""
        return self.references if self.task == "caption" else self.answers

    @property
    def needs_annotation_frame(self) -> bool:
        """Whether it can be used only where the annotation frame is known as seen from the first sampled frame."""
        has_points = self.points is not None and len(self.points) > 0 and self.point_frame == "annotation"
        asks_for_boxes = self.task == "ground" or self.num_box_blocks > 0
        return has_points or (asks_for_boxes and self.boxes_annotation is not None and len(self.boxes_annotation) > 0)

    @property
    def told_from_first_frame(self) -> bool:
        """Whether its places are given as seen from the first frame of the video, which then must be sampled."""
        has_points = self.points is not None and len(self.points) > 0
        return self.annotation_from_world is not None or (has_points and self.point_frame == "world")

    def points_world(self, annotation_from_world: np.ndarray | None = None) -> np.ndarray:
        """Places of the `point` blocks as the model takes them.

        Args:
            annotation_from_world (`np.ndarray` of shape `(4, 4)`, *optional*): Of the sampled frames; needed for points in `annotation`.

        Returns:
            `np.ndarray` of shape `(P, 3)`, float64: world frame (camera of the first sampled frame), metres.

        Raises:
            VidLLMInputError: The matrix is needed and was not given, or the points are not known.
        """
        if self.points is None:
            raise VidLLMInputError(
                f"sample {self.sample_id}: the place that it asks about is not known, because the scan's files are absent"
            )
        if self.point_frame == "world" or not len(self.points):
            return self.points
        return self._world_from_annotation(annotation_from_world, self.points)

    def boxes_world(self, annotation_from_world: np.ndarray | None = None) -> np.ndarray:
        """Boxes with their centres as seen from the first sampled frame.

        Args:
            annotation_from_world (`np.ndarray` of shape `(4, 4)`, *optional*): Of the sampled frames; not read where there is no box.

        Returns:
            `np.ndarray` of shape `(M, 6)`, float64: centre in the world frame, metres; edge lengths along the *annotation* frame's axes.

        Raises:
            VidLLMInputError: The matrix is needed and was not given.
        """
        if self.boxes_annotation is None or not len(self.boxes_annotation):
            return np.zeros((0, 6))
        centres = self._world_from_annotation(annotation_from_world, self.boxes_annotation[:, :3])
        return np.concatenate([centres, self.boxes_annotation[:, 3:]], axis=1)

    def chat(
        self,
        annotation_from_world: np.ndarray | None = None,
        reply: str | None = None,
        with_reply: bool = True,
        video: Any = None,
    ) -> list[dict]:
        """The conversation as `VidLLMProcessor.apply_chat_template` takes it.

        Args:
            annotation_from_world (`np.ndarray` of shape `(4, 4)`, *optional*): Of the sampled frames; needed for points in `annotation`.
            reply (`str`, *optional*): Text of the last turn instead of the one it has.
            with_reply (`bool`): False leaves out the last turn if it is the assistant's, to ask for it.
            video: Video of the video block (path or frames). None where `scene=` is given to the template.

        Returns:
            `list[dict]`: messages; points carry `xyz` in the world frame.

        Raises:
            VidLLMInputError: See `points_world`; or `reply` is given where none belongs.
        """
        turns = self.messages if with_reply or not self.has_reply else self.messages[:-1]
        num_points = sum(block["type"] == "point" for turn in turns for block in turn["content"])
        points = iter(self.points_world(annotation_from_world).tolist() if num_points else [])
        chat = []
        for number, turn in enumerate(turns):
            content = []
            for block in turn["content"]:
                if block["type"] == "point":
                    content.append({"type": "point", "xyz": next(points), "frame": "world"})
                elif block["type"] == "video":
                    content.append({"type": "video"} if video is None else {"type": "video", "video": video})
                else:
                    content.append(dict(block))
            if reply is not None and number == len(self.messages) - 1 and turn["role"] == "assistant":
                content = [{"type": "text", "text": reply}]
            chat.append({"role": turn["role"], "content": content})
        return chat

    def _world_from_annotation(self, annotation_from_world: np.ndarray | None, points: np.ndarray) -> np.ndarray:
        """Points `(n, 3)` of the annotation frame in the world frame."""
        if annotation_from_world is None:
            annotation_from_world = self.annotation_from_world
        if annotation_from_world is None:
            raise VidLLMInputError(
                f"sample {self.sample_id}: wanted annotation_from_world of the sampled frames, because it has places in the annotation "
                "frame; the scene has no valid pose for its first sampled frame, or no known alignment"
            )
        matrix = np.asarray(annotation_from_world, dtype=np.float64)
        # p_annotation = R p_world + t, so p_world = R^-1 (p_annotation - t)
        return np.linalg.solve(matrix[:3, :3], (points - matrix[:3, 3]).T).T

    def _check(self, ok: bool, name: str, wanted: str, got: Any) -> None:
        """One clear error."""
        if not ok:
            raise VidLLMInputError(f"sample {self.sample_id!r:.80}, {name}: wanted {wanted}; got {got!r:.80}")

    def _set_tuple(self, name: str, kind: type, wanted: str) -> None:
        """A checked tuple instead of any sequence."""
        value = getattr(self, name)
        ok = isinstance(value, Sequence) and not isinstance(value, str)
        ok = ok and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
        self._check(ok, name, wanted, value)
        object.__setattr__(self, name, tuple(value))

    def _set_array(self, name: str, shape: tuple[int, ...]) -> None:
        """A checked, read-only array instead of any numbers."""
        value = getattr(self, name)
        if value is None:
            return
        try:
            array = np.array(value, dtype=np.float64)
            if array.size == 0 and shape[0] == -1:
                array = array.reshape(0, shape[1])
        except (TypeError, ValueError):
            array = np.zeros(())
        ok = array.ndim == len(shape) and all(
            want in (-1, have) for want, have in zip(shape, array.shape, strict=True)
        )
        self._check(ok and bool(np.isfinite(array).all()), name, f"finite numbers of shape {shape}", value)
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    def _check_messages(self) -> None:
        """Roles, blocks and their order."""
        self._check(
            isinstance(self.messages, list) and bool(self.messages), "messages", "a list of turns", self.messages
        )
        first_user, counts, last_role = None, {"video": 0, "point": 0, "box": 0}, None
        for number, turn in enumerate(self.messages):
            name = f"messages[{number}]"
            is_turn = isinstance(turn, Mapping) and turn.get("role") in ROLES and isinstance(turn.get("content"), list)
            self._check(is_turn, name, "a role and a list of content blocks", turn)
            role = turn["role"]
            self._check(role != last_role and (role != "system" or number == 0), name, "roles in turn", role)
            last_role = role
            first_user = number if first_user is None and role == "user" else first_user
            for position, block in enumerate(turn["content"]):
                kind = block.get("type") if isinstance(block, Mapping) else None
                allowed = {"user": ("text", "video", "point"), "assistant": ("text", "box"), "system": ("text",)}[role]
                self._check(kind in allowed, f"{name}, block {position}", f"a type among {', '.join(allowed)}", block)
                if kind == "text":
                    ok = isinstance(block.get("text"), str)
                    self._check(ok, f"{name}, block {position}", "a text block with a text", block)
                else:
                    counts[kind] += 1
                if kind == "video":
                    ok = number == first_user and position == 0
                    self._check(ok, f"{name}, block {position}", "the video first in the first user's turn", block)
            says = any(b["type"] in ("point", "box") or b.get("text", "").strip() for b in turn["content"])
            self._check(says, name, "a turn that says something", turn)
        self._check(counts["video"] == 1, "messages", "exactly one video block", counts["video"])
        self._check(first_user is not None and last_role != "system", "messages", "a user's turn", self.messages)
        if self.points is not None:
            self._check(
                counts["point"] == len(self.points), "points", f"{counts['point']}, one per block", len(self.points)
            )

    def _check_geometry(self) -> None:
        """Boxes, headings and matrices that fit together."""
        num_boxes = 0 if self.boxes_annotation is None else len(self.boxes_annotation)
        if num_boxes:
            self._check(
                bool((self.boxes_annotation[:, 3:] >= 0).all()),
                "boxes_annotation",
                "sizes from 0",
                self.boxes_annotation,
            )
        if not self.box_block and num_boxes:
            object.__setattr__(self, "box_block", (0,) * num_boxes)
        self._check(len(self.box_block) == num_boxes, "box_block", f"one number per box ({num_boxes})", self.box_block)
        if self.num_box_blocks:
            ok = all(0 <= block < self.num_box_blocks for block in self.box_block)
            self._check(ok, "box_block", f"numbers of box blocks, 0..{self.num_box_blocks - 1}", self.box_block)
        if self.task == "ground" and self.has_reply:
            self._check(
                self.num_box_blocks > 0, "messages", "a box block in the reply of a ground sample", self.messages[-1]
            )
        if self.rotation_xyzw is not None:
            norm = math.sqrt(float((self.rotation_xyzw**2).sum()))
            self._check(
                abs(norm - 1) < RIGID_TOLERANCE, "rotation_xyzw", "a unit quaternion", self.rotation_xyzw.tolist()
            )
        if self.annotation_from_world is not None:
            turn = self.annotation_from_world[:3, :3]
            error = np.abs(turn @ turn.T - np.eye(3)).max()
            ok = error < RIGID_TOLERANCE and np.linalg.det(turn) > 0
            ok = ok and np.abs(self.annotation_from_world[3] - [0, 0, 0, 1]).max() < 1e-6
            self._check(bool(ok), "annotation_from_world", "a rigid transform", self.annotation_from_world.tolist())


__all__ = ["TASKS", "Sample"]
