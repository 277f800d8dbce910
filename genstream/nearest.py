"""The E-step of many components, where each row meets only those that matter near it.

The rows of a chunk are cut into cells, of which each has a list of components; its rows are scored
and gathered under these alone, by the same two matrix products as under all, and the sums are put
back where they belong. So responsibilities are those of the best distribution over a list, and

    F = sum_n w_n log sum_(k in list of n) p(x_n, k)  <=  sum_n w_n log p(x_n)

is the bound that truncated EM climbs (Lucke & Eggert 2010, section 2; Forster & Lucke 2018, who
find lists by clusters as well). The gap is what the components left out would have added.

Lists come from *witnesses*: points at which a component is known to matter, as a row drawn from it
lies there, or a row of the data took more than `Nearest.least` of its responsibility from it.
Points and rows are divided together, by k-means of a few, from the whole chunk down to cells of
some hundred rows; in each part a sample of the rows is scored under the part's list, which adds
witnesses to those that are handed down. A cell's list are the components of its witnesses. Last,
rows that fare badly, worse than all but the worst `Nearest.checked` of a sample of rows do under
all components, are scored under all components: outliers, and rows whose component has no witness
near them.

Everything follows from parameters, rows and the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genstream import compiled
from genstream.families.blocks import Family, Kernel, Walk, slices
from genstream.profile import mark
from genstream.responsibility import Nearest, weighted_soft
from genstream.rows import Rows
from genstream.stats import Monoid, Placed

Array = NDArray[Any]
Index = NDArray[np.intp]

# Parts that a part is divided into, at most, and points of each by which its centre is found.
BRANCHES, CENTRED_BY = 16, 32
# Lloyd's steps of a division.
STEPS = 4
# A part whose list is shorter is a cell.
SHORT = 48
# A division whose lists are longer than this share of the whole's, row by row, is not worth it.
SHORTENED = 0.7
# Rows scored for each part that a part is divided into; and of a whole chunk, under all components.
SCORED, SCORED_FIRST = 64, 2048
# Rows drawn from each component, at least and at most.
DRAWN = 4, 64
# With fewer rows a component in a chunk, finding lists takes longer than scoring all.
LEAST_ROWS_EACH = 4
# Rows whose distances to centres are held at a time.
LANE = 8192


class Sums(NamedTuple):
    """What an E-step sums: rows of which anything was observed, their weight, the bound, (K,) what
    each component took, and the family's statistics.
    """

    n_observed: int
    weight: float
    objective: float
    sum_r: Array
    family: Monoid


class Cell(NamedTuple):
    """Rows of a chunk (n,), and the components (C,) they are scored under."""

    rows: Index
    components: Index


class Part(NamedTuple):
    """Rows of a chunk (n,), their list (C,), and the witnesses among them: points (m,) and the
    component that matters at each (m,).
    """

    rows: Index
    components: Index
    points: Array
    matters: Index


class Tested(NamedTuple):
    """Rows scored under a list (n,), the logarithm of what the list's densities sum to for each
    (n,), and all that mattered: which of the rows (m,), the component (m,) and its share (m,).
    """

    rows: Index
    values: Array
    whose: Index
    matters: Index
    shares: Array


class Search:
    """The cells of a chunk and their lists.

    Parameters
    ----------
    family, params, log_weights
        The K components.
    rows
        The chunk, as the family takes it.
    rule
        How closely to look.
    seed
        What random numbers follow from, with the chunk's size.
    kernel
        What the family prepared of the components, where it has already.

    Attributes
    ----------
    floor
        What a row's log-density must reach under its list, lest it be scored under all components;
        known once there is a cell.
    """

    def __init__(
        self,
        family: Family,
        params: Any,
        log_weights: Array,
        rows: Rows,
        rule: Nearest,
        seed: tuple[int, int],
        kernel: Kernel | None = None,
    ) -> None:
        self.family, self.params, self.log_weights = family, params, log_weights
        self.rows, self.rule = rows, rule
        self.kernel = family.prepare(params, log_weights) if kernel is None else kernel
        self.every = np.arange(len(log_weights))
        self.rng = np.random.default_rng([*seed, rows.n_rows])
        self.fast = compiled.pays_for(rows.values, len(self.every))
        useful: Any = np.ones(rows.n_rows, dtype=bool)
        if rows.observed is not None:
            useful = rows.observed.any(axis=1)
        self.n_observed = int(useful.sum())
        if rows.weights is not None:
            # Multiplied by 0 a row beyond the arithmetic would still spoil all sums.
            useful = useful & (rows.weights > 0)
        self.useful = np.flatnonzero(useful)
        self.floor = -np.inf

    def taken(self, components: Index) -> Kernel:
        """The kernel of some of the components."""
        if len(components) == len(self.every):
            return self.kernel
        take = getattr(self.kernel, "take", None)
        kernel: Kernel
        if take is not None:
            kernel = take(components)
        else:
            some = self.params.take(components)
            kernel = self.family.prepare(some, self.log_weights[components])
        return kernel

    def cells(self) -> Iterator[Cell]:
        """One cell after another; a row with nothing observed or of weight 0 is in none."""
        n_first = min(SCORED_FIRST, len(self.useful) // 32)
        least = max(2 * self.rule.cell_rows, LEAST_ROWS_EACH * len(self.every))
        if len(self.every) <= SHORT or len(self.useful) < least or not n_first:
            yield Cell(self.useful, self.every)
            return
        self.at, drawn, source = self._points()
        whole = Part(self.useful, self.every, drawn, source)
        first = self._tested(whole, n_first)
        share = self.rule.checked
        self.floor = np.inf if share >= 1 else float(np.quantile(first.values, share))
        waiting: list[tuple[Part, Tested | None]] = [(whole, first)]
        while waiting:
            part, tested = waiting.pop()
            n_parts = min(BRANCHES, len(part.rows) // self.rule.cell_rows)
            if n_parts < 2 or len(part.components) <= SHORT:
                yield Cell(part.rows, part.components)
                continue
            if tested is None:
                tested = self._tested(part, SCORED * n_parts)
            children = self._divided(part, tested, n_parts)
            if children is None:
                yield Cell(part.rows, part.components)
            else:
                waiting += [(child, None) for child in children]

    def scored(
        self, walk: Walk, rows: Index, took: Array, weights: Array | None = None
    ) -> Iterator[tuple[Index, Array, Array]]:
        """Of each block of a walk over some rows (n,) of the chunk: which rows these are,
        responsibilities (C, n) under the list, and the logarithm of what the list's densities sum
        to (n,). Responsibilities are times the chunk's `weights`, and `took` (C,) adds them up.
        """
        for index in walk.blocks():
            mark("features")
            chosen = rows[index]
            resp = walk.score()
            mark("score")
            block = None if weights is None else weights[chosen]
            value = weighted_soft(resp, block, took, self.fast)
            base = walk.base()
            yield chosen, resp, value if base is None else value + base

    def _points(self) -> tuple[Array, Array, Index]:
        """Coordinates in float32 of the chunk's rows (n, e) and of rows drawn from the components
        (m, e), with gaps where rows have them, and from which each was drawn (m,).
        """
        n_drawn = int(np.clip(len(self.useful) // (2 * len(self.every)), *DRAWN))
        source = np.repeat(self.every, n_drawn)
        values: Any = self.family.draw(self.params, source, self.rng)[0]
        values = values.astype(self.rows.values.dtype)
        observed = self.rows.observed
        if observed is not None:
            observed = observed[self.rng.choice(self.useful, len(source))]
            values = np.where(observed, values, 0)
        if self.rows.is_sparse:
            values = sparse.csr_array(values)
        # Together, since some coordinates are standardised by the rows at hand.
        both = Rows.concatenate([replace(self.rows, weights=None), Rows(values, observed)])
        at = self.family.embed(both)[0].astype(np.float32)
        return at[: self.rows.n_rows], at[self.rows.n_rows :], source

    def _tested(self, part: Part, n_rows: int) -> Tested:
        """Some rows of the part, scored under its list."""
        chosen = part.rows[self.rng.integers(0, len(part.rows), min(n_rows, len(part.rows)))]
        walk = self.taken(part.components).walk(self.rows[chosen])
        took = np.zeros(len(part.components))
        rows, values, whose, matters, shares = [], [], [], [], []
        n_scored = 0
        for index, resp, value in self.scored(walk, chosen, took):
            k, n = np.nonzero(resp > self.rule.least)
            rows.append(index)
            values.append(value)
            whose.append(n + n_scored)
            matters.append(part.components[k])
            shares.append(resp[k, n])
            n_scored += len(index)
        return Tested(*(np.concatenate(each) for each in (rows, values, whose, matters, shares)))

    def _divided(self, part: Part, tested: Tested, n_parts: int) -> list[Part] | None:
        """The part divided about a few centres, with witnesses of the rows tested; None where one
        in four of these, for which the others have to stand, would lose too much by it, or lists
        would hardly be shorter.
        """
        at = self.at[part.rows]
        centres = _centres(at, n_parts, self.rng)
        n = len(tested.rows)
        known = tested.whose < n - n // 4
        points = np.concatenate([part.points, self.at[tested.rows[tested.whose]]])
        matters = np.concatenate([part.matters, tested.matters])
        theirs = _closest(points, centres)
        first = len(part.points)
        listed = np.zeros((n_parts, len(self.every)), dtype=bool)
        listed[theirs[:first], part.matters] = True
        listed[theirs[first:][known], tested.matters[known]] = True
        missed = np.where(listed[theirs[first:], tested.matters], 0.0, tested.shares)
        lost = -np.log1p(-np.minimum(np.bincount(tested.whose, missed, n), 1 - 1e-9))
        # What falls below the floor is scored again.
        lost[tested.values - lost < self.floor] = 0.0
        if lost[n - n // 4 :].mean() > self.rule.tolerance:
            return None
        listed[theirs[first:], tested.matters] = True
        order, edges = _sorted(_closest(at, centres), n_parts)
        if np.diff(edges) @ listed.sum(axis=1) > SHORTENED * len(at) * len(part.components):
            return None
        order_points, edges_points = _sorted(theirs, n_parts)
        children = []
        for i in range(n_parts):
            rows = part.rows[order[edges[i] : edges[i + 1]]]
            if len(rows):
                chosen = order_points[edges_points[i] : edges_points[i + 1]]
                own = np.flatnonzero(listed[i])
                components = own if len(own) else part.components
                children.append(Part(rows, components, points[chosen], matters[chosen]))
        return children


def e_step(
    family: Family,
    params: Any,
    log_weights: Array,
    rows: Rows,
    rule: Nearest,
    seed: tuple[int, int] = (0, 0),
    kernel: Kernel | None = None,
) -> Sums:
    """The sums of a chunk, in which each row meets the components of its cell.

    Takes what `Search` takes.
    """
    search = Search(family, params, log_weights, rows, rule, seed, kernel)
    total = Placed(len(log_weights))
    sum_r = np.zeros(len(log_weights))
    objective = weight = 0.0
    badly: list[Index] = []

    def add(cell: Cell, floor: float) -> None:
        nonlocal objective, weight
        took = np.zeros(len(cell.components))
        walk = search.taken(cell.components).walk(rows[cell.rows])
        mark("prepare")
        for index, resp, value in search.scored(walk, cell.rows, took, rows.weights):
            # Said so that what is no number is below, too.
            low = ~(value >= floor)
            some = bool(low.any())
            if some:
                badly.append(index[low])
                took -= resp[:, low].sum(axis=1, dtype=np.float64)
                resp[:, low] = 0.0
                index, value = index[~low], value[~low]
            block = None if rows.weights is None else rows.weights[index]
            objective += float(value.sum() if block is None else block @ value)
            weight += len(value) if block is None else float(block.sum())
            mark("softmax")
            walk.gather(resp)
            mark("gather")
        total.add(walk.close(), cell.components)
        sum_r[cell.components] += took

    for cell in search.cells():
        mark("lists")
        everything = len(cell.components) == len(sum_r)
        add(cell, -np.inf if everything else search.floor)
    if badly:
        add(Cell(np.concatenate(badly), search.every), -np.inf)
    return Sums(search.n_observed, weight, objective, sum_r, total.close())


def _centres(at: Array, n: int, rng: np.random.Generator) -> Array:
    """(n, e) centres of some of the points (m, e), by Lloyd's steps from n of them."""
    some = at[rng.integers(0, len(at), min(len(at), n * CENTRED_BY))]
    centres = some[:n].copy()
    for _ in range(STEPS):
        member = np.zeros((n, len(some)), dtype=at.dtype)
        member[_closest(some, centres), np.arange(len(some))] = 1.0
        mass = member.sum(axis=1, keepdims=True)
        centres = np.where(mass > 0, member @ some / np.maximum(mass, 1.0), centres)
    return centres


def _closest(at: Array, centres: Array) -> NDArray[np.uint8]:
    """(m,) which of at most 256 centres (n, e) is closest to each point (m, e)."""
    closest = np.zeros(len(at), dtype=np.uint8)
    twice, square = 2 * centres, (centres**2).sum(axis=1)[:, None]
    for piece in slices(len(at), LANE):
        near = twice @ at[piece].T
        near -= square
        best, own = near[0], closest[piece]
        for i in range(1, len(centres)):
            nearer = near[i] > best
            np.copyto(best, near[i], where=nearer)
            np.copyto(own, np.uint8(i), where=nearer)
    return closest


def _sorted(own: NDArray[np.uint8], n: int) -> tuple[Index, Index]:
    """Positions by what they belong to, and (n + 1,) where each of n begins."""
    counts = np.bincount(own, minlength=n)
    return np.argsort(own, kind="stable"), np.concatenate([[0], np.cumsum(counts)])
