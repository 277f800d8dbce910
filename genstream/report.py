"""Reports of a fit, of a sweep and of an update: one HTML file each, readable without a network.

Figures are drawn by matplotlib as SVG and set into the page, where they take its text colour, so
that they are readable on a light and on a dark screen. Whatever grows with the number of components
or columns is cut to what tells most, and the page says what was left out.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from genstream import __version__
from genstream.errors import StorageError
from genstream.evaluate import (
    ColumnCheck,
    Criteria,
    HeldOut,
    LevelCheck,
    NumericCheck,
    PredictiveCheck,
    criteria,
)
from genstream.families.blocks import Description
from genstream.learn import FitState, StepInfo
from genstream.priors import Prior
from genstream.rows import Rows
from genstream.schema import Column
from genstream.story import Params, Story

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from genstream.models import Event, Snapshot
    from genstream.updates import Learned

Array = NDArray[np.float64]

# What the page shows at most of each.
MAX_COMPONENTS = 20
MAX_PORTRAITS = 12
MAX_COMPONENT_COLUMNS = 12
MAX_COLUMNS = 40
MAX_CHECKS = 24
MAX_LEVELS = 12
MAX_NAMED_LEVELS = 3
MAX_POINTS = 4_000
MAX_ELLIPSES = 12
MAX_WARNINGS = 20
MAX_STEPS = 12
MAX_BATCHES = 60
MAX_HISTORY = 120
MAX_TOLD = 6
MAX_EVENTS = 30
MAX_VERSIONS = 12
MAX_WAITING = 20
MAX_TEXT = 400
MAX_FACTORED = 6
MAX_FACTORS = 60
MAX_LOADED = 5
# A drawn column is called different from the real one beyond both of these.
FAR, FAR_EXPECTED = 0.05, 3.0

# Distinct also to colour-blind readers (Okabe & Ito 2008), grey and black left out.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#7b5aa6",
)  # fmt: skip
REAL, DRAWN = "#7f8c99", "#d55e00"
# Stands for the page's text colour until the figure is set into it.
INK = "#010203"


@dataclass(frozen=True)
class ReportInput:
    """All that a report shows.

    Parameters
    ----------
    title
        Name of the run or model.
    story, state
        The fitted story and the last state of its fit.
    data
        What the rows are and where they came from, as label and value.
    train, test
        Scores on the rows of the fit and on held-out rows.
    check
        Drawn rows against real rows.
    sample
        Some real rows, of which up to `MAX_POINTS` become the picture of the assignments.
    reproducibility
        Seed, versions, data identity, chunking and whatever else repeats the fit; may be nested.
    notes
        Warnings besides those that the story, the state and the check give themselves.
    created
        When the fit ended.
    """

    title: str
    story: Story
    state: FitState
    data: Mapping[str, object] = field(default_factory=dict)
    train: HeldOut | None = None
    test: HeldOut | None = None
    check: PredictiveCheck | None = None
    sample: Rows | None = None
    reproducibility: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


def write_report(path: str | Path, content: ReportInput) -> Path:
    """Write the report to `path` as one HTML file, replacing what was there as a whole.

    Raises StorageError where the file cannot be written; a report that was there is then left.
    """
    return _write(Path(path), render_report(content))


def _write(target: Path, page: str) -> Path:
    """Replace a page as a whole."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(page)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"the report cannot be written to {target}: {error.strerror}") from error
    return target


def render_report(content: ReportInput) -> str:
    """The report as the text of one HTML page."""
    return _render("report.html.j2", _page(content))


