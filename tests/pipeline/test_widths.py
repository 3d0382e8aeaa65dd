"""The width of the residual stream and heads leave while training, and the run resumes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from rig import QUICK, assert_same_bits, bits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import controlprune as cp
from controlprune.structure.record import reference_kernels
from controlprune.structure.standins import StandIn

STEPS, WIDTH = 60, 32
PLAN = cp.Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)  # in which the width is cut too


class Block(nn.Module):
    """As GPT-2 has it, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, t, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(y.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(19, WIDTH), nn.Embedding(12, WIDTH)
        self.blocks, self.last = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 19, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.head(self.last(self.blocks(x)))


class Vit(nn.Module):
    """As torchvision has it: patches, a class token, torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 4, 4)
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.Parameter(torch.randn(1, 5, WIDTH)),
        )
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.encoder(x)[:, 0])


def tokens(step: int) -> tuple[Tensor, Tensor]:
    """Counting on, by one or by two."""
    random = torch.Generator().manual_seed(step)
    start, by = (torch.randint(1, n + 1, (16, 1), generator=random) for n in (19, 2))
    x = (start + by * torch.arange(13)) % 19
    return x[:, :-1], x[:, 1:]


def images(step: int) -> tuple[Tensor, Tensor]:
    """Which quarter is bright."""
    random = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 1, 8, 8, generator=random) / 2, torch.randint(4, (16,), generator=random)
    for image, quarter in zip(x, y.tolist(), strict=True):
        image[0, 4 * (quarter // 2) :][:4, 4 * (quarter % 2) :][:, :4] += 1.0
    return x, y


CASES: dict[str, tuple[type[nn.Module], Callable[[int], tuple[Tensor, Tensor]], str, float]] = {
    "gpt": (Gpt, tokens, "places", 0.25),
    "vit": (Vit, images, "patches", 0.2),  # at 0.25 what is inside its layers is enough
}


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    controller: cp.Controller
    batch: Callable[[int], tuple[Tensor, Tensor]]

    def train(self, start: int, end: int) -> float:
        loss = torch.zeros(())
        for step in range(start, end):
            x, y = self.batch(step)
            loss = F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
        return loss.item()


def start(case: str) -> Run:
    make, batch, _, budget = CASES[case]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=budget),
        example_inputs=(batch(0)[0],),
        total_steps=STEPS,
        policy=replace(QUICK, plan=PLAN, stages=6),
    )
    return Run(model, optimizer, controller, batch)


def flops(model: nn.Module, x: Tensor) -> int:
    with reference_kernels(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_the_width_leaves_in_training_and_the_run_resumes(case: str) -> None:
    straight, (_, _, width, budget) = start(case), CASES[case]
    x = straight.batch(1000)[0]
    dense, first = flops(straight.model, x), straight.train(0, 1)
    straight.train(1, 30)
    file = io.BytesIO()
    parts = ("model", "optimizer", "controller")
    torch.save({name: getattr(straight, name).state_dict() for name in parts}, file)
    assert not straight.controller.masks[width].all()
    straight.train(30, STEPS)

    resumed = start(case)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for name in parts:
        getattr(resumed, name).load_state_dict(saved[name])
    last = resumed.train(30, STEPS)
    assert_same_bits(bits(straight.model, straight.optimizer), bits(resumed.model, resumed.optimizer))
    assert last < 0.8 * first

    small = resumed.controller.finalize().eval()
    live = int(resumed.controller.masks[width].sum())
    assert live < WIDTH
    assert small.get_submodule(width).weight.shape[-1 if case == "gpt" else 0] == live
    assert flops(small, x) <= budget * dense
    counting = [m for m in small.modules() if isinstance(m, StandIn) and hasattr(m, "normalized_shape")]
    assert not counting
