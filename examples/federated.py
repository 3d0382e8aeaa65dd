"""Federated learning with clients of different budgets: each trains the part of one net that it can afford.

pip install -e ".[demo]" && python examples/federated.py

Every round a client cuts the server's net to its own budget, trains that, and gives the whole back. What it
did not train comes back bit for bit as it was sent, so the server averages every weight over the clients
that moved it, and only those would have to travel. Beside it: FedAvg of the small net that every client can
afford. Clients are processes; their data differ (each has mostly a few of the ten digits).
"""

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import controlprune as cp

BUDGETS = (1.0, 0.5, 0.3, 0.15)  # of the FLOPs, one per client
ROUNDS, STEPS = 12, 20

State = dict[str, Tensor]


def net(hidden: tuple[int, int]) -> nn.Module:
    first, second = hidden
    return nn.Sequential(
        nn.Linear(64, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    )


def data() -> tuple[Tensor, Tensor]:
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    return images.float() / 16, labels


def share(client: int) -> tuple[Tensor, Tensor]:
    """A client's own rows of the first 1,300: four of five are of a few digits only."""
    images, labels = (rows[:1300] for rows in data())
    mine = (labels % len(BUDGETS) == client) | (torch.arange(1300) % (5 * len(BUDGETS)) == client)
    return images[mine], labels[mine]


def train(client: int, state: State, hidden: tuple[int, int], budget: float, seed: int) -> State:
    """One round of one client, in its own process: the net as it stands after it, at full size."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = net(hidden)
    model.load_state_dict(state)
    images, labels = share(client)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=budget),
        example_inputs=(images[:8],),
        total_steps=STEPS,
        policy=cp.Magnitude(at=0.0),
    )
    for _ in range(STEPS):
        rows = torch.randint(len(images), (32,))
        loss = cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    controller.detach()  # all units again, those that were away as they came
    return copy.deepcopy(model.state_dict())


def averaged(sent: State, returned: list[State]) -> tuple[State, float]:
    """Every weight over the clients that moved it; and the share of all weights that moved."""
    result, moved = {}, 0
    for name, old in sent.items():
        new = torch.stack([state[name] for state in returned])
        changed = new != old
        moved += int(changed.sum())
        mean = (new * changed).sum(0) / changed.sum(0).clamp(min=1)
        result[name] = torch.where(changed.any(0), mean, old)
    return result, moved / sum(len(returned) * old.numel() for old in sent.values())


def federate(
    hidden: tuple[int, int], budgets: tuple[float, ...], pool: ProcessPoolExecutor
) -> tuple[State, float]:
    torch.manual_seed(0)
    state: State = copy.deepcopy(net(hidden).state_dict())
    moved = 1.0
    for number in range(ROUNDS):
        jobs = [
            pool.submit(train, client, state, hidden, budget, 100 * number + client)
            for client, budget in enumerate(budgets)
        ]
        state, moved = averaged(state, [job.result() for job in jobs])
    return state, moved


def accuracy(state: State, hidden: tuple[int, int], budget: float = 1.0) -> float:
    """On the test rows, of the part that `budget` affords."""
    model = net(hidden)
    model.load_state_dict(state)
    images, labels = (rows[1300:] for rows in data())
    controller = cp.attach(
        model,
        None,
        budget=cp.Budget(flops=budget),
        example_inputs=(images[:8],),
        total_steps=1,
        policy=cp.Magnitude(at=0.0),
    )
    small = controller.finalize()
    return (small(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        whole, small = (304, 104), (78, 32)  # the small one takes 0.15 of the FLOPs of the whole
        ours, moved = federate(whole, BUDGETS, pool)
        plain, _ = federate(small, (1.0,) * len(BUDGETS), pool)
    print(f"one net, clients that afford {', '.join(f'{b:.0%}' for b in BUDGETS)} of it:")
    for budget in sorted(set(BUDGETS)):
        print(f"    at {budget:4.0%} of the FLOPs  {accuracy(ours, whole, budget):.1%}")
    print(f"    weights that travelled back: {moved:.0%} of the whole net's")
    print(f"FedAvg of the small net that all can afford: {accuracy(plain, small):.1%}")


if __name__ == "__main__":
    main()