def _render(template: str, page: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("genstream", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "with_error": with_error}
    return environment.get_template(template).render(page)


# --- numbers and words ---------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A number in `digits` significant digits, as people write it."""
    if value is None or not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = int(np.floor(np.log10(abs(value))))
    if -4 <= size < 9:
        text = f"{value:,.{max(0, digits - 1 - size)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def with_error(value: float, error: float) -> str:
    """A number in as many decimals as its standard error has meaning for."""
    if not (np.isfinite(value) and np.isfinite(error) and error > 0):
        return number(value)
    decimals = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share in percent; what is not nothing or all never reads as if it were."""
    if share is None or not np.isfinite(share):
        return "–"
    if 0 < share < 0.001:
        return "< 0.1\u00a0%"
    if 0.999 < share < 1:
        return "> 99.9\u00a0%"
    return f"{share:.0%}"[:-1] + "\u00a0%" if share in (0, 1) else f"{100 * share:.1f}\u00a0%"


def _one_line(text: str, length: int = 24) -> str:
    """A label for a figure: without control characters, and not longer than the figure bears."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def _with_unit(column: Column | ColumnCheck) -> str:
    return f"{column.name} ({column.unit})" if column.unit else column.name


def _flat(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value in words) of a nested mapping; long lists are cut."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            shown = ", ".join(str(item) for item in value[:8])
            more = len(value) - 8
            yield f"{prefix}{key}", f"{shown}, … ({more} more)" if more > 0 else shown
        else:
            yield f"{prefix}{key}", "–" if value is None else str(value)


# --- what the components say ---------------------------------------------------------------------


@dataclass(frozen=True)
class Portrait:
    """The components in terms of columns, whatever the family.

    `mean` and `sd` (K, d) are those of real and count columns, NaN elsewhere. `levels[j]` (K, L)
    are level probabilities of a binary or categorical column. `overall` and `spread` (d,) are the
    mixture's own mean and deviation. `separation` (d,) is the share of a column's variance that
    lies between components: of a categorical column, that of its level indicators (Goodman &
    Kruskal's tau between component and level). `covariance(k)` is (d, d), or None where columns
    are independent given the component.
    """

    story: Story
    weights: Array
    mean: Array
    sd: Array
    levels: Mapping[int, Array]
    covariance: Callable[[int], Array] | None
    overall: Array
    spread: Array
    separation: Array

    @classmethod
    def of(cls, story: Story, params: Params) -> Portrait:
        """Read off the parameters, in data units."""
        weights = params.weights
        told = story.family.describe(params.family)
        mean, sd, levels = told.mean, told.sd, told.levels
        overall = weights @ mean
        between = weights @ (mean - overall) ** 2
        total = between + weights @ sd**2
        separation = between / np.where(total > 0, total, 1.0)
        for j, p in levels.items():
            average = weights @ p
            apart = float((weights @ (p - average) ** 2).sum())
            possible = float((average * (1 - average)).sum())
            separation[j] = apart / possible if possible > 0 else 0.0
        return cls(
            story, weights, mean, sd, levels, told.covariance, overall, np.sqrt(total), separation
        )

    @property
    def heaviest(self) -> NDArray[np.intp]:
        """(K,) components from the heaviest to the lightest."""
        return np.argsort(-self.weights, kind="stable")

    def most_telling(self, n: int) -> list[int]:
        """Positions of the `n` columns with the largest separation, in the order of the schema."""
        best = np.argsort(-np.nan_to_num(self.separation), kind="stable")[:n]
        return sorted(int(j) for j in best)

    def top_levels(self, k: int, j: int, n: int = MAX_NAMED_LEVELS) -> list[tuple[str, float]]:
        """(label, probability) of a component's most probable levels."""
        labels = self.story.schema.columns[j].levels or ("0", "1")
        p = self.levels[j][k]
        best = np.argsort(-p, kind="stable")[:n]
        return [(labels[i], float(p[i])) for i in best if p[i] >= 0.005 or i == best[0]]

    def signature(self, k: int) -> list[str]:
        """What sets a component apart from the mixture, in words: up to three columns."""
        scored: list[tuple[float, str]] = []
        columns = self.story.schema.columns
        for j, column in enumerate(columns):
            if j in self.levels:
                average = self.weights @ self.levels[j]
                lift = self.levels[j][k] - average
                best = int(np.argmax(lift))
                label = (column.levels or ("0", "1"))[best]
                share = percent(float(self.levels[j][k][best]))
                rest = percent(float(average[best]))
                noise = np.sqrt(max(average[best] * (1 - average[best]), 1e-12))
                scored.append(
                    (float(lift[best] / noise), f"{column.name} {label} {share} (overall {rest})")
                )
            elif self.spread[j] > 0:
                z = (self.mean[k, j] - self.overall[j]) / self.spread[j]
                word = "high" if z > 0 else "low"
                unit = f" {column.unit}" if column.unit else ""
                scored.append(
                    (abs(float(z)), f"{word} {column.name} {number(self.mean[k, j], 3)}{unit}")
                )
        scored.sort(key=lambda pair: -pair[0])
        return [text for score, text in scored[:3] if score > 0.25]


def _factors(portrait: Portrait, told: Description) -> list[dict[str, Any]]:
    """What each factor of the heaviest components moves most, in deviations of a column."""
    if told.loadings is None:
        return []
    found = []
    names = portrait.story.schema.names
    spread = np.where(portrait.spread > 0, portrait.spread, 1.0)
    for j, p in portrait.levels.items():
        spread[j] = 1.0 if p.shape[1] == 2 else spread[j]
    for k in portrait.heaviest[:MAX_FACTORED]:
        share = told.loadings[int(k)] / spread[:, None]
        for i in range(share.shape[1]):
            top = np.argsort(-np.abs(share[:, i]), kind="stable")[:MAX_LOADED]
            moves = ", ".join(f"{names[j]} {share[j, i]:+.2f}" for j in top)
            found.append({"component": int(k), "factor": i, "moves": moves})
    return found[:MAX_FACTORS]


def component_colours(n_components: int) -> Array:
    """(K, 3) RGB in [0, 1]: a palette for few components, hues a golden angle apart for many."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    if n_components <= len(PALETTE):
        return np.array([to_rgb(c) for c in PALETTE[:n_components]])
    k = np.arange(n_components)
    hue = (0.58 + k * 0.6180339887498949) % 1.0
    value = np.where(k % 2, 0.72, 0.9)
    colours: Array = hsv_to_rgb(np.column_stack([hue, np.full(n_components, 0.75), value]))
    return colours


# --- figures -------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A figure set into the page, and what it shows in words."""

    svg: Markup
    alt: str
    caption: str = ""


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of a size in inches, in the report's style, without any global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "axes.edgecolor": INK,
        "axes.facecolor": "none",
        "axes.labelcolor": INK,
        "axes.linewidth": 0.6,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "legend.frameon": False,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "genstream",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # The reader's browser has the fonts that matplotlib lacks.
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> Markup:
    """The figure as an SVG element whose ids no other figure has, in the page's text colour."""
    from markupsafe import Markup

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    # Named by content, so that the same input gives the same page.
    prefix = f"f{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return Markup(text)  # noqa: S704 - matplotlib has escaped every label


def _trace_picture(trace: Sequence[StepInfo]) -> Picture | None:
    """Mean log-likelihood and, under a prior, the objective that EM climbs, step by step."""
    from matplotlib.ticker import MaxNLocator

    trace = [info for info in trace if np.isfinite(info.mean_loglik)]
    if len(trace) < 2:
        return None
    steps = [info.step for info in trace]
    loglik = np.array([info.mean_loglik for info in trace])
    objective = np.array([info.mean_objective for info in trace])
    has_prior = any(info.log_prior for info in trace)
    with _figure(4.6, 2.7) as (figure, axes):
        marker = "." if len(trace) <= 20 else ""
        axes.plot(steps, loglik, color=PALETTE[0], lw=1.6, marker=marker, label="log-likelihood")
        if has_prior:
            label = "with the log-prior"
            axes.plot(steps, objective, "--", color=PALETTE[1], lw=1.4, marker=marker, label=label)
        rescued = [i for i, info in enumerate(trace) if info.events]
        if rescued:
            axes.plot(
                np.array(steps)[rescued],
                loglik[rescued],
                "o",
                ms=4,
                color=DRAWN,
                label="component re-seeded",
            )
        shown = np.concatenate([loglik, objective]) if has_prior else loglik
        # The first steps climb so far that the rest would look flat.
        first = max(1, len(trace) // 20)
        rest = np.concatenate([loglik[first:], objective[first:]]) if has_prior else loglik[first:]
        low = shown.min()
        if np.ptp(rest) > 0 and rest.min() - low > 3 * np.ptp(rest):
            axes.set_ylim(rest.min() - 0.25 * np.ptp(rest), rest.max() + 0.08 * np.ptp(rest))
        axes.set_xlabel("step")
        axes.set_ylabel("nats a row")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(visible=True, alpha=0.2)
        if has_prior or rescued:
            axes.legend(loc="best", framealpha=0)
        alt = (
            f"Mean log-likelihood over {len(trace)} steps, from {number(loglik[0])} "
            f"to {number(loglik[-1])} nats a row."
        )
        return Picture(_svg(figure), alt)


def _coordinates(column: Column, values: Array, rng: np.random.Generator) -> Array:
    """Where points lie along a column: levels are spread out so that they can be told apart."""
    if column.kind in ("binary", "categorical"):
        return values + rng.uniform(-0.36, 0.36, len(values))
    if column.kind == "count":
        return values + rng.uniform(-0.3, 0.3, len(values))
    return values


def _view(axis_values: Array, column: Column | None) -> tuple[float, float]:
    """Limits that hold the bulk of the points."""
    if column is None:
        return -0.5, 0.5
    if column.kind in ("binary", "categorical"):
        return -0.6, len(column.levels or "01") - 0.4
    low, high = np.quantile(axis_values, (0.004, 0.996))
    reach = 0.06 * (high - low) or 1.0
    return float(low - reach), float(high + reach)


def _telling_pair(portrait: Portrait, rows: Rows, responsibilities: Array) -> list[int]:
    """The two columns to look at, real and count columns before the others.

    Of those, the first is the one whose ranks lie furthest between the components, so that a few
    far rows do not decide; the second counts only for what its ranks do not share with the first.
    """
    columns = portrait.story.schema.columns
    numeric = [j for j, column in enumerate(columns) if column.kind in ("real", "count")]
    others = [j for j in range(len(columns)) if j not in numeric]
    others.sort(key=lambda j: -float(portrait.separation[j]))
    if len(numeric) < 2:
        return [*numeric, *others][:2]
    observed = rows.is_observed[:, numeric]
    ranks = np.zeros(observed.shape)
    for i, j in enumerate(numeric):
        seen = observed[:, i]
        z = rankdata(rows.values[seen, j])
        spread = z.std() if len(z) else 0.0
        ranks[seen, i] = (z - z.mean()) / spread if spread > 0 else 0.0
    # Ranks have mean 0 and variance 1, so this is the share of variance between components.
    mass = responsibilities.T @ observed
    between = (responsibilities.T @ ranks) ** 2 / np.where(mass > 0, mass, 1.0)
    apart = between.sum(axis=0) / np.maximum(observed.sum(axis=0), 1)
    first = int(np.argmax(apart))
    both = observed & observed[:, [first]]
    shared = (ranks * ranks[:, [first]]).sum(axis=0) / np.maximum(both.sum(axis=0), 1)
    rest = apart * (1 - np.minimum(shared**2, 1.0))
    rest[first] = -1.0
    return [numeric[first], numeric[int(np.argmax(rest))]]


def _assignment_picture(portrait: Portrait, params: Params, sample: Rows) -> Picture | None:
    """Real rows on the two most telling columns, coloured by the mix of their components."""
    story = portrait.story
    rng = np.random.default_rng(0)
    rows = sample[np.sort(rng.permutation(sample.n_rows)[:MAX_POINTS])]
    responsibilities = story.infer(params, rows).responsibilities
    pair = _telling_pair(portrait, rows, responsibilities)
    seen = rows.is_observed[:, pair].all(axis=1)
    if not seen.any():
        return None
    order = portrait.heaviest
    colours = np.empty((story.n_components, 3))
    colours[order] = component_colours(story.n_components)
    mixed = np.clip(responsibilities[seen] @ colours, 0, 1)
    columns: list[Column | None] = [story.schema.columns[j] for j in pair]
    points = [
        _coordinates(story.schema.columns[j], rows.values[seen, j].astype(np.float64), rng)
        for j in pair
    ]
    if len(pair) == 1:
        columns.append(None)
        points.append(rng.uniform(-0.4, 0.4, len(points[0])))
    numeric = all(c is not None and c.kind in ("real", "count") for c in columns)
    with _figure(4.6, 3.7) as (figure, axes):
        axes.scatter(points[0], points[1], c=mixed, s=7, alpha=0.6, linewidths=0, rasterized=True)
        limits = [_view(p, c) for p, c in zip(points, columns, strict=True)]
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        if numeric:
            _draw_components(axes, portrait, pair, colours)
        _name_axis(axes, 0, columns[0])
        _name_axis(axes, 1, columns[1])
        inside = [(p >= a) & (p <= b) for p, (a, b) in zip(points, limits, strict=True)]
        outside = int((~np.logical_and(*inside)).sum())
        gaps = int((~seen).sum())
        names = " and ".join(c.name for c in columns if c is not None)
        caption = (
            f"{len(mixed):,} sampled rows on {names}, where the components differ most. Each "
            "point mixes the colours of the components in proportion to its responsibilities: a "
            "pure colour is a sure assignment, a blend a row between components."
        )
        if numeric:
            caption += " Ellipses lie two standard deviations around the means"
            left_out = story.n_components > MAX_ELLIPSES
            caption += f" of the {MAX_ELLIPSES} heaviest components." if left_out else "."
        if not all(c is not None and c.kind == "real" for c in columns):
            caption += " Points are spread a little where they would lie on each other."
        if outside:
            caption += f" Rows outside the view: {outside:,}."
        if gaps:
            caption += f" Rows with a gap there, not shown: {gaps:,}."
        alt = f"Scatter plot of {len(mixed):,} rows on {names}, coloured by component."
        return Picture(_svg(figure), alt, caption)


def _draw_components(axes: Axes, portrait: Portrait, pair: list[int], colours: Array) -> None:
    """Means and two-deviation ellipses of the heaviest components on two numeric columns."""
    from matplotlib.patches import Ellipse

    labels: list[Array] = []
    for k in portrait.heaviest[:MAX_ELLIPSES]:
        centre = portrait.mean[k, pair]
        if portrait.covariance is not None:
            shape = portrait.covariance(int(k))[np.ix_(pair, pair)]
        else:
            shape = np.diag(portrait.sd[k, pair] ** 2)
        values, vectors = np.linalg.eigh(shape)
        width, height = 4 * np.sqrt(np.maximum(values, 0))
        angle = float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0])))
        axes.add_patch(
            Ellipse(
                (centre[0], centre[1]), width, height, angle=angle,
                fill=False, ec=colours[k], lw=1.2,
            )
        )  # fmt: skip
        place = axes.transAxes.inverted().transform(axes.transData.transform(centre))
        # A label that would cover that of a heavier component is left out.
        if (np.abs(place - 0.5) < 0.5).all() and all(
            np.hypot(*(place - other)) > 0.055 for other in labels
        ):
            labels.append(place)
            axes.text(
                centre[0], centre[1], str(k), ha="center", va="center", fontsize=8,
                color="white", fontweight="bold",
                bbox={"boxstyle": "circle,pad=0.25", "fc": colours[k], "ec": "white"},
            )  # fmt: skip


