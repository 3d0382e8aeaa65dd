"""What a run is to keep to, and what is known of its model: from both, the problem that its policy solves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..budget import Budget, Price
from ..cost.problem import Problem, pose
from ..cost.survey import Survey, exact_costs
from ..cost.uses import own_costs
from ..structure.groups import Structure

__all__ = ["Terms", "resources"]


@dataclass(frozen=True)
class Terms:
    """`budget` and `total_steps` may be set during the run; where one goes on, `survey` is what was saved."""

    structure: Structure
    survey: Survey
    budget: Budget | Price
    total_steps: int
    batch: int
    round_to: int | None
    seed: int

    @cached_property
    def problem(self) -> Problem:
        """An error if the budget cannot be met."""
        exact = exact_costs(resources(self.budget), self.structure)
        return pose(
            self.structure,
            self.budget,
            {**self.survey.costs, **exact, **own_costs(self.budget, self.structure)},
            total_steps=self.total_steps,
            round_to=self.round_to,
            batch=self.batch,
            seed=self.seed,
            multiples=self.survey.multiples,
            least=self.survey.least,
        )


def resources(budget: Budget | Price) -> list[str]:
    """The names of those that are under budget, or have a price."""
    return [*budget.targets(), *budget.prices()]
