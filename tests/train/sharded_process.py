"""One of two processes that shard a tiny model over both and take a step: `python -m torch.distributed.run ... sharded_process.py FOLDER`.

Every block that transformers may not split is sharded, then the rest. The first process prints the losses before and after a step, and those of the same
model unsharded, as one JSON line. Then both models are published, as the ends of the two stages do it, and a LoRA model with its adapter.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import RAGGED_SIZES, tiny_model, tiny_prompts, tiny_videos
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.distillation import DistillationStudent, _of_student
from vidllm.train.initialise import build_untrained
from vidllm.train.lora import add_lora, save_and_merge
from vidllm.train.recipes import LoraSettings
from vidllm.train.run_folder import publish
from vidllm.train.whole_weights import whole_model, whole_state


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


def spread(model: torch.nn.Module, core: torch.nn.Module) -> int:
    """Shard a model in place, from the inside out, as accelerate does it; the number of its blocks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kinds = set(core._no_split_modules)
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for module in reversed(blocks):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return len(blocks)


def never() -> dict:
    """What only DeepSpeed is asked for."""
    raise AssertionError("asked for weights of DeepSpeed")


def published(folder: Path) -> dict[str, bool]:
    """Which folders that both processes publish hold the weights of the model as it is on one."""
    found = {}
    plain, processor = build_untrained("vidllm-tiny", seed=3)
    assert whole_state(plain, never) is None
    for name in ("joint", "distillation", "lora"):
        spread_out, core = build_untrained("vidllm-tiny", seed=3)[0], None
        wanted, trained = plain.state_dict(), spread_out
        if name == "distillation":
            trained = DistillationStudent(spread_out, 8, 8)
        if name == "lora":
            trained, alone = (add_lora(build_untrained("vidllm-tiny", seed=3)[0], LoraSettings(rank=2)) for _ in "ab")
            for model in (trained, alone):
                generator = torch.Generator().manual_seed(5)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        spread(trained, spread_out)
        state = whole_state(trained, never)
        if dist.get_rank() == 0:
            if name == "lora":
                base = build_untrained("vidllm-tiny", seed=3)[0]
                core = save_and_merge(trained, folder / "adapter", base, state)
                wanted = save_and_merge(alone, folder / "adapter_alone").state_dict()
                kept, alone_kept = (
                    load_file(folder / place / "adapter_model.safetensors") for place in ("adapter", "adapter_alone")
                )
                found["adapter"] = equal(kept, alone_kept)
            else:
                core = whole_model(spread_out, _of_student(state) if name == "distillation" else state)
            publish(core.eval(), processor, folder / name)
            written = VidLLMForConditionalGeneration.from_pretrained(folder / name).state_dict()
            found[name] = equal(written, wanted)
        dist.barrier()
    return found


def equal(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, under the same names."""
    return set(mine) == set(wanted) and all(torch.equal(value, wanted[name]) for name, value in mine.items())


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    plain, sharded = tiny_model(), tiny_model()
    whole = step(plain.train())
    blocks = spread(sharded, sharded)
    placed = {type(p).__name__ for p in sharded.parameters()}
    losses = step(sharded.train())
    folders = published(Path(sys.argv[1]))
    if dist.get_rank() == 0:
        json.dump(
            {
                "plain": whole,
                "sharded": losses,
                "blocks": blocks,
                "published": folders,
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
