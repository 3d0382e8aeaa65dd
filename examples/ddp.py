"""Many processes, and what happens when one dies: DistributedDataParallel under torchrun, with restarts.

    torchrun --nproc-per-node 2 examples/ddp.py

Run it again after killing it (with any number of processes) and it goes on from its last checkpoint.
Needs scikit-learn: pip install -e ".[demo]"
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import controlprune as cp

parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=Path, default=Path("runs/ddp"))
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()
BATCH = 64  # over all ranks

torch.set_num_threads(1)
cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

images, labels = (torch.tensor(a, device=device) for a in load_digits(return_X_y=True))
images = images.float() / 16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10))
model.to(device)
optimizer = torch.optim.Adam(model.parameters())
ddp = DistributedDataParallel(model)
controller = cp.attach(
    ddp, optimizer, budget=cp.Budget(flops=0.4), example_inputs=(images[:8],), total_steps=args.steps
)

args.folder.mkdir(parents=True, exist_ok=True)
checkpoint = args.folder / "checkpoint.pt"
if checkpoint.exists():  # every rank reads the same file, whatever their number was when it was written
    states = torch.load(checkpoint, map_location="cpu")
    for part, state in zip((controller, model, optimizer), states, strict=True):
        part.load_state_dict(state)

for step in range(controller.steps, args.steps):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))
    mine = order[:BATCH].tensor_split(world)[rank].to(device)
    loss = cross_entropy(ddp(images[mine]), labels[mine])
    loss.backward()
    optimizer.step()
    controller.step(loss)
    optimizer.zero_grad()
    if (step + 1) % args.save_every == 0:
        controller.sync()  # on every rank: then what rank 0 saves is everyone's
        if rank == 0:
            part = checkpoint.with_suffix(".part")  # a process killed in between leaves the old file whole
            torch.save([x.state_dict() for x in (controller, model, optimizer)], part)
            os.replace(part, checkpoint)

small = controller.finalize()
if rank == 0:
    right = (small(images).argmax(1) == labels).float().mean().item()
    cp.save(controller, args.folder / "small.safetensors")
    print(f"{world} ranks: {right:.1%} right at {controller.cost()['flops'].fraction:.1%} of the dense FLOPs")
dist.destroy_process_group()
