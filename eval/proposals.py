"""Places to ask about that somebody else has found. Shapes: M boxes of a scene."""

import numpy as np

from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou


# Below the least overlap that captions are scored at, nothing is asked.
LEAST_IOU = 0.25
CAPTION_IOUS = (0.5, 0.25)


def best_overlap(proposals: np.ndarray, box: np.ndarray) -> tuple[int | None, float]:
    """The proposal that stands for an object.

    Args:
        proposals (`np.ndarray` of shape `(M, 6)`): Of the scene.
        box (`np.ndarray` of shape `(6,)`): Of the object, in the same frame.

    Returns:
        `tuple`: position of the proposal of greatest overlap (the first of several), None where none overlaps by `LEAST_IOU`; its overlap, else 0.

    Source:
        Upstream: LaVi-Lab/Video-3D-LLM@3ff70e8, embodied-generalist/embodied-generalist@567f2d8 (a caption is asked for at the proposal that fits
        the object best). Ours: from 0.25, so that both thresholds can be scored.
    """
    if not len(proposals):
        return None, 0.0
    overlaps = scanrefer_iou(proposals, np.asarray(box)[None])
    best = int(overlaps.argmax())
    return (best, float(overlaps[best])) if overlaps[best] >= LEAST_IOU else (None, 0.0)


__all__ = ["CAPTION_IOUS", "LEAST_IOU", "best_overlap"]
