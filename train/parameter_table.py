"""What a run trains, part by part, in a few lines of text.

Shapes: none; numbers of parameters.
"""

from collections.abc import Sequence

from torch import nn

from vidllm.train.joint_trainer import base_model


def parameter_table(model: nn.Module, unreachable: Sequence[str] = ()) -> str:
    """Numbers of trained and frozen parameters by part of the model.

    Args:
        model (`nn.Module`): A `VidLLMForConditionalGeneration`, or a `PeftModel` around it.
        unreachable (`Sequence[str]`): Names of the parameters that no output depends on.

    Returns:
        `str`: a line per part, the sum, and the names; weights in 4 bits count as what they stand for.

    Source:
        Ours: what is not learned although somebody meant it to be is seen before the run, not after it.
    """
    whole = base_model(model)
    parts = {**dict(whole.model.named_children()), "lm_head": whole.lm_head}
    lines, seen, sums = [f"{'part':18} {'trained':>15} {'frozen':>15}"], set(), [0, 0]
    for name, part in parts.items():
        counts = [0, 0]
        for parameter in part.parameters():
            # a head that is tied to the embedding is counted there
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[0 if parameter.requires_grad else 1] += _count(parameter)
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        lines.append(f"{name:18} {counts[0]:>15,} {counts[1]:>15,}")
    lines.append(f"{'together':18} {sums[0]:>15,} {sums[1]:>15,}")
    if unreachable:
        lines.append(f"frozen because no output depends on them: {', '.join(unreachable)}")
    return "\n".join(lines)


def _count(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


__all__ = ["parameter_table"]