def _name_axis(axes: Axes, which: int, column: Column | None) -> None:
    axis = (axes.xaxis, axes.yaxis)[which]
    if column is None:
        axis.set_ticks([])
        return
    set_label = (axes.set_xlabel, axes.set_ylabel)[which]
    set_label(_one_line(_with_unit(column), 48))
    if column.kind in ("binary", "categorical"):
        levels = column.levels or ("0", "1")
        if len(levels) <= 16:
            axis.set_ticks(range(len(levels)), [_one_line(level, 12) for level in levels])
            if which == 0 and len(levels) > 5:
                axes.tick_params(axis="x", labelrotation=90)


def _check_picture(check: ColumnCheck) -> Picture:
    """Drawn against real entries of one column; the page has the legend."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    share_axis: Axis
    with _figure(3.0, 2.1) as (figure, axes):
        if isinstance(check, NumericCheck):
            edges = np.array(check.edges)
            axes.stairs(check.real_shares, edges, fill=True, color=REAL, alpha=0.5)
            axes.stairs(check.drawn_shares, edges, color=DRAWN, lw=1.5)
            axes.set_xlabel(_one_line(_with_unit(check), 36))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            share_axis = axes.yaxis
            axes.set_ylim(bottom=0)
            words = f"real mean {number(check.real.mean)}, drawn mean {number(check.drawn.mean)}"
        else:
            order = _levels_to_show(check)
            places = np.arange(len(order))
            real = np.array(check.real_shares)[order]
            drawn = np.array(check.drawn_shares)[order]
            axes.barh(places - 0.2, real, 0.38, color=REAL, alpha=0.7)
            axes.barh(places + 0.2, drawn, 0.38, color=DRAWN)
            axes.set_yticks(places, [_one_line(check.levels[i], 14) for i in order])
            axes.invert_yaxis()
            axes.set_xlabel(_one_line(_with_unit(check), 36))
            share_axis = axes.xaxis
            words = ", ".join(
                f"{check.levels[i]} {percent(check.real_shares[i])} real and "
                f"{percent(check.drawn_shares[i])} drawn"
                for i in order[:3]
            )
        share_axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))
        top = max(*check.real_shares, *check.drawn_shares)
        share_axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.04 else None))
        return Picture(_svg(figure), f"{check.name}, drawn against real: {words}.")


def _levels_to_show(check: LevelCheck) -> list[int]:
    """Positions of the commonest levels, by share; numbers (months, hours) in their own order."""
    order = np.argsort(-np.array(check.real_shares), kind="stable")[:MAX_LEVELS].tolist()
    if all(check.levels[i].lstrip("-").isdecimal() for i in order):
        order.sort(key=lambda i: int(check.levels[i]))
    return [int(i) for i in order]


# --- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One column of one component: a value, and its spread or further levels.

    `shade` in -100..100 says how far it lies from the mixture's mean.
    """

    text: str
    detail: str = ""
    shade: int = 0


