"""A batch with every kind of video and prompt that the losses must tell apart, and outputs of no network for it."""

import torch

from vidllm.modeling_vidllm.geometry_vidllm import rotation_from_quat_xyzw, to_homogeneous
from vidllm.modeling_vidllm.grounding_vidllm import MASKED_LOGIT, VidLLMGroundingOutput
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMRawReconstruction
from vidllm.modeling_vidllm.scene_vidllm import VidLLMReconstruction, VidLLMScene


# frames, height, width: enough pixels for the quantile; depth without cameras; one frame; too few valid pixels in the first frame
SIZES = [(2, 22, 27), (3, 13, 11), (1, 12, 17), (2, 15, 14)]
NUM_QUERIES, NUM_LAYERS, NUM_ITERATIONS, VOCABULARY = 5, 2, 3, 19
# what hangs on the network
LEAVES = (
    "pose_encodings", "depth_relative", "depth_confidence", "room_from_world", "metric_depth_m", "logits", "boxes_per_layer", "match_logits",
    "no_target_logit",
)  # fmt: skip


def turned(generator, *shape, angle=0.5):
    """Random rotations of moderate angle."""
    quat = torch.cat([angle * torch.randn(*shape, 3, generator=generator), torch.ones(*shape, 1)], dim=-1)
    return rotation_from_quat_xyzw(quat)


def made_targets(sizes, generator):
    """True cameras and depth, metres; all videos have both and an annotation frame."""
    shape = (len(sizes), *map(max, zip(*sizes, strict=True)))
    poses = to_homogeneous(
        turned(generator, *shape[:2], angle=0.2), 0.5 * torch.randn(*shape[:2], 3, generator=generator)
    )
    intrinsics = torch.eye(3).repeat(*shape[:2], 1, 1)
    depth_m = 1 + 2 * torch.rand(shape, generator=generator)
    depth_m[torch.rand(shape, generator=generator) < 0.05] = 0
    for row, (frames, height, width) in enumerate(sizes):
        intrinsics[row, :, 0, 0] = width * (0.8 + 0.4 * torch.rand(shape[1], generator=generator))
        intrinsics[row, :, 1, 1] = height * (0.8 + 0.4 * torch.rand(shape[1], generator=generator))
        # not the middle: the encoding does not represent it, the points do
        intrinsics[row, :, 0, 2], intrinsics[row, :, 1, 2] = width / 2 + 0.5, height / 2 - 0.25
        padded = torch.ones(shape[1:], dtype=torch.bool)
        padded[:frames, :height, :width] = False
        depth_m[row, padded] = 0
        poses[row, frames:], intrinsics[row, frames:] = torch.eye(4), torch.eye(3)
    known = torch.ones(len(sizes), dtype=torch.bool)
    return {
        "cam_from_world": poses,
        "intrinsics_px": intrinsics,
        "camera_mask": known.clone(),
        "depth_m": depth_m,
        "depth_mask": known.clone(),
        "annotation_from_world": to_homogeneous(
            turned(generator, len(sizes), angle=1.0), torch.randn(len(sizes), 3, generator=generator)
        ),
        "annotation_mask": known.clone(),
    }


def made_batch(config, seed=0):
    """Six prompts about four videos, right-padded; one is about none, of one the boxes are not known."""
    generator = torch.Generator().manual_seed(seed)
    targets = made_targets(SIZES, generator)
    targets["camera_mask"][1] = False
    targets["annotation_mask"][1] = False
    targets["depth_m"][3, 0].flatten()[60:] = 0
    loc = config.loc_token_id
    prompts = [[3, loc, 4, loc, 5], [6, 7, loc], [8, loc, 9, 2], [4, 5, 6, 7, 8, 9, 3], [5, loc, 4], [6, loc]]
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for q, prompt in enumerate(prompts):
        ids[q, : len(prompt)] = torch.tensor(prompt)
        start = 1 + q % 2
        labels[q, start : len(prompt)] = torch.tensor([token % VOCABULARY for token in prompt[start:]])
    # boxes of the prompt's first and second <loc>; a known empty list; three boxes of one <loc>
    blocks = [[1, 0, 1], [], [0, 0, 0], [], [], []]
    most = max(map(len, blocks))
    boxes = torch.cat(
        [
            torch.randn(len(prompts), most, 3, generator=generator),
            0.3 + torch.rand(len(prompts), most, 3, generator=generator),
        ],
        dim=-1,
    )
    targets["boxes_annotation"] = boxes
    targets["box_mask"] = torch.tensor([[i < len(row) for i in range(most)] for row in blocks])
    targets["box_block"] = torch.tensor([row + [0] * (most - len(row)) for row in blocks])
    targets["boxes_known"] = torch.tensor([True, True, True, False, True, False])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": labels,
        "scene_index": torch.tensor([0, 0, 2, 3, -1, 3]),
        "video_size_shw": torch.tensor(SIZES),
        "targets": targets,
        "sample_ids": [f"sample {q}" for q in range(len(prompts))],
    }


