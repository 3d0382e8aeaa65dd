"""The table of rules: how an index space travels through each operator.

A rule gets the tape and one call, adds what the operator says about its axes, and returns one list of
`Dim` per output tensor (fewer: the rest is not followed further). In-place forms use the rule of their
functional form. Operators tagged `pointwise` by torch share one rule; an operator without any is
decomposed by torch where it can be, and otherwise *taints*: every axis it touches is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..tape.axes import Axis
from ..tape.tape import Call, Dim, Dims, Rule, Tape

__all__ = ["RULES", "fresh", "lookup", "operator_rule", "rule", "taint"]

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Enter the decorated function in the table for these ATen operators."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            assert operator not in RULES, f"two rules for {operator}"
            RULES[operator] = function
        return function

    return enter


def operator_rule(*operators: str) -> Callable[[Rule], Rule]:
    """For operators of the user's own (`torch.library`), by their full names such as "mylib::soft_clip".

    The function gets the tape and the call, and returns one list of `Dim` per output tensor (rules of the
    same shape are in this folder; `elementwise` is the rule of any pointwise operator).
    """
    for operator in operators:
        if "::" not in operator or operator.startswith(("aten::", "prims::")):
            raise ValueError(f"operators: {operator!r}: give the full name of your own, as in 'mylib::name'")
        if operator in RULES:
            raise ValueError(f"operators: {operator!r} has a rule already")
    return rule(*operators)


def lookup(operator: str) -> Rule | None:
    """The rule of an operator, given its name in the schema ("aten::add_" -> that of add)."""
    namespace, _, name = operator.partition("::")
    if namespace not in ("aten", "prims"):
        name = operator
    return RULES.get(name) or RULES.get(name.removesuffix("_"))


def fresh(sizes: Iterable[int], reason: str | None = "") -> Dims:
    """New dimensions, pinned for `reason` ("" = internally; None = free)."""
    return [Dim(Axis(size, reason)) for size in sizes]


def taint(tape: Tape, call: Call) -> list[Dims]:
    """The operator is unknown: nothing it touches may be pruned."""
    reason = f"operator {call.name} has no rule"
    for entry in call.entries.values():
        tape.pin_dims(entry.dims, reason)
    return [fresh(output.shape, reason) for output in call.outputs]
