"""A resource as an exact polynomial in the widths.

Every counted operator and every tensor is a coefficient times a product of extents, and an extent is a
sum of products of widths, so a resource is::

    C(n) = Σ_t a_t Π_k φ_{tk}(n),      φ(n) = b + Σ_g s_g n_g        (affine forms)

`Polynomial.of` brings any term to that form: factors of a Product become factors of the term, Fixed goes
into the coefficient, a Concat of affine parts is one affine form, any other Concat is distributed over
the term; like terms are added up. Compiled, with T terms of at most K forms over F distinct forms::

    forms = b + S n            [F]       S: [F, G]
    C(n)  = a · Π_k forms[index[:, k]]   index: [T, K], padded with the form 1

The marginal of group g, `C(n) − C(n − s e_g)`, evaluates only the terms that g stands in (all pairs
(term, group) at once in `marginals`). Units are the caller's (FLOPs, elements, bytes). Integers are exact
below 2⁵³, as float64 is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..structure.extents import Concat, Extent, Fixed, Product, Units, Window

__all__ = ["Polynomial"]

Array: TypeAlias = NDArray[np.float64]
Form: TypeAlias = tuple[int, tuple[tuple[int, int], ...]]  # b, ((g, s_g), …) sorted by g
DENSE = 250_000  # entries up to which S is stored densely
Monomial: TypeAlias = tuple[float, tuple[Form, ...]]


def _monomials(extent: Extent) -> list[Monomial]:
    """The extent as a sum of coefficient × Π affine forms."""
    match extent:
        case Fixed(length):
            return [(float(length), ())]
        case Units(group, _):
            return [(1.0, ((0, ((group, 1),)),))]
        case Product(factors):
            return _expand(factors)
        case Concat(parts):
            return _collect([monomial for part in parts for monomial in _monomials(part)])
        case Window():
            raise ValueError("a window of a sharded dimension costs nothing by itself")


def _expand(factors: Sequence[Extent]) -> list[Monomial]:
    """Π factors, distributed."""
    out: list[Monomial] = [(1.0, ())]
    for factor in factors:
        out = [(a * c, forms + more) for a, forms in out for c, more in _monomials(factor)]
    return out


def _collect(monomials: list[Monomial]) -> list[Monomial]:
    """A sum of monomials with all affine ones folded into one affine form."""
    constant, slopes, rest = 0, dict[int, int](), list[Monomial]()
    for coefficient, forms in monomials:
        if len(forms) > 1 or coefficient != int(coefficient):
            rest.append((coefficient, forms))
            continue
        offset, terms = forms[0] if forms else (1, ())
        constant += int(coefficient) * offset
        for group, slope in terms:
            slopes[group] = slopes.get(group, 0) + int(coefficient) * slope
    form = (constant, tuple(sorted(slopes.items())))
    return [*_monomial(form), *rest]


def _monomial(form: Form) -> list[Monomial]:
    """An affine form as a monomial, its common divisor in the coefficient so that like terms meet."""
    constant, slopes = form
    divisor = math.gcd(constant, *(slope for _, slope in slopes))
    if not divisor:
        return []
    if not slopes:
        return [(float(constant), ())]
    return [(float(divisor), ((constant // divisor, tuple((g, s // divisor) for g, s in slopes)),))]


@dataclass(frozen=True, eq=False)
class Polynomial:
    """C(n) over `groups` widths; build it with `Polynomial.of`."""

    groups: int
    coefficients: Array  # a, [T]
    index: NDArray[np.intp]  # [T, K] into the forms
    offsets: Array  # b, [F]; the last form is the constant 1
    slopes: Any  # S, [F, G]: an array, or scipy's csr_array where that is large
    pair_terms: NDArray[np.intp]  # [P] term of each (term, group) pair, pairs sorted by group
    pair_groups: NDArray[np.intp]  # [P]
    pair_slopes: Array  # [P, K] ∂form/∂n_g of each factor of the pair's term
    starts: NDArray[np.intp]  # [G + 1] pairs of group g are starts[g]:starts[g + 1]

    @staticmethod
    def of(terms: Iterable[tuple[float, tuple[Extent, ...]]], groups: int) -> Polynomial:
        """Compile Σ coefficient × Π size(extent) over `groups` groups."""
        total: dict[tuple[Form, ...], float] = {}
        for coefficient, extents in terms:
            for a, forms in _expand(extents):
                key = tuple(sorted(forms))
                total[key] = total.get(key, 0.0) + coefficient * a
        return _compile({key: a for key, a in total.items() if a}, groups)

    def value(self, widths: ArrayLike) -> float:
        """C(n), `widths` of shape [G]."""
        forms = self._forms(np.asarray(widths, float))
        return float(forms[self.index].prod(axis=1) @ self.coefficients)

    def values(self, widths: ArrayLike) -> Array:
        """C of many width vectors at once: [B, G] -> [B]."""
        forms = self._forms(np.asarray(widths, float))
        return _product(forms, self.index) @ self.coefficients

    def marginal(self, widths: ArrayLike, group: int, step: float) -> float:
        """C(n) − C(n − step e_g)."""
        return float(self._saved(widths, np.array([step]), slice(*self.starts[group : group + 2])).sum())

    def marginals(self, widths: ArrayLike, steps: ArrayLike) -> Array:
        """C(n) − C(n − steps_g e_g) for every g on its own: [G]."""
        change = self._saved(widths, np.asarray(steps, float)[self.pair_groups], slice(None))
        return np.asarray(np.bincount(self.pair_groups, weights=change, minlength=self.groups), float)

    def _saved(self, widths: ArrayLike, steps: Array, pairs: slice) -> Array:
        """What the term of each pair loses when the pair's group loses `steps` units."""
        forms = self._forms(np.asarray(widths, float))
        terms = self.pair_terms[pairs]
        before = forms[self.index[terms]]
        after = before - self.pair_slopes[pairs] * steps[:, None]
        return self.coefficients[terms] * (before.prod(axis=1) - after.prod(axis=1))

    def _forms(self, widths: Array) -> Array:
        return self.offsets + (self.slopes @ widths.T).T  # [G] -> [F], [B, G] -> [B, F]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists: a, the forms of every term, and G."""
        terms = [
            [a, [[b, [list(slope) for slope in slopes]] for b, slopes in key]]
            for key, a in self._as_terms().items()
        ]
        return {"groups": self.groups, "terms": terms}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Polynomial:
        """The same polynomial, to the bit."""
        total = {
            tuple((int(b), tuple((int(g), int(s)) for g, s in slopes)) for b, slopes in forms): float(a)
            for a, forms in state["terms"]
        }
        return _compile(total, int(state["groups"]))

    def __add__(self, other: Polynomial) -> Polynomial:
        if self.groups != other.groups:
            raise ValueError(f"polynomials over {self.groups} and {other.groups} groups cannot be added")
        total = self._as_terms()
        for key, a in other._as_terms().items():
            total[key] = total.get(key, 0.0) + a
        return _compile(total, self.groups)

    def __mul__(self, factor: float) -> Polynomial:
        return _compile({key: a * factor for key, a in self._as_terms().items()}, self.groups)

    __rmul__ = __mul__

    def _as_terms(self) -> dict[tuple[Form, ...], float]:
        slopes = self.slopes if isinstance(self.slopes, np.ndarray) else self.slopes.toarray()
        forms = [
            (int(b), tuple((int(g), int(row[g])) for g in np.flatnonzero(row)))
            for b, row in zip(self.offsets, slopes, strict=True)
        ]
        one = len(forms) - 1
        return {
            tuple(sorted(forms[f] for f in row if f != one)): float(a)
            for a, row in zip(self.coefficients, self.index, strict=True)
        }


