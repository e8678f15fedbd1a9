"""One of two processes that shard a tiny model over both and take a step: `python -m torch.distributed.run ... sharded_process.py`.

Every block that transformers may not split is sharded, then the rest. The first process prints the losses before and after a step, and those of the same
model unsharded, as one JSON line.
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from tiny import RAGGED_SIZES, tiny_model, tiny_prompts, tiny_videos
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Something that every trained part has a share in."""
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    config = copy.deepcopy(CONFIG)
    tails = [
        [7, config.coord_token_id, 8, config.loc_token_id],
        [9, config.coord_token_id, config.loc_token_id],
        [5, config.coord_token_id, 4, config.loc_token_id],
    ]
    ids, mask = tiny_prompts(config, tails)
    output = model(
        input_ids=ids, attention_mask=mask, pixel_values_videos=pixels, video_size_shw=sizes,
        coord_points_world=torch.linspace(-1, 1, 9).view(3, 1, 3), use_cache=False,
    )  # fmt: skip
    raw, found = output.raw_reconstruction, output.grounding
    parts = (output.logits, raw.pose_encodings, raw.depth_relative, output.metric_depth_m, found.boxes_per_layer)
    return sum(part.float().square().mean() for part in parts)


def step(model: torch.nn.Module) -> list[float]:
    """Losses before and after one step of plain gradient descent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = loss_of(model)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return [before.item(), loss_of(model).item()]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    plain, sharded = tiny_model(), tiny_model()
    whole = step(plain.train())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kinds = set(sharded._no_split_modules)
    blocks = [module for module in sharded.modules() if type(module).__name__ in kinds]
    # from the inside out, as accelerate does it
    for module in reversed(blocks):
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    placed = {type(p).__name__ for p in sharded.parameters()}
    losses = step(sharded.train())
    if dist.get_rank() == 0:
        json.dump(
            {
                "plain": whole,
                "sharded": losses,
                "blocks": len(blocks),
                "kinds": sorted(placed),
                "world": dist.get_world_size(),
            },
            sys.stdout,
        )
        sys.stdout.write("\n")
    dist.destroy_process_group()


CONFIG = tiny_model().config

if __name__ == "__main__":
    main()
