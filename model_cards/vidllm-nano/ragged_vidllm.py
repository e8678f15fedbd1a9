"""Batches of videos that differ in frames or size: group, run unpadded, put back together."""

import torch
from transformers.utils import ModelOutput


def group_rows_by_size(video_size_shw: torch.Tensor) -> list:
    """Rows that can run together.

    Args:
        video_size_shw (`torch.Tensor` of shape `(B, 3)`, int64, on the CPU): Frames, height, width.

    Returns:
        `list` of `((frames, height, width), [rows])`, in the order of first appearance.

    Source:
        Ours: padding would change attention, so it is used for transport only.
    """
    groups = {}
    for row, size in enumerate(video_size_shw.tolist()):
        groups.setdefault(tuple(size), []).append(row)
    return list(groups.items())


def ragged_masks(video_size_shw: torch.Tensor) -> tuple:
    """Masks of what is real in a padded batch.

    Args:
        video_size_shw (`torch.Tensor` of shape `(B, 3)`, int64): Frames, height, width.

    Returns:
        `tuple`: frame mask `(B, S)` and pixel mask `(B, S, H, W)`, both bool.

    Source:
        Ours.
    """
    most = video_size_shw.max(dim=0).values.tolist()
    inside = [
        torch.arange(size, device=video_size_shw.device)[None] < video_size_shw[:, axis, None]
        for axis, size in enumerate(most)
    ]
    frame_mask, row_mask, column_mask = inside
    pixel_mask = frame_mask[:, :, None, None] & row_mask[:, None, :, None] & column_mask[:, None, None, :]
    return frame_mask, pixel_mask


def scatter_rows(groups: list, batch: int):  # noqa: ANN201
    """Put the results of the groups back into one padded batch.

    Args:
        groups (`list` of `(rows, value)`): `value` is a tensor `(len(rows), ...)`, a `ModelOutput` of such tensors, or None.
        batch (`int`): B.

    Returns:
        The same kind of value with batch B; tensors of different size are padded with 0 at the end of each axis.

    Source:
        Ours.
    """
    first = groups[0][1]
    if first is None:
        return None
    if isinstance(first, ModelOutput):
        names = list(first.__dataclass_fields__)
        return type(first)(
            **{name: scatter_rows([(rows, getattr(value, name)) for rows, value in groups], batch) for name in names}
        )
    by_row = {row: value[position] for rows, value in groups for position, row in enumerate(rows)}
    rows = [by_row[row] for row in range(batch)]
    most = [max(size) for size in zip(*(row.shape for row in rows), strict=True)]
    padded = []
    for row in rows:
        pads = [
            pad for size, want in zip(reversed(row.shape), reversed(most), strict=True) for pad in (0, want - size)
        ]
        padded.append(torch.nn.functional.pad(row, pads) if any(pads) else row)
    return torch.stack(padded)