def _component_cell(portrait: Portrait, k: int, j: int) -> Cell:
    if j in portrait.levels:
        (first, share), *rest = portrait.top_levels(k, j)
        detail = ", ".join(f"{label} {percent(p)}" for label, p in rest)
        return Cell(f"{first} {percent(share)}", detail)
    mean, sd = float(portrait.mean[k, j]), float(portrait.sd[k, j])
    spread = float(portrait.spread[j])
    z = (mean - float(portrait.overall[j])) / spread if spread > 0 else 0.0
    shade = int(np.clip(50 * z, -100, 100))
    return Cell(number(mean), f"± {number(sd, 3)}", shade)


def _components(portrait: Portrait) -> dict[str, Any]:
    order = [int(k) for k in portrait.heaviest]
    shown, hidden = order[:MAX_COMPONENTS], order[MAX_COMPONENTS:]
    telling = portrait.most_telling(MAX_COMPONENT_COLUMNS)
    columns = portrait.story.schema.columns
    colours = component_colours(len(order))
    return {
        "columns": [_with_unit(columns[j]) for j in telling],
        "n_portraits": MAX_PORTRAITS,
        "n_columns_left": len(columns) - len(telling),
        "n_left": len(hidden),
        "weight_left": float(portrait.weights[hidden].sum()),
        "heaviest": float(portrait.weights[order[0]]),
        "rows": [
            {
                "name": k,
                "colour": _hex(colours[rank]),
                "weight": float(portrait.weights[k]),
                "signature": portrait.signature(k),
                "cells": [_component_cell(portrait, k, j) for j in telling],
            }
            for rank, k in enumerate(shown)
        ],
    }


def _hex(colour: Array) -> str:
    from matplotlib.colors import to_hex

    return to_hex(tuple(colour))


def _columns(portrait: Portrait, missing: Mapping[str, float]) -> dict[str, Any]:
    schema = portrait.story.schema
    gaps = np.array([missing.get(name, 0.0) for name in schema.names])
    telling = np.maximum(np.nan_to_num(portrait.separation), gaps)
    shown = sorted(np.argsort(-telling, kind="stable")[:MAX_COLUMNS].tolist())
    return {
        "n_left": schema.n_features - len(shown),
        "n_gappy": int((gaps > 0).sum()),
        "known": bool(missing),
        "rows": [
            {
                "name": schema.columns[j].name,
                "kind": schema.columns[j].kind,
                "unit": schema.columns[j].unit,
                "levels": len(schema.columns[j].levels),
                "missing": float(gaps[j]),
                "separation": float(portrait.separation[j]),
            }
            for j in shown
        ],
    }


def _is_far(check: ColumnCheck) -> bool:
    return check.distance > max(FAR, FAR_EXPECTED * check.expected_distance)


def _checks(check: PredictiveCheck) -> dict[str, Any]:
    def badness(column: ColumnCheck) -> float:
        return -column.distance if np.isfinite(column.distance) else 1.0

    worst = sorted(check.columns, key=badness)[:MAX_CHECKS]
    chosen = {column.name for column in worst}
    shown = [column for column in check.columns if column.name in chosen]
    return {
        "n_real": check.n_real,
        "n_drawn": check.n_drawn,
        "n_left": len(check.columns) - len(shown),
        "n_far": sum(_is_far(column) for column in check.columns),
        "columns": [
            {
                "name": _with_unit(column),
                "distance": column.distance,
                "expected": column.expected_distance,
                "far": _is_far(column),
                "summary": _check_words(column),
                "picture": _check_picture(column),
            }
            for column in shown
        ],
        "pairs": check.pairs[:5],
        "correlation_error": check.correlation_error,
    }


