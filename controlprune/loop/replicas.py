"""Replicas: the processes that train the same model, and how they stay the same.

Every rank sees other data. What it observes is averaged, in one fused all-reduce per update:

    from rank k:  a_k · (1, d_k, d_k², x_k)          a_k = 1, or 0 for a rank that has run out of data (join)
    to every one: n = Σ a_k,   mean x = Σ a_k x_k / n

x: losses and verdicts of the steps since the last update, examples of the recorded batch. So the decision
is computed from equal numbers, alike on every rank. `d` is a digest of what decides (masks, layout, the
state of the loop), four words of 16 bits: all ranks agree iff n Σ a_k d_k² = (Σ a_k d_k)² for each word
(Cauchy-Schwarz; exact in integers). A rank that does not agree is seen at the next update, and everything is
taken over from rank 0. Gate gradients need no exchange under DDP: they are read once the gradients are
averaged, so B examples on each of n ranks observe what n·B examples in one process would.

A DDP reducer holds buckets of fixed shapes and hooks on the parameters' gradient accumulators; `rebuild`
makes a new one after a shrink (private API of torch, all of it in that function).
"""

from __future__ import annotations

import io
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from ..plant.hooks import Link
from ..state.checksum import checksum

__all__ = ["Replicas", "digest", "rebuild", "several", "unwrapped"]

AVAILABLE = dist.is_available()  # asked at every step
WORDS = 4  # of a digest, 16 bits each: their squares are summed exactly in float64


class Follower(Protocol):
    """What a run does when its replicas call (loop/together.py).

    It meets the wrapper; without data it keeps step with the others, and catches up at the end; where the
    ranks do not agree it is repaired.
    """

    def replicate(self, ddp: nn.Module) -> None: ...

    def step_absent(self) -> None: ...

    def rejoin(self, source: int) -> None: ...

    def repair(self) -> None: ...


def unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The user's own module, and the DDP around it, if that is what was given."""
    return (model.module, model) if isinstance(model, DistributedDataParallel) else (model, None)


def several() -> bool:
    """Do processes train together here?"""
    return AVAILABLE and dist.is_initialized()


