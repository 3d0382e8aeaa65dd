"""From a model to coupled groups: trace, rules, groups."""

from .analyse import analyse, find_groups, require_groups
from .groups import Group, Refusal, SizeAttribute, Slice, Structure, Work
from .sizes import set_sizes
from .verify import verify, without

__all__ = [
    "Group",
    "Refusal",
    "SizeAttribute",
    "Slice",
    "Structure",
    "Work",
    "analyse",
    "find_groups",
    "require_groups",
    "set_sizes",
    "verify",
    "without",
]