def _check_words(check: ColumnCheck) -> str:
    if isinstance(check, LevelCheck):
        off = np.array(check.drawn_shares) - np.array(check.real_shares)
        most = int(np.argmax(np.abs(off)))
        return (
            f"{check.levels[most]}: real {percent(check.real_shares[most])}, "
            f"drawn {percent(check.drawn_shares[most])}"
        )
    real, drawn = check.real, check.drawn
    return (
        f"mean {number(real.mean, 3)} real, {number(drawn.mean, 3)} drawn; "
        f"sd {number(real.sd, 3)} real, {number(drawn.sd, 3)} drawn"
    )


def _warnings(content: ReportInput) -> list[str]:
    state, check = content.state, content.check
    found = [state.outcome.advice] if state.outcome.advice else []
    found += [*content.story.warnings(state.params), *state.events, *content.notes]
    if check is not None:
        far = [column.name for column in check.columns if _is_far(column)]
        if far:
            names = ", ".join(far[:8]) + (f" and {len(far) - 8} more" if len(far) > 8 else "")
            found.append(f"drawn rows differ from real rows in {names}: see the predictive check")
        never = [column.name for column in check.columns if column.missing == 1.0]
        if never:
            found.append(f"no sampled row has a value in {', '.join(never[:8])}")
    return list(dict.fromkeys(found))


def _fit_words(train: HeldOut | None, test: HeldOut | None) -> str:
    """What the difference between the fitted and the held-out rows says, in one sentence."""
    if train is None or test is None:
        return ""
    gap = train.mean_loglik - test.mean_loglik
    error = float(np.hypot(train.standard_error, test.standard_error))
    size = f"{with_error(abs(gap), error)} ± {number(error, 2)} nats a row"
    if abs(gap) <= 2 * error:
        return f"Held-out rows are explained as well as the rows of the fit (difference {size})."
    if gap > 0:
        return (
            f"Held-out rows are explained worse than the rows of the fit, by {size}: "
            "fewer components or more rows would narrow this."
        )
    return f"Held-out rows are explained better than the rows of the fit, by {size}."


def _story_words(story: Story) -> str:
    """What is behind a row, in words."""
    k, q = story.n_components, story.n_factors
    parts = [f"{k} component{'s' if k > 1 else ''}"] if k > 1 or not q else []
    if q:
        parts.append(f"{q} factor{'s' if q > 1 else ''}")
    options = story.family.options()
    covariance = options.get("covariance")
    if any(kind != "real" for kind in story.schema.kinds) and covariance == "diag":
        return f"{' with '.join(parts)} over independent columns"
    form = f", {covariance} covariance" if covariance else ""
    return f"{' with '.join(parts)} ({story.family.name.replace('_', ' ')}{form})"


def _measure(story: Story) -> str:
    """What scores are: the log-likelihood, or a bound of it."""
    return "bound on the log-likelihood" if story.bound else "log-likelihood"


def _model_facts(story: Story, state: FitState) -> dict[str, str]:
    told = Prior.of(story.prior)
    prior = "none (maximum likelihood)" if told is None else f"{told} (MAP)"
    facts = {
        "Story": _story_words(story),
        "Free parameters": f"{story.n_parameters:,}",
        "Prior": prior,
        "Arithmetic": story.dtype,
        "Outcome": f"{state.outcome.value.replace('_', ' ')} after {state.step} steps",
    }
    if story.family.ridge:
        facts["Added to variances"] = number(story.family.ridge)
    if story.frozen:
        facts["Kept as they were"] = ", ".join(sorted(story.frozen))
    if story.bound:
        facts["Log-likelihoods"] = "are lower bounds throughout: the exact ones are not tractable"
    if state.trace:
        seconds = sum(info.seconds for info in state.trace)
        facts["Time in steps"] = f"{number(seconds, 3)} s"
        if seconds > 0:
            speed = sum(info.n_rows for info in state.trace) / seconds
            facts["Speed"] = f"{speed:,.0f} rows/s"
    return facts


def _data_facts(content: ReportInput) -> dict[str, str]:
    facts = {key[:1].upper() + key[1:]: value for key, value in _flat(content.data)}
    schema = content.story.schema
    kinds = [f"{len(schema.of_kind(kind))} {kind}" for kind in sorted(set(schema.kinds))]
    facts["Columns"] = f"{schema.n_features} ({', '.join(kinds)})"
    for label, score in (("Rows fitted", content.train), ("Rows held out", content.test)):
        if score is not None:
            facts[label] = f"{score.n_rows:,}"
            if score.n_unobserved:
                facts[f"{label}, nothing observed"] = f"{score.n_unobserved:,}"
    if content.train is None and content.state.trace:
        last = content.state.trace[-1]
        facts["Rows fitted"] = f"{last.n_rows:,}"
        if last.n_unobserved:
            facts["Rows fitted, nothing observed"] = f"{last.n_unobserved:,}"
    return facts


def _headline(content: ReportInput) -> list[tuple[str, str, str]]:
    """(label, figure, explanation) of what a reader looks for first."""
    cards = []
    measure = _measure(content.story)
    for label, score in (
        (f"{measure}, held out", content.test),
        (f"{measure}, fit", content.train),
    ):
        if score is not None:
            value = with_error(score.mean_loglik, score.standard_error)
            cards.append((label, value, f"± {number(score.standard_error, 2)} nats a row"))
    trace = content.state.trace
    if not cards and trace:
        last = trace[-1]
        cards.append((measure, number(last.mean_loglik), "nats a row, at the last step"))
    n_rows = content.train.n_rows if content.train else trace[-1].n_rows if trace else None
    if n_rows is not None:
        cards.append(("rows", f"{n_rows:,}", f"{content.story.schema.n_features} columns"))
    weights = content.state.params.weights
    cards.append(("components", str(len(weights)), f"heaviest {percent(float(weights.max()))}"))
    cards.append(("steps", str(content.state.step), content.state.outcome.value.replace("_", " ")))
    return cards


