"""The prompt side: which scene a prompt is about, which slots are empty, what the language model reads.

Used by `forward` and by `generate` alike, so that both mask and count the same way.
Shapes: Q prompts, L text tokens, N scene-token slots, D language-model width, M points of a prompt.
"""

from collections.abc import Callable

import torch

from .scene_vidllm import VidLLMScene


def resolve_scene_index(
    num_prompts: int, scene: VidLLMScene, scene_index: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which scene each prompt is about.

    Args:
        num_prompts (`int`): Q.
        scene (`VidLLMScene`): Encoded videos.
        scene_index (`torch.Tensor` of shape `(Q,)`, int64, *optional*): Given map, -1 = no scene. By default prompt i is about video i,
            or all are about the only one.
        device (`torch.device`): Where the result goes.

    Returns:
        `torch.Tensor` of shape `(Q,)`, int64.

    Raises:
        ValueError: Counts do not fit or a row does not exist.

    Source:
        Ours: scene packing.
    """
    count = scene.num_scenes
    if scene_index is None:
        if count not in (1, num_prompts):
            raise ValueError(f"scene_index: wanted one for {num_prompts} prompts on {count} videos; got None")
        return (
            torch.zeros(num_prompts, dtype=torch.long, device=device)
            if count == 1
            else torch.arange(count, device=device)
        )
    scene_index = scene_index.to(device)
    if tuple(scene_index.shape) != (num_prompts,):
        raise ValueError(f"scene_index: wanted shape ({num_prompts},); got {tuple(scene_index.shape)}")
    if (scene_index >= count).any() or (scene_index < -1).any():
        raise ValueError(f"scene_index: wanted values in -1..{count - 1}; got {scene_index.tolist()}")
    return scene_index


def check_placeholders(
    input_ids: torch.Tensor, scene: VidLLMScene, scene_index: torch.Tensor, video_token_id: int
) -> None:
    """Refuse prompts that are about a video but have no place for it.

    Args:
        input_ids (`torch.Tensor` of shape `(Q, L)`, int64): Whole prompts.
        scene (`VidLLMScene`): Encoded videos.
        scene_index (`torch.Tensor` of shape `(Q,)`, int64): From [`resolve_scene_index`].
        video_token_id (`int`): The placeholder.

    Raises:
        ValueError: A prompt with a scene holds no placeholder.

    Source:
        Ours: the question would be answered blind.
    """
    missing = (scene_index >= 0) & ~(input_ids == video_token_id).any(dim=1)
    if missing.any():
        raise ValueError(
            f"input_ids: wanted {scene.mask.shape[1]} video placeholders (token {video_token_id}) in each prompt with "
            f"a scene; got a prompt without ({int(missing.nonzero()[0])})"
        )


def mask_empty_slots(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    scene: VidLLMScene,
    scene_index: torch.Tensor,
    video_token_id: int,
) -> torch.Tensor:
    """Write the slot mask into the 2-D attention mask.

    Args:
        input_ids (`torch.Tensor` of shape `(Q, L)`, int64): Prompts; a row holds N video placeholders or none.
        attention_mask (`torch.Tensor` of shape `(Q, past + L)`, int64): Caller's mask; its last L columns belong to `input_ids`.
        scene (`VidLLMScene`): Encoded videos.
        scene_index (`torch.Tensor` of shape `(Q,)`, int64): From [`resolve_scene_index`].
        video_token_id (`int`): The placeholder.

    Returns:
        `torch.Tensor` of shape `(Q, past + L)`, int64: 0 at padding and at empty slots.

    Raises:
        ValueError: A row holds another number of placeholders than the scene has slots, or the mask is too short.

    Source:
        Ours: empty slots must take no position, also in the decode steps, which see only this mask.
    """
    if attention_mask.shape[0] != input_ids.shape[0] or attention_mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            f"attention_mask: wanted shape {tuple(input_ids.shape)}, longer by what a cache holds; "
            f"got {tuple(attention_mask.shape)}"
        )
    placeholder_mask = input_ids == video_token_id
    counts = placeholder_mask.sum(dim=1)
    slots = scene.mask.shape[1]
    wanted = torch.where(scene_index >= 0, slots, 0)
    wrong = (counts != wanted) & (counts != 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"input_ids: prompt {row}: wanted {int(wanted[row])} video placeholders (token {video_token_id}) "
            f"for its scene; got {int(counts[row])}"
        )
    slot_number = (placeholder_mask.long().cumsum(dim=1) - 1).clamp(0, slots - 1)
    filled = scene.mask.to(input_ids.device)[scene_index.clamp_min(0)].gather(1, slot_number)
    keep = (filled | ~placeholder_mask).long()
    past = attention_mask.shape[1] - input_ids.shape[1]
    attention_mask = attention_mask.long()
    return torch.cat([attention_mask[:, :past], attention_mask[:, past:] * keep], dim=1)


def embed_prompt(
    input_ids: torch.Tensor,
    embed_tokens: Callable,
    embed_points: Callable,
    scene: VidLLMScene | None,
    scene_index: torch.Tensor | None,
    coord_points_world: torch.Tensor | None,
    coord_mask: torch.Tensor | None,
    video_token_id: int,
    coord_token_id: int,
) -> torch.Tensor:
    """Token embeddings with scene tokens and 3D points in their places.

    Args:
        input_ids (`torch.Tensor` of shape `(Q, L)`, int64): Prompts.
        embed_tokens (callable): Ids `(Q, L)` to embeddings `(Q, L, D)`.
        embed_points (callable): Points `(..., 3)` in the room frame, position units, and a dtype, to embeddings `(..., D)`.
        scene (`VidLLMScene`, *optional*): Encoded videos.
        scene_index (`torch.Tensor` of shape `(Q,)`, int64, *optional*): From [`resolve_scene_index`].
        coord_points_world (`torch.Tensor` of shape `(Q, M, 3)`, *optional*): Points in the prompts, world frame, in the reconstruction's unit.
        coord_mask (`torch.Tensor` of shape `(Q, M)`, bool, *optional*): Real points.
        video_token_id (`int`): Placeholder of a scene-token slot.
        coord_token_id (`int`): Placeholder of a point.

    Returns:
        `torch.Tensor` of shape `(Q, L, D)`.

    Raises:
        ValueError: Points without a scene, another number of points than placeholders, or coordinates that are not finite.

    Source:
        Paper: section 3.3. Ours: points are turned by the predicted room rotation.
    """
    embeds = embed_tokens(input_ids)
    if scene is None:
        if coord_points_world is not None:
            raise ValueError("coord_points_world: a point in a prompt needs a scene; wanted one; got none")
        return embeds
    placeholder_mask = input_ids == video_token_id
    rows = scene_index[placeholder_mask.any(dim=1)]
    if rows.numel():
        tokens = scene.tokens.to(embeds.device, embeds.dtype)[rows.to(embeds.device)]  # (prompts with video, N, D)
        embeds = embeds.masked_scatter(placeholder_mask[..., None].expand_as(embeds), tokens)
    where = input_ids == coord_token_id
    if coord_points_world is None:
        if where.any():
            raise ValueError(
                f"coord_points_world: wanted one point per coord token {coord_token_id}; got {int(where.sum())} coord "
                "tokens and no points"
            )
        return embeds

    if coord_points_world.ndim != 3 or coord_points_world.shape[::2] != (input_ids.shape[0], 3):
        raise ValueError(
            f"coord_points_world: wanted shape ({input_ids.shape[0]}, points, 3); got {tuple(coord_points_world.shape)}"
        )
    if coord_mask is None:
        coord_mask = torch.ones(coord_points_world.shape[:2], dtype=torch.bool)
    if coord_mask.shape != coord_points_world.shape[:2]:
        raise ValueError(
            f"coord_mask: wanted shape {tuple(coord_points_world.shape[:2])}; got {tuple(coord_mask.shape)}"
        )
    coord_mask = coord_mask.bool().to(embeds.device)
    wrong = where.sum(1) != coord_mask.sum(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"coord_points_world: prompt {row}: wanted {int(where[row].sum())} points, one per coord token "
            f"{coord_token_id}; got {int(coord_mask[row].sum())}"
        )
    if (coord_mask.any(dim=1) & (scene_index < 0)).any():
        raise ValueError("coord_points_world: a point in a prompt needs a scene; wanted one; got a text-only prompt")
    points_world = coord_points_world.float().to(embeds.device)
    points_world = torch.where(coord_mask[..., None], points_world, torch.zeros_like(points_world))
    if not torch.isfinite(points_world).all():
        raise ValueError("coord_points_world: wanted finite coordinates; got NaN or infinity")
    index = scene_index.clamp_min(0).to(scene.position_scale.device)
    room_from_world = scene.reconstruction.room_from_world[index].to(embeds.device)
    factor = scene.position_scale[index].to(embeds.device)
    points_room = (points_world @ room_from_world.transpose(-1, -2)) * factor[:, None, None]
    embedded = embed_points(points_room, embeds.dtype)[coord_mask]  # (Q, M, D) -> (real points, D)
    return embeds.masked_scatter(where[..., None].expand_as(embeds), embedded.to(embeds.dtype))


def is_token_mask(attention_mask: torch.Tensor | dict | None) -> bool:
    """Whether a mask is the plain `(Q, L)` kind; with a static cache `generate` hands over ready masks per layer kind.

    Args:
        attention_mask (`torch.Tensor` of shape `(Q, L)` or `(Q, 1, L, past + L)`, or `dict`, *optional*): What `forward` was given.

    Returns:
        `bool`.

    Source:
        Upstream: huggingface/transformers `create_masks_for_generate`.
    """
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count only what is attended to.

    Args:
        attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.

    Returns:
        `torch.Tensor` of shape `(Q, L)`, int64: cumulative count minus 1; 0 where masked.

    Source:
        Ours: same numbers as `generate` derives, so that a forward and a decode step agree.
    """
    positions = attention_mask.long().cumsum(dim=-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)