def _product(forms: Array, index: NDArray[np.intp]) -> Array:
    """Π_k forms[:, index[:, k]]: [B, F] -> [B, T], without the [B, T, K] intermediate."""
    out = forms[:, index[:, 0]]
    for column in index.T[1:]:
        out = out * forms[:, column]
    return out


def _compile(total: Mapping[tuple[Form, ...], float], groups: int) -> Polynomial:
    number: dict[Form, int] = {}
    rows = [[number.setdefault(form, len(number)) for form in key] for key in total]
    one = len(number)
    longest = max([1, *map(len, rows)])
    index = np.full((len(rows), longest), one, dtype=np.intp)
    for t, row in enumerate(rows):
        index[t, : len(row)] = row
    entries = [(f, g, s) for (_, slopes), f in number.items() for g, s in slopes]
    where = np.array(entries, dtype=np.intp).reshape(-1, 3)
    if len(where) and not 0 <= where[:, 1].min() <= where[:, 1].max() < groups:
        raise ValueError(f"an extent names group {where[:, 1].max()}, but there are {groups} groups")
    pairs = sorted({(g, t) for t, key in enumerate(total) for _, terms in key for g, _ in terms})
    pair_groups = np.array([g for g, _ in pairs], dtype=np.intp)
    pair_terms = np.array([t for _, t in pairs], dtype=np.intp)
    at = [dict(terms) for _, terms in number] + [{}]
    pair_slopes = np.array([[at[f].get(g, 0) for f in index[t]] for g, t in pairs], dtype=float)
    return Polynomial(
        groups=groups,
        coefficients=np.array(list(total.values()), dtype=float),
        index=index,
        offsets=np.array([b for b, _ in number] + [1.0]),
        slopes=_slopes(where, (one + 1, groups)),
        pair_terms=pair_terms,
        pair_groups=pair_groups,
        pair_slopes=pair_slopes.reshape(len(pairs), longest),
        starts=np.searchsorted(pair_groups, np.arange(groups + 1)),
    )


def _slopes(where: NDArray[np.intp], shape: tuple[int, int]) -> Any:
    """From rows (form, group, slope)."""
    if math.prod(shape) > DENSE:
        from scipy.sparse import csr_array  # takes a tenth of a second to import

        return csr_array((where[:, 2].astype(float), (where[:, 0], where[:, 1])), shape=shape)
    out = np.zeros(shape)
    np.add.at(out, (where[:, 0], where[:, 1]), where[:, 2])
    return out