class Replicas:
    """The process group that a model is trained in, and one collective per question. Alone: no collective."""

    def __init__(self) -> None:
        self.ddp: DistributedDataParallel | None = None
        self.group: dist.ProcessGroup | None = None
        self.size, self.rank = 1, 0
        self.present = 1  # ranks that had data at the last exchange
        self.agree = True  # did all digests match at the last exchange?
        self.exchanges, self.bytes, self.seconds = 0, 0, 0.0
        self.repairs = 0
        self.behind = 0  # steps of the others since this rank ran out of data
        self._follower: Callable[[], Follower | None] = lambda: None
        self._door: torch.utils.hooks.RemovableHandle | None = None
        self._where: torch.device | None = None

    @property
    def alone(self) -> bool:
        return self.group is None

    # --- meeting the wrapper --------------------------------------------------------------------

    def followed_by(self, follower: Follower) -> None:
        """Call this one. It is not kept."""
        self._follower = weakref.ref(follower)

    def watch_for_ddp(self, model: nn.Module) -> None:
        """`replicate` with the DDP wrapper in whose forward `model` first runs."""
        if self.alone and self._door is None and several():
            self._door = model.register_forward_pre_hook(Link(self, Replicas._look))

    def _look(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        ddp = DistributedDataParallel._active_ddp_module
        follower = self._follower()
        if follower is not None and ddp is not None and ddp is not self.ddp:
            follower.replicate(ddp)

    def meet(self, ddp: DistributedDataParallel) -> None:
        """From here on the ranks of this wrapper decide together."""
        _require_plain(ddp)
        self.close()
        self.ddp = ddp
        assert isinstance(ddp.process_group, dist.ProcessGroup)
        self.join(ddp.process_group, next(ddp.module.parameters()).device)
        shadow(ddp, self._follower)

    def repair(self) -> None:
        """They did not agree."""
        if (follower := self._follower()) is not None:
            follower.repair()

    def join(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """From here on these processes decide together, exchanging tensors on `device`."""
        self.group, self._where = group, device
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.present = self.size

    def close(self) -> None:
        """Forget the wrapper; nothing of ours is left on it."""
        if self._door is not None:
            self._door.remove()
            self._door = None
        if self.ddp is not None:
            vars(self.ddp).pop("join_hook", None)

    # --- collectives ----------------------------------------------------------------------------

    def mean(self, parts: Sequence[Tensor], words: Sequence[int], *, present: bool = True) -> list[Tensor]:
        """The mean of every part over the ranks that have data, as float64 on the CPU; digests compared."""
        if self.alone:
            return list(parts)
        head = torch.tensor([1.0, *words, *(w * w for w in words)], dtype=torch.float64)
        flat = torch.cat([head, *(p.detach().cpu().double().flatten() for p in parts)])
        summed = self.total(flat if present else torch.zeros_like(flat))
        self.present = round(summed[0].item())
        sums, squares = summed[1 : 1 + WORDS].tolist(), summed[1 + WORDS : 1 + 2 * WORDS].tolist()
        self.agree = all(self.present * int(q) == int(s) ** 2 for s, q in zip(sums, squares, strict=True))
        means = (summed[len(head) :] / max(1, self.present)).split([p.numel() for p in parts])
        return [m.reshape(p.shape) for m, p in zip(means, parts, strict=True)]

    def mean_known(self, values: Tensor) -> Tensor:
        """Of each value the mean over the ranks on which it is finite; NaN where it is on none."""
        if self.alone:
            return values
        known = values.isfinite()
        sums, counts = self.total(torch.cat([values.where(known, 0.0), known])).chunk(2)
        return sums / counts

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, identical on each; float64 on the CPU."""
        if self.alone:
            return values
        started = time.perf_counter()
        shared = values.detach().to(self._device, torch.float64, copy=True)
        dist.all_reduce(shared, group=self.group)
        self.exchanges += 1
        self.bytes += shared.numel() * shared.element_size()
        found = shared.cpu()
        self.seconds += time.perf_counter() - started
        return found

    def broadcast(self, value: Any, source: int) -> Any:
        """A nested value of plain data and tensors, as `source` has it (no pickle is loaded)."""
        file = io.BytesIO()
        torch.save(value if self.rank == source else None, file)
        content = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(self._device)
        length = torch.tensor([content.numel()], device=self._device)
        first = source if self.group is None else dist.get_global_rank(self.group, source)
        dist.broadcast(length, first, group=self.group)
        if self.rank != source:
            content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        dist.broadcast(content, first, group=self.group)
        if self.rank == source:
            return value
        return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), weights_only=True, map_location="cpu")

    @property
    def _device(self) -> torch.device:
        """Where the model is: its gradients are reduced there, so the group can."""
        assert self._where is not None
        return self._where

    # --- the backward pass ----------------------------------------------------------------------

    def when_reduced(self, callback: Callable[[], None]) -> None:
        """During a backward pass: call when its gradients are averaged (not at all if they are not).

        DDP averages in a callback that it queues with the engine while the pass runs. One that is queued from
        a callback runs after all that were queued by then.
        """
        engine = Variable._execution_engine

        def finish() -> None:
            if self.ddp is None or self.ddp.require_forward_param_sync:  # else: no_sync, more will come
                callback()

        engine.queue_callback(lambda: engine.queue_callback(finish))

    def describe(self) -> list[str]:
        if self.alone:
            return []
        each = self.bytes / max(1, self.exchanges)
        return [
            f"  {self.size} ranks: {self.exchanges} exchanges of {each:.0f} bytes on average, "
            f"{self.seconds:.2f} s; {self.repairs} repairs"
        ]

    def reshaped(self) -> None:
        """The parameters have other shapes than before."""
        if self.ddp is not None:
            rebuild(self.ddp)


def digest(value: Any) -> list[int]:
    """The first 64 bits of the checksum, as four words of 16."""
    raw = bytes.fromhex(checksum(value))
    return [int.from_bytes(raw[2 * k : 2 * k + 2], "little") for k in range(WORDS)]


# --- private API of torch's DistributedDataParallel ------------------------------------------------


def rebuild(ddp: DistributedDataParallel) -> None:
    """A new reducer for the parameters as they are now, with the settings and hooks of the old one.

    What `DistributedDataParallel.__setstate__` does after unpickling. The old reducer must be gone first: its
    destructor takes its hooks off. All ranks do this between the same two steps; it communicates nothing.
    """
    builtin = _builtin_hook(ddp)
    ddp.reducer = ddp.logger = None  # type: ignore[assignment]
    skipped = {name for name, p in ddp.module.named_parameters() if not p.numel()}  # no gradient comes
    ddp.parameters_to_ignore = skipped.union(getattr(ddp.module, "_ddp_params_and_buffers_to_ignore", ()))
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()  # type: ignore[union-attr]
    for hook, state in ddp._comm_hooks:
        _forget_shapes(state)
        dist._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]
    if builtin is not None and not ddp._comm_hooks:
        ddp._register_builtin_comm_hook(builtin)


def _builtin_hook(ddp: DistributedDataParallel) -> Any:
    """The built-in hook that was registered, known only by its name in the log."""
    name = ddp._get_ddp_logging_data().get("comm_hook", "")
    kinds = dist.BuiltinCommHookType.__members__.values()  # type: ignore[attr-defined]
    return next((kind for kind in kinds if str(kind) == name), None)


def _forget_shapes(state: object) -> None:
    """PowerSGD keeps tensors per bucket: drop them, and let two plain steps pass until buckets are final."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))


def _require_plain(ddp: DistributedDataParallel) -> None:
    if ddp.mixed_precision is not None:
        raise ValueError(
            "model: DDP's own mixed_precision keeps copies of the parameters, which cannot follow a shrink; "
            "use torch.autocast"
        )
    if ddp._join_config.enable:
        raise RuntimeError(
            "join: the controller meets this DistributedDataParallel inside of its join(), too late to "
            "follow ranks that run out of data; attach to the wrapped model, or call "
            "controller.replicate(ddp) before"
        )
    if getattr(ddp, "_delay_all_reduce_params", None):
        raise ValueError("model: DDP with delay_all_reduce_named_params is not supported; leave it out")


def shadow(ddp: DistributedDataParallel, owner: Callable[[], Follower | None]) -> None:
    """Inside `ddp.join()`, a rank without data shadows the controller's exchanges too."""
    make, wrapper = type(ddp).join_hook, weakref.ref(ddp)

    def join_hook(**kwargs: Any) -> Any:
        here, follower = wrapper(), owner()
        assert here is not None
        inner = make(here, **kwargs)
        return inner if follower is None else _Shadow(here, inner, follower)

    vars(ddp)["join_hook"] = join_hook


class _Shadow(JoinHook):
    """DDP's hook, and after each of its turns the controller's."""

    def __init__(self, ddp: DistributedDataParallel, inner: Any, follower: Follower) -> None:
        self.ddp, self.inner, self.follower = ddp, inner, follower

    def main_hook(self) -> None:
        self.inner.main_hook()
        if self.ddp.require_forward_param_sync:  # the others' step is complete, not a part under no_sync
            self.follower.step_absent()

    def post_hook(self, is_last_joiner: bool) -> None:
        self.inner.post_hook(is_last_joiner)
        self.follower.rejoin(int(self.ddp._authoritative_rank))
