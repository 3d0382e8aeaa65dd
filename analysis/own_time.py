"""The controller's own time over a whole run: a GPT of 12 layers so small that kernels cost next to nothing.

    python -m analysis.own_time                    5,000 steps, budget half of the FLOPs, about 2 minutes
    python -m analysis.own_time --profile          and where it goes, by cProfile (which slows all of it)

Process CPU seconds on one thread inside what is ours in a step: `controller.step` and the hook of the
optimizer's step, clocked from outside, less what clocking nothing takes in the same places. A net that is
shrunk has no other hook (steps that ended masked are counted). Steps are of four kinds: an update that gives
other masks or another layout, any other update, an observation, the rest. `alike`: a digest of losses and
masks, to tell whether two commits ran alike.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import controlprune as cp

from .nets import tiny_gpt

__all__ = ["Found", "main", "run"]

KINDS = ("change", "update", "observation", "plain")


@dataclass
class Found:
    """Own seconds of every step by its kind, of all the rest of a step, of attach; what the run was."""

    own: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    rest: list[float] = field(default_factory=list)
    nothing: list[float] = field(default_factory=list)
    attach: float = 0.0
    masked: int = 0
    alike: str = ""

    def table(self) -> str:
        clock = np.median(self.nothing)
        every = np.concatenate([self.own[kind] for kind in KINDS]) - clock
        lines = ["| steps | | median ms | mean ms | ms a step of all |", "|---" * 5 + "|"]
        for kind in KINDS:
            ms = 1e3 * (np.array(self.own[kind] or [clock]) - clock)
            share = ms.sum() / len(every)
            count = len(self.own[kind])
            lines.append(f"| {kind} | {count:,} | {np.median(ms):.4f} | {ms.mean():.4f} | {share:.4f} |")
        ms = 1e3 * every
        lines.append(f"| all | {len(every):,} | {np.median(ms):.4f} | {ms.mean():.4f} | {ms.mean():.4f} |")
        return "\n".join(lines)


def run(steps: int, profile: cProfile.Profile | None = None) -> Found:
    torch.manual_seed(0)
    found, digest, clock = Found(), hashlib.sha256(), Clock(profile)
    model = tiny_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = torch.randint(65, (64, 8, 17))
    handle = register_optimizer_step_pre_hook(lambda *_: clock.start())
    began = time.process_time()
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(batches[0, :, :-1],), total_steps=steps
    )
    found.attach = time.process_time() - began
    optimizer.register_step_pre_hook(lambda *_: clock.stop())
    for step in range(steps):
        x, y = batches[step % 64, :, :-1], batches[step % 64, :, 1:]
        began, clock.spent = time.process_time(), 0.0
        before, was = len(controller.history), (controller.plant.masks, controller.plant.compact)
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        for _ in range(2):
            clock.timed(lambda: None)
        found.nothing.append(clock.spent)
        clock.spent = 0.0
        optimizer.step()
        observed = clock.spent > 0 and controller.overhead_seconds > clock.counted
        clock.timed(lambda loss=loss: controller.step(loss))
        spent, clock.spent = clock.spent, 0.0
        clock.counted = controller.overhead_seconds
        optimizer.zero_grad()
        masks, compact = controller.plant.masks, controller.plant.compact
        changed = was[0] is not masks or was[1] != compact
        kind = "change" if changed else "update" if len(controller.history) > before else ""
        found.own[kind or ("observation" if observed else "plain")].append(spent)
        found.rest.append(time.process_time() - began - spent)
        found.masked += not compact and not all(bool(m.all()) for m in masks)
        digest.update(repr(loss.item()).encode())
        if changed:
            digest.update(torch.cat(masks).numpy().tobytes())
    handle.remove()
    controller.detach()
    found.alike = digest.hexdigest()[:12]
    return found


class Clock:
    """Of process CPU time between start and stop; with a profiler, which runs meanwhile."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.profile, self.spent, self.counted, self._began = profile, 0.0, 0.0, 0.0

    def start(self) -> None:
        if self.profile is not None:
            self.profile.enable()
        self._began = time.process_time()

    def stop(self) -> None:
        self.spent += time.process_time() - self._began
        if self.profile is not None:
            self.profile.disable()

    def timed(self, call: Callable[[], object]) -> None:
        self.start()
        call()
        self.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    profile = cProfile.Profile(time.process_time) if options.profile else None
    found = run(options.steps, profile)
    print(found.table())
    rest = 1e3 * float(np.median(found.rest))
    print(
        f"attach {found.attach:.2f} s, a step beside it {rest:.1f} ms, "
        f"{found.masked} steps masked, alike {found.alike}"
    )
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        pstats.Stats(profile).sort_stats("cumtime").print_stats(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