def _page(content: ReportInput) -> dict[str, Any]:
    """What the template shows."""
    story, state = content.story, content.state
    portrait = Portrait.of(story, state.params)
    missing: dict[str, float] = {}
    if content.train is not None:
        missing = content.train.missing
    elif content.check is not None:
        missing = {column.name: column.missing for column in content.check.columns}
    assignment = None
    if content.sample is not None and content.sample.n_rows:
        assignment = _assignment_picture(portrait, state.params, content.sample)
    found = _warnings(content)
    fits: Criteria | None = criteria(story, content.train) if content.train else None
    scores = [("rows of the fit", content.train), ("held-out rows", content.test)]
    steps = state.trace[-MAX_STEPS:]
    return {
        "title": content.title,
        "what": "Report of a fit",
        "created": content.created.strftime("%Y-%m-%d %H:%M %Z"),
        "colours": {"real": REAL, "drawn": DRAWN},
        "headline": _headline(content),
        "measure": _measure(story),
        "warnings": found[:MAX_WARNINGS],
        "n_warnings_left": max(0, len(found) - MAX_WARNINGS),
        "model": _model_facts(story, state),
        "data": _data_facts(content),
        "columns": _columns(portrait, missing),
        "components": _components(portrait),
        "factors": _factors(portrait, story.family.describe(state.params.family)),
        "assignment": assignment,
        "trace": _trace_picture(state.trace),
        "steps": steps,
        "n_steps_left": len(state.trace) - len(steps),
        "scores": [(label, score) for label, score in scores if score is not None],
        "fit_words": _fit_words(content.train, content.test),
        "criteria": fits,
        "check": _checks(content.check) if content.check is not None else None,
        "reproducibility": list(_flat(content.reproducibility)),
        "version": __version__,
    }


# --- the report of a sweep -----------------------------------------------------------------------

# What candidates are compared by: its name, and whether more is better.
CRITERIA = {
    "held_out": ("held-out log-likelihood", True),
    "bic": ("BIC", False),
    "aic": ("AIC", False),
    "icl": ("ICL", False),
}


@dataclass(frozen=True)
class SweepInput:
    """All that the report of a sweep shows.

    Parameters
    ----------
    title
        Name of the run.
    keys
        What the sweep is over, as `n_components`.
    cells
        Of each candidate the value of every key.
    rows
        Of each candidate, in the same order: `candidate` (its label), `held_out` and
        `standard_error`, `train` (nats a row), `bic`, `aic`, `icl`, `n_parameters`, `steps`,
        `seconds`, `outcome`, `status` and `reason`; None where it has none.
    by
        What the best one is best by: a key of `CRITERIA`.
    best
        The label of that candidate.
    data, reproducibility
        As of `ReportInput`.
    cost
        Of the fit: `passes` and `passes_alone`, `bytes_read` and `bytes_alone`, `seconds`.
    created
        When the sweep ended.
    """

    title: str
    keys: Sequence[str]
    cells: Sequence[Sequence[Any]]
    rows: Sequence[Mapping[str, Any]]
    by: str = "held_out"
    best: str | None = None
    data: Mapping[str, object] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    reproducibility: Mapping[str, object] = field(default_factory=dict)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


def write_sweep_report(path: str | Path, content: SweepInput) -> Path:
    """Write the report of a sweep, as `write_report` does that of a fit."""
    return _write(Path(path), render_sweep_report(content))


def render_sweep_report(content: SweepInput) -> str:
    """The report of a sweep as the text of one HTML page."""
    return _render("sweep.html.j2", _sweep_page(content))


def sweep_png(content: SweepInput) -> bytes | None:
    """The picture of the criterion over what was swept as a PNG on white; None of one candidate."""
    if not _drawable(content, content.by):
        return None
    with _figure(6.0, 3.2) as (figure, axes):
        _draw_sweep(axes, content, content.by)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=96, facecolor="white")
        return buffer.getvalue()


def _drawable(content: SweepInput, what: str) -> bool:
    return sum(row[what] is not None for row in content.rows) > 1


def _sweep_axis(content: SweepInput) -> int:
    """Which key runs along the figure: the first whose values are numbers, else the first."""
    for j in range(len(content.keys)):
        values = {cell[j] for cell in content.cells}
        if len(values) > 1 and all(isinstance(v, int | float) for v in values):
            return j
    return 0


def _draw_sweep(axes: Axes, content: SweepInput, what: str) -> None:
    """A criterion along one key, a line for each combination of the others."""
    along = _sweep_axis(content)
    values = list(dict.fromkeys(cell[along] for cell in content.cells))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for cell, row in zip(content.cells, content.rows, strict=True):
        if row[what] is None:
            continue
        label = ", ".join(str(v) for j, v in enumerate(cell) if j != along)
        x = float(cell[along]) if numbers else float(values.index(cell[along]))
        error = row["standard_error"] if what == "held_out" else None
        lines.setdefault(label, []).append((x, float(row[what]), float(error or 0.0)))
    for n, (label, points) in enumerate(list(lines.items())[: len(PALETTE)]):
        x, y, error = np.array(sorted(points)).T
        axes.errorbar(
            x, y, error, color=PALETTE[n], lw=1.6, marker="o", ms=3.5, capsize=2,
            label=_one_line(label),
        )  # fmt: skip
    if numbers and min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    if numbers and len(values) <= 12:
        axes.set_xticks(values, [number(float(v)) for v in values])
    elif not numbers:
        axes.set_xticks(range(len(values)), [_one_line(str(v)) for v in values])
    axes.set_xlabel(_one_line(content.keys[along]))
    name = CRITERIA[what][0]
    axes.set_ylabel(f"{name}, nats a row" if what == "held_out" else name)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(visible=True, alpha=0.2)
    if len(lines) > 1:
        axes.legend(loc="best", framealpha=0)


def _sweep_picture(content: SweepInput, what: str) -> Picture | None:
    if not _drawable(content, what):
        return None
    name, more = CRITERIA[what]
    with _figure(4.6, 2.9) as (figure, axes):
        _draw_sweep(axes, content, what)
        shown = [row for row in content.rows if row[what] is not None]
        best = (max if more else min)(shown, key=lambda row: row[what])
        caption = f"{'More' if more else 'Less'} is better."
        if what == "held_out":
            caption += " Bars are standard errors of the mean over rows."
        alt = f"{name} of {len(shown)} candidates, the best {number(best[what], 6)} ("
        return Picture(_svg(figure), f"{alt}{best['candidate']}).", caption)


def _sweep_page(content: SweepInput) -> dict[str, Any]:
    """What the template shows."""
    best = next((row for row in content.rows if row["candidate"] == content.best), None)
    cards = [("candidates", str(len(content.rows)), "models compared")]
    if best is not None:
        value = best[content.by]
        cards.append(("best", number(value, 6), f"{CRITERIA[content.by][0]}"))
    cost = content.cost
    if cost:
        alone = cost["passes_alone"] / max(cost["passes"], 1e-9)
        cards.append(("passes", number(cost["passes"]), f"{alone:.1f} times fewer than apart"))
        cards.append(("seconds", number(cost["seconds"]), "of learning, starts included"))
    pictures = [(CRITERIA[what][0], _sweep_picture(content, what)) for what in CRITERIA]
    return {
        "title": content.title,
        "what": "Report of a sweep",
        "created": content.created.strftime("%Y-%m-%d %H:%M %Z"),
        "headline": cards,
        "warnings": [
            f"{row['candidate']} failed: {_one_line(str(row['reason']), MAX_TEXT)}"
            for row in content.rows
            if row["status"] == "failed"
        ][:MAX_WARNINGS],
        "n_warnings_left": 0,
        "best": content.best,
        "by": CRITERIA[content.by][0],
        "rows": content.rows,
        "pictures": [(name, picture) for name, picture in pictures if picture is not None],
        "data": list(_flat(content.data)),
        "reproducibility": list(_flat(content.reproducibility)),
        "version": __version__,
    }


