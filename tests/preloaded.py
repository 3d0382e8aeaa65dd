"""What the workers of a test share: imported once, in the process that they are forked from (workers.py)."""

from importlib import import_module

from rig import rig

for name in ("pytest", "torch.distributed.checkpoint", "torch.distributed.fsdp"):
    import_module(name)
rig().controller.detach()  # torch imports a good deal only when it is first used
