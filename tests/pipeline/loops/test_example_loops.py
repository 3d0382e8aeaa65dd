"""The loops of PyTorch's own examples, in our words and small: mnist, word_language_model, dcgan.

Their structure is what is tested: a scheduler and evaluation in between (mnist), a loop that changes the
weights by itself and has no optimizer, on batches of changing length (word_language_model's transformer), and
two nets that train against each other, each with an optimizer of its own, one in the other's graph (dcgan).
"""

from __future__ import annotations

import math

import pytest
import rig
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import controlprune as cp

BUDGET = 0.5
POLICY = cp.Control(observe_every=1, update_every=3)


def assert_small(model: nn.Module, controller: cp.Controller, dense: nn.Module, x: Tensor) -> None:
    assert controller.skipped == 0
    assert controller.history[-1].realised["flops"] <= BUDGET
    controller.finalize()
    assert controller.cost()["flops"].fraction <= BUDGET
    assert rig.flops(model, x) <= 1.05 * BUDGET * rig.flops(dense, x)


# --- mnist ----------------------------------------------------------------------------------------


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, 1), nn.Conv2d(8, 16, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(16 * 16, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        return F.log_softmax(self.fc2(x), dim=1)


def digits(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    target = torch.randint(10, (16,), generator=random)
    image = torch.randn(16, 1, 12, 12, generator=random)
    image[torch.arange(16), 0, target] += 3.0
    return image, target


def test_mnist() -> None:
    epochs, length = 3, 16
    model = Digits()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=BUDGET),
        example_inputs=(digits(0)[0],),
        total_steps=epochs * length,
        policy=POLICY,
    )
    accuracies = []
    for epoch in range(epochs):
        model.train()
        for step in range(length):
            data, target = digits(epoch * length + step)
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
            controller.step(loss)
        model.eval()
        with torch.no_grad():
            data, target = digits(10_000)
            accuracies.append((model(data).argmax(1) == target).float().mean().item())
        scheduler.step()
    assert accuracies[-1] > 0.5
    assert_small(model, controller, Digits(), digits(0)[0])


# --- word_language_model --------------------------------------------------------------------------

WORDS = 50
WIDE = 0.7  # the heads of nn.MultiheadAttention stay, its code fixes their number


class Positions(nn.Module):
    def __init__(self, width: int, dropout: float = 0.1, longest: int = 64) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        place = torch.arange(longest).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(longest, 1, width)
        table[:, 0, 0::2], table[:, 0, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        self.register_buffer("pe", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[: x.size(0)])


class Language(nn.Transformer):
    """Only the encoder is used; the mask is kept until the length changes."""

    def __init__(self, width: int = 32, heads: int = 4, hidden: int = 64, layers: int = 2) -> None:
        super().__init__(
            d_model=width, nhead=heads, dim_feedforward=hidden, num_encoder_layers=layers,
            num_decoder_layers=0,
        )  # fmt: skip
        self.src_mask: Tensor | None = None
        self.pos_encoder = Positions(width)
        self.input_emb = nn.Embedding(WORDS, width)
        self.width = width
        self.decoder = nn.Linear(width, WORDS)  # type: ignore[assignment]

    def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]
        if self.src_mask is None or self.src_mask.size(0) != len(src):
            self.src_mask = torch.log(torch.tril(torch.ones(len(src), len(src))))
        src = self.pos_encoder(self.input_emb(src) * math.sqrt(self.width))
        return F.log_softmax(self.decoder(self.encoder(src, mask=self.src_mask)), dim=-1)


def corpus() -> Tensor:
    """Length × batch: words that count upwards."""
    return (torch.arange(246)[:, None] + torch.arange(8) * 7) % WORDS


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("by_hand", [True, False])
def test_word_language_model(by_hand: bool) -> None:
    """The example changes its weights by itself, without an optimizer; and with one."""
    epochs, length, rate = 6, 24, 1.0
    model = Language()
    data = corpus()
    starts = range(0, len(data) - 1, length)  # the last batch is shorter
    optimizer = None if by_hand else torch.optim.SGD(model.parameters(), lr=rate)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=WIDE),
        example_inputs=(data[:length],),
        total_steps=epochs * len(starts),
        policy=POLICY,
    )
    means = []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for start in starts:
            stop = min(start + length, len(data) - 1)
            source, target = data[start:stop], data[start + 1 : stop + 1].reshape(-1)
            model.zero_grad()
            loss = F.nll_loss(model(source).view(-1, WORDS), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            if optimizer is None:
                for p in model.parameters():
                    if p.grad is not None:
                        p.data.add_(p.grad, alpha=-rate)
            else:
                optimizer.step()
            controller.step(loss)
            total += loss.item()
        means.append(total / len(starts))
    assert means[-1] < means[0] - 0.3
    assert len(controller.history) >= epochs * len(starts) // 3 - 1
    controller.finalize()
    assert controller.cost()["flops"].fraction <= WIDE
    assert model(data[:length]).shape == (length, 8, WORDS)


# --- dcgan ----------------------------------------------------------------------------------------

NOISE, MAPS = 8, 8


def started(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def generator() -> nn.Module:
    net = nn.Sequential(
        nn.ConvTranspose2d(NOISE, MAPS * 4, 4, 1, 0, bias=False),
        nn.BatchNorm2d(MAPS * 4),
        nn.ReLU(True),
        nn.ConvTranspose2d(MAPS * 4, MAPS * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(MAPS * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(MAPS * 2, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    return net.apply(started)


def discriminator() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, MAPS * 2, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(MAPS * 2, MAPS * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(MAPS * 4),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(MAPS * 4, 1, 4, 1, 0, bias=False),
        nn.Sigmoid(),
        nn.Flatten(0),
    )
    return net.apply(started)


def test_dcgan() -> None:
    """Both are pruned: what trains the one runs through the other, and leaves gradients in it."""
    steps, size = 48, 8
    makes, judges = generator(), discriminator()
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (makes, judges)]
    examples = torch.randn(size, NOISE, 1, 1), torch.randn(size, 1, 16, 16)
    making, judging = (
        cp.attach(
            net,
            optimizer,
            budget=cp.Budget(flops=BUDGET),
            example_inputs=(x,),
            total_steps=steps,
            policy=POLICY,
        )
        for net, optimizer, x in zip((makes, judges), optimizers, examples, strict=True)
    )
    for step in range(steps):
        real = torch.randn(size, 1, 16, 16, generator=torch.Generator().manual_seed(step)).tanh()
        judges.zero_grad()
        true, false = torch.ones(size), torch.zeros(size)
        on_real = F.binary_cross_entropy(judges(real), true)
        on_real.backward()
        fake = makes(torch.randn(size, NOISE, 1, 1))
        on_fake = F.binary_cross_entropy(judges(fake.detach()), false)
        on_fake.backward()
        optimizers[1].step()
        judging.step(on_real + on_fake)
        makes.zero_grad()
        loss = F.binary_cross_entropy(judges(fake), true)
        loss.backward()
        optimizers[0].step()
        making.step(loss)
    assert_small(makes, making, generator(), examples[0])
    assert_small(judges, judging, discriminator(), examples[1])
    loss = F.binary_cross_entropy(judges(makes(examples[0])), torch.ones(size))
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