def made_output(batch, config, seed=1, dtype=torch.float32):
    """Random outputs for a batch whose videos have depth; the tensors named in `LEAVES` want gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes, targets = batch["video_size_shw"], batch["targets"]
    shape = (len(sizes), *sizes.max(0).values.tolist())

    def random(*size):
        return torch.randn(*size, generator=generator)

    leaves = {
        "pose_encodings": random(shape[0], NUM_ITERATIONS, shape[1], 9) * torch.tensor([0.3] * 7 + [0.1] * 2)
        + torch.tensor([0.0] * 6 + [1.0] * 3),
        "depth_relative": 1 + 0.3 * random(*shape),
        "depth_confidence": 1 + random(*shape).exp(),
        "room_from_world": turned(generator, shape[0], angle=1.0),
        "metric_depth_m": 2 * (0.4 * random(*shape)).exp(),
        "logits": random(*batch["input_ids"].shape, VOCABULARY),
    }
    locs = ((batch["input_ids"] == config.loc_token_id) & (batch["scene_index"] >= 0)[:, None]).nonzero()
    where = random(len(locs), NUM_LAYERS, NUM_QUERIES, 6)
    leaves["boxes_per_layer"] = torch.cat([where[..., :3], (0.4 * where[..., 3:]).exp()], dim=-1)
    leaves["match_logits"] = 2 * random(len(locs), NUM_QUERIES)
    leaves["no_target_logit"] = 2 * random(len(locs))
    query_mask = torch.ones(len(locs), NUM_QUERIES, dtype=torch.bool)
    query_mask[:, 1] = False
    # fewer queries than boxes
    query_mask[batch["scene_index"][locs[:, 0]] == 2, 2:4] = False
    # padding holds zeros, as the model writes it
    for row, (frames, height, width) in enumerate(sizes.tolist()):
        real = torch.zeros(shape[1:], dtype=torch.bool)
        real[:frames, :height, :width] = True
        for name in ("depth_relative", "depth_confidence", "metric_depth_m"):
            leaves[name][row, ~real] = 0
        leaves["pose_encodings"][row, :, frames:] = 0
    leaves["match_logits"][~query_mask] = MASKED_LOGIT
    leaves = {name: value.to(dtype).requires_grad_() for name, value in leaves.items()}
    scene = VidLLMScene(
        tokens=torch.zeros(shape[0], 3, 4),
        position_scale=torch.tensor([1.0, 1.0, 0.7, 1.0]) if shape[0] == 4 else torch.ones(shape[0]),
        reconstruction=VidLLMReconstruction(
            cam_from_world=targets["cam_from_world"], room_from_world=turned(generator, shape[0], angle=1.0)
        ),
    )
    output = VidLLMOutput(
        logits=leaves["logits"],
        scene=scene,
        scene_index=batch["scene_index"],
        raw_reconstruction=VidLLMRawReconstruction(
            **{
                name: leaves[name]
                for name in ("pose_encodings", "depth_relative", "depth_confidence", "room_from_world")
            }
        ),
        metric_depth_m=leaves["metric_depth_m"],
        grounding=VidLLMGroundingOutput(
            boxes=leaves["boxes_per_layer"][:, -1],
            boxes_per_layer=leaves["boxes_per_layer"],
            match_logits=leaves["match_logits"],
            no_target_logit=leaves["no_target_logit"],
            query_positions=random(len(locs), NUM_QUERIES, 3),
            query_mask=query_mask,
        ),
        loc_index=locs,
    )
    return output, leaves
