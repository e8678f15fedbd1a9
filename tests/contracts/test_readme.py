"""Numbers in the README are counted, not remembered."""

import re

import pytest
import torch

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.initialise import count_parameters
from vidllm.train.presets import PRESETS, preset


@pytest.fixture(scope="module")
def table(repository):
    """`{part: {preset: count}}` of the README's table."""
    lines = (repository / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| part |"))
    names = [cell.strip(" `") for cell in lines[start].strip("|").split("|")][1:]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        rows[cells[0]] = {name: int(re.sub(r"\D", "", cell)) for name, cell in zip(names, cells[1:], strict=True)}
    return rows


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameters_per_part_are_as_counted(table, name):
    with torch.device("meta"):
        model = VidLLMForConditionalGeneration(preset(name).config())
    counted = count_parameters(model)
    assert {part: row[name] for part, row in table.items() if part != "total"} == counted
    assert table["total"][name] == sum(counted.values()) == sum(p.numel() for p in model.parameters())
