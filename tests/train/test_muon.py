"""Muon for linear layers with AdamW for the rest: each parameter is stepped as by its own optimizer, through checkpoints and schedules."""

import copy

import pytest
import torch
from torch import nn

from vidllm.train.muon import MuonWithAdamW, linear_weights


class Small(nn.Module):
    """Embedding tied to the head, a table of tokens, two linear layers, a norm, a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(7, 6)
        self.tokens = nn.Parameter(torch.randn(5, 6))
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.norm, self.conv = nn.LayerNorm(6), nn.Conv2d(2, 3, 2)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def loss(self, ids):
        hidden = self.embed(ids) + self.tokens[ids % 5]
        hidden = self.norm(hidden + self.down(self.up(hidden).relu()))
        return self.head(hidden).square().mean() + self.conv(hidden.view(1, 2, 3, -1)).square().mean()


SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def optimizer_of(model, factor=1.0):
    chosen = linear_weights(model)
    split = {which: [p for p in model.parameters() if (id(p) in chosen) is which] for which in (True, False)}
    groups = [
        {"params": split[False], "lr": 3e-3, "weight_decay": 0.0},
        {"params": split[True], "lr": 3e-3 * factor, "weight_decay": 0.05, "muon": True},
    ]
    return MuonWithAdamW(groups, **SETTINGS)


def train(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        model.loss(torch.arange(6) + step % 2).backward()
        optimizer.step()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_linear_weights_are_neither_tables_nor_word_embeddings():
    model = Small()
    names = {name for name, p in model.named_parameters() if id(p) in linear_weights(model)}
    assert names == {"up.weight", "down.weight"}


def test_every_parameter_is_stepped_as_by_its_own_optimizer():
    mine, other = Small(), Small()
    optimizer = optimizer_of(mine)
    chosen = linear_weights(other)
    muon = torch.optim.Muon(
        [p for p in other.parameters() if id(p) in chosen], lr=3e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([p for p in other.parameters() if id(p) not in chosen], weight_decay=0.0, **SETTINGS)
    train(mine, optimizer, 0, 4)
    for step in range(4):
        muon.zero_grad(), adamw.zero_grad()
        other.loss(torch.arange(6) + step % 2).backward()
        muon.step(), adamw.step()
    assert equal(mine, other)
    assert not equal(mine, Small())


def test_a_state_goes_on_bit_for_bit():
    whole, parts = Small(), Small()
    train(whole, optimizer_of(whole), 0, 6)
    first = optimizer_of(parts)
    train(parts, first, 0, 3)
    state = copy.deepcopy(first.state_dict())
    # torch.save and a later process, in short
    second = optimizer_of(parts)
    second.load_state_dict(state)
    train(parts, second, 3, 6)
    assert equal(whole, parts)


def test_a_schedule_reaches_both_and_keeps_factors():
    model = Small()
    optimizer = optimizer_of(model, factor=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, 0, 1)
    schedule.step()
    assert [group["lr"] for _, part in optimizer._parts for group in part.param_groups] == [0.0, 0.0]
    before = copy.deepcopy(model)
    train(model, optimizer, 1, 3)
    assert equal(model, before)


def test_one_kind_alone_works():
    layer = nn.Linear(3, 4, bias=False)
    for muon in (True, False):
        optimizer = MuonWithAdamW([{"params": [layer.weight], "muon": muon}], **SETTINGS)
        before = layer.weight.detach().clone()
        layer(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, layer.weight)


def test_what_is_no_matrix_and_the_state_of_another_optimizer_are_refused():
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="2D"):
        MuonWithAdamW([{"params": [layer.bias], "muon": True}], **SETTINGS)
    optimizer = MuonWithAdamW([{"params": list(layer.parameters())}], **SETTINGS)
    other = torch.optim.AdamW(layer.parameters(), **SETTINGS).state_dict()
    with pytest.raises(ValueError, match="wanted the state of Muon with AdamW"):
        optimizer.load_state_dict(other)
