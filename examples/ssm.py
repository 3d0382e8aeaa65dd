"""States of a sequence model cut while it trains: two LRU layers that read digits pixel by pixel.

pip install -e ".[demo]" && python examples/ssm.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from torch.utils.data import DataLoader, TensorDataset

from controlprune import ssm
from controlprune.app.hankel_plot import plot_values


class Reader(nn.Module):
    def __init__(self, width: int = 16, states: int = 64) -> None:
        super().__init__()
        self.encode = nn.Linear(1, width)
        self.layers = nn.ModuleList(ssm.LRU(width, states) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encode(x)
        for layer, mix in zip(self.layers, self.mix, strict=True):
            x = x + mix(gelu(layer(x)))
        return self.head(x.mean(1))


torch.manual_seed(0)
images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
pixels = images.float()[..., None] / 8 - 1  # [images, 64 steps, 1]
loader = DataLoader(TensorDataset(pixels[:1300], labels[:1300]), batch_size=50, shuffle=True)
epochs = 10

model = Reader()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
truncation = ssm.Truncation(
    model, optimizer, total_steps=epochs * len(loader), tolerance=0.05, window=0.2, record_every=20
)
for _ in range(epochs):
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        for cut in truncation.step():  # the one new line; what it cut, if it did
            print(f"{cut.layer}: {cut.before} -> {cut.after} states, H∞ error at most {cut.bound:.3g}")
        optimizer.zero_grad()

right = (model(pixels[1300:]).argmax(1) == labels[1300:]).float().mean().item()
print(f"test accuracy {right:.1%} with {truncation.states}")
plot_values(truncation.history, "hankel.png")
