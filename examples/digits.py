"""The README's loop on scikit-learn's digits, with a test set: accuracy and FLOPs before and after.

pip install -e ".[demo]" && python examples/digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import controlprune as cp

torch.manual_seed(0)
images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = images.float() / 16
train, test = TensorDataset(images[:1300], labels[:1300]), (images[1300:], labels[1300:])
loader = DataLoader(train, batch_size=64, shuffle=True)
epochs = 15

model = nn.Sequential(nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10))
optimizer = torch.optim.Adam(model.parameters())
controller = cp.attach(
    model,
    optimizer,
    budget=cp.Budget(flops=0.3),
    example_inputs=(images[:8],),
    total_steps=epochs * len(loader),
)
for _ in range(epochs):
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
small = controller.finalize()

right = (small(test[0]).argmax(1) == test[1]).float().mean().item()
print(f"test accuracy {right:.1%} at {controller.cost()['flops'].fraction:.1%} of the dense FLOPs")
print(small)