# --- the report of an update ---------------------------------------------------------------------

REFUSED = ("rejected", "quarantined")


@dataclass(frozen=True)
class UpdateInput:
    """All that the report of an update shows.

    Parameters
    ----------
    title
        Name of the run or model.
    model
        The model as it is after the update. Of its ledger, the last `MAX_HISTORY` batches up to
        those of the run become a picture.
    batches
        What became of each batch of the run, in their order.
    waiting
        What was left for the next update: names, and why.
    advice
        What a reader may want to do next: commands, and what each is for.
    created
        When the update ended.
    """

    title: str
    model: Snapshot
    batches: Sequence[Learned]
    waiting: Sequence[tuple[str, str]] = ()
    advice: Sequence[tuple[str, str]] = ()
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def history(self) -> list[Event]:
        """The last batches of the ledger that were scored, none later than those of the run."""
        until = max((done.event.time for done in self.batches), default="")
        scored = [
            event
            for event in self.model.batches.values()
            if event.scores.get("prequential") is not None and event.time <= until
        ]
        return scored[-MAX_HISTORY:]


def write_update_report(path: str | Path, content: UpdateInput) -> Path:
    """Write the report of an update, as `write_report` does that of a fit."""
    return _write(Path(path), render_update_report(content))


def render_update_report(content: UpdateInput) -> str:
    """The report of an update as the text of one HTML page, of a size that does not grow."""
    return _render("update.html.j2", _update_page(content))


def scores_png(content: UpdateInput) -> bytes | None:
    """The picture of the last batches' scores as a PNG on white; None where none was scored."""
    history = content.history
    if not history:
        return None
    with _figure(7.0, 3.0) as (figure, axes):
        _draw_scores(axes, history, {done.event.id for done in content.batches})
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=96, facecolor="white")
        return buffer.getvalue()


def _draw_scores(axes: Axes, history: Sequence[Event], mine: set[str]) -> tuple[int, int]:
    """Prequential scores batch by batch with their bands; returns how many lie below and above."""
    x = np.arange(len(history))
    y = np.array([event.scores["prequential"] for event in history], np.float64)
    band = np.array([event.scores.get("band") or (np.nan, np.nan) for event in history], np.float64)
    known = band[np.isfinite(band)]
    core = known if len(known) else y
    low, high = float(core.min()), float(core.max())
    span = (high - low) or 1.0
    # One batch of nonsense would make all others look alike: it is drawn at the edge.
    near = y[(y >= low - 0.75 * span) & (y <= high + 0.75 * span)]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * ((high - low) or 1.0)
    axes.set_ylim(low - margin, high + margin)
    below, above = y < low, y > high
    shown = np.clip(y, low, high)
    axes.fill_between(
        np.repeat(x, 2) + np.tile([-0.5, 0.5], len(x)),
        *np.repeat(band, 2, axis=0).T,
        color=PALETTE[5],
        alpha=0.18,
        lw=0,
        label="usual band",
    )
    status = np.array([event.status for event in history])
    outside = np.array([bool(event.scores.get("outside")) for event in history])
    here = np.array([event.id in mine for event in history])
    learned, refused = status == "learned", np.isin(status, REFUSED)
    groups = [
        (learned, "o", PALETTE[0], "learned"),
        (refused, "X", DRAWN, "refused"),
        (~learned & ~refused, "s", REAL, "not counted"),
    ]
    for chosen, marker, colour, label in groups:
        if chosen.any():
            sizes = np.where(here[chosen], 30, 11)
            axes.scatter(
                x[chosen], shown[chosen], s=sizes, marker=marker, color=colour, lw=0, label=label
            )
    if outside.any():
        axes.scatter(
            x[outside], shown[outside], s=72, marker="o", facecolors="none",
            edgecolors=PALETTE[1], lw=1.2, label="outside the band",
        )  # fmt: skip
    for beyond, marker, shift in ((below, "v", -0.6), (above, "^", 0.6)):
        if beyond.any():
            edge = shown[beyond] + shift * margin
            axes.scatter(x[beyond], edge, s=20, marker=marker, color=DRAWN, lw=0)
    axes.set_xlim(-0.8, len(x) - 0.2)
    ticks = np.unique(np.linspace(0, len(x) - 1, min(len(x), 6)).round().astype(int))
    axes.set_xticks(ticks, [_one_line(history[i].name, 14) for i in ticks])
    axes.set_ylabel("nats a row")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(visible=True, axis="y", alpha=0.2)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, framealpha=0, fontsize=8)
    return int(below.sum()), int(above.sum())


def _scores_picture(content: UpdateInput) -> Picture | None:
    history = content.history
    if not history:
        return None
    mine = {done.event.id for done in content.batches}
    with _figure(6.4, 3.1) as (figure, axes):
        below, above = _draw_scores(axes, history, mine)
        n = len(history)
        caption = (
            f"Mean log-likelihood of the last {n} scored {'batches' if n > 1 else 'batch'}, each "
            "before it was learned; large marks are of this run. The band is what was usual when a "
            "batch came; a ring marks a score outside of it."
        )
        caption += " Refused batches, and those that no longer count, are not in the model."
        if below or above:
            caption += f" Beyond the view: {below + above}, drawn at its edge."
        alt = (
            f"Scores of {n} batches, the last {number(history[-1].scores['prequential'])} nats a "
            "row."
        )
        return Picture(_svg(figure), alt, caption)


def _status(done: Learned) -> str:
    status = done.event.status.replace("_", " ")
    return status if done.fresh else f"{status} before"


def _happened(done: Learned) -> list[str]:
    """What is to be said of a batch besides its drift: levels, births, retirements, names."""
    drift = done.drift.flags if done.drift is not None else ()
    prefix = f"{done.event.name}: "
    return [flag.removeprefix(prefix) for flag in done.event.flags if flag not in drift]


