"""Stop a run in the middle and go on as if nothing had happened: model, optimizer and controller travel.

python examples/resume.py
"""

import torch
from torch import nn

import controlprune as cp

torch.manual_seed(0)
x, y = torch.randn(512, 20), torch.randn(512, 3)
STEPS = 120


def start() -> tuple[nn.Sequential, torch.optim.Optimizer, cp.Controller]:
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(x[:8],), total_steps=STEPS
    )
    return model, optimizer, controller


def train(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, controller: cp.Controller, steps: range
) -> None:
    for step in steps:
        rows = torch.arange(32) + 32 * (step % 16)
        loss = nn.functional.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()


model, optimizer, controller = start()
train(model, optimizer, controller, range(80))
torch.save([part.state_dict() for part in (model, optimizer, controller)], "checkpoint.pt")

model, optimizer, controller = start()  # a new process would do just this
states = torch.load("checkpoint.pt", weights_only=True)  # no pickle is needed
for part, state in zip((model, optimizer, controller), states, strict=True):
    part.load_state_dict(state)
train(model, optimizer, controller, range(80, STEPS))
print(controller.finalize())
print(f"{controller.cost()['flops'].fraction:.1%} of the dense FLOPs")