def _update_batches(batches: Sequence[Learned]) -> dict[str, Any]:
    # A stable sort: the refused first, and the newest of the others, in their order.
    last = [*batches][::-1]
    chosen = sorted(last, key=lambda done: done.event.status not in REFUSED)[:MAX_BATCHES]
    kept = {id(done) for done in chosen}
    rows = []
    for done in batches:
        if id(done) not in kept:
            continue
        event, scores = done.event, done.event.scores
        prefix = f"{event.name}: "
        told = [line.removeprefix(prefix) for line in (event.reason, *event.flags) if line]
        rows.append(
            {
                "name": _one_line(event.name, 80),
                "status": _status(done),
                "refused": event.status in REFUSED,
                "n_rows": event.n_rows,
                "band": scores.get("band"),
                "outside": bool(scores.get("outside")),
                **{key: scores.get(key) for key in ("prequential", "champion", "candidate")},
                "version": event.version,
                "told": [_one_line(line, MAX_TEXT) for line in told[:MAX_TOLD]],
                "n_told_left": max(0, len(told) - MAX_TOLD),
            }
        )
    return {"rows": rows, "n_left": len(batches) - len(rows)}


def _update_drift(content: UpdateInput) -> dict[str, Any]:
    """Each column at its worst over the batches of the run."""
    from genstream.drift import Reference, Thresholds

    drifts = [done.drift for done in content.batches if done.drift is not None]
    compared = content.model.reference()
    known = Reference.from_json(compared).columns if compared is not None else ()
    usual = {column.name: column.missing for column in known}
    by_column: dict[str, dict[str, Any]] = {}
    for drift in drifts:
        for column in drift.columns:
            row = by_column.setdefault(
                column.name,
                {
                    "name": column.name,
                    "psi": -1.0,
                    "n_shifted": 0,
                    "missing": 0.0,
                    "usual": usual.get(column.name),
                },
            )
            row["n_shifted"] += column.level != "none"
            row["missing"] = max(row["missing"], column.missing)
            if column.psi > row["psi"]:
                row |= {
                    "psi": column.psi,
                    "level": column.level,
                    "batch": _one_line(drift.name, 40),
                    "least": column.least,
                    "median": column.median,
                    "most": column.most,
                }
    worst = sorted(by_column.values(), key=lambda row: (-row["psi"], -row["missing"], row["name"]))
    limits = Thresholds()
    return {
        "rows": worst[:MAX_COLUMNS],
        "n_left": max(0, len(worst) - MAX_COLUMNS),
        "n_batches": len(drifts),
        "moderate": limits.moderate,
        "strong": limits.strong,
    }


def _update_versions(model: Snapshot) -> tuple[list[dict[str, Any]], int]:
    """The newest versions, and the champion wherever it is."""
    chosen = [*model.versions[-MAX_VERSIONS:]]
    if all(version.number != model.champion for version in chosen):
        chosen = [model.version(), *chosen[1:]]
    rows = [
        {
            "number": version.number,
            "champion": version.number == model.champion,
            "live": model.live(version.number),
            "time": version.time[:16].replace("T", " "),
            "held_out": (version.record.get("held_out") or {}).get("mean_loglik"),
            "rows": version.record.get("rows"),
            "learned": _one_line(
                (version.record.get("batch") or {}).get("name")
                or f"fit {version.record.get('run') or ''}".strip(),
                80,
            ),
        }
        for version in reversed(chosen)
    ]
    return rows, len(model.versions) - len(rows)


def _update_headline(content: UpdateInput) -> list[tuple[str, str, str]]:
    fresh = [done for done in content.batches if done.fresh]
    learned = [done.event for done in fresh if done.event.status == "learned"]
    refused = sum(done.event.status in REFUSED for done in fresh)
    rows = sum(event.n_rows for event in learned)
    cards = [("batches learned", f"{len(learned)} of {len(fresh)}", f"{rows:,} rows")]
    if refused:
        cards.append(("batches refused", str(refused), "the model is as it was without them"))
    scored = [done.drift for done in content.batches if done.drift is not None]
    if scored:
        last = scored[-1]
        low, high = (number(end) for end in last.band)
        where = "outside" if last.outside else "within"
        value = with_error(last.mean_loglik, last.standard_error)
        cards.append(("last score", value, f"nats a row, {where} {low} to {high}"))
    version = content.model.version()
    held_out = (version.record.get("held_out") or {}).get("mean_loglik")
    cards.append(
        ("version in use", str(version.number), f"held out {number(held_out, 5)} nats a row")
    )
    return cards


def _update_page(content: UpdateInput) -> dict[str, Any]:
    """What the template of an update shows."""
    model, batches = content.model, content.batches
    counts: dict[str, int] = {}
    for event in model.batches.values():
        counts[event.status] = counts.get(event.status, 0) + 1
    told = ", ".join(f"{n:,} {status.replace('_', ' ')}" for status, n in counts.items())
    found = []
    for done in sorted(batches, key=lambda done: done.event.status not in REFUSED):
        event = done.event
        lines = [
            f"{_status(done)}: {event.reason}" if event.status in REFUSED else "",
            *event.flags,
        ]
        prefix = f"{event.name}: "
        found += [
            _one_line(prefix + line.replace(prefix, "", 1), MAX_TEXT) for line in lines if line
        ]
    events = [(done.event.name, line) for done in batches for line in _happened(done)]
    shown = [(_one_line(name, 80), _one_line(line, MAX_TEXT)) for name, line in events]
    versions, n_versions_left = _update_versions(model)
    waiting = [(_one_line(name, 80), _one_line(why, MAX_TEXT)) for name, why in content.waiting]
    return {
        "title": content.title,
        "what": "Report of an update",
        "created": content.created.strftime("%Y-%m-%d %H:%M %Z"),
        "headline": _update_headline(content),
        "warnings": found[:MAX_WARNINGS],
        "n_warnings_left": max(0, len(found) - MAX_WARNINGS),
        "batches": _update_batches(batches),
        "waiting": waiting[:MAX_WAITING],
        "n_waiting_left": max(0, len(waiting) - MAX_WAITING),
        "picture": _scores_picture(content),
        "drift": _update_drift(content),
        "events": shown[:MAX_EVENTS],
        "n_events_left": max(0, len(shown) - MAX_EVENTS),
        "versions": versions,
        "n_versions_left": n_versions_left,
        "ledger": f"The model's ledger has {sum(counts.values()):,} batches: {told}.",
        "advice": [*content.advice][:MAX_EVENTS],
        "version": __version__,
    }
