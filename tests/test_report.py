"""The report: one safe offline page, whatever the story, the columns and their names."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genstream.drift import ColumnDrift, Drift
from genstream.errors import StorageError
from genstream.evaluate import PredictiveCheck, held_out, predictive_check, sample_rows
from genstream.families.columns import ColumnsParams
from genstream.families.gaussian import FullParams, TiedParams
from genstream.learn import BatchEM, FitState, Outcome, StepInfo, fit
from genstream.models import Event, ModelStore, Snapshot, Status
from genstream.passes import Passes
from genstream.report import (
    MAX_BATCHES,
    MAX_CHECKS,
    MAX_COMPONENTS,
    MAX_HISTORY,
    Portrait,
    ReportInput,
    UpdateInput,
    component_colours,
    number,
    percent,
    render_report,
    render_update_report,
    scores_png,
    with_error,
    write_report,
)
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource, Split
from genstream.start import warm_start
from genstream.stories import mixture
from genstream.story import Params, Story
from genstream.updates import Learned

NASTY = ("<b>bold</b>", "$x_1$ & \\alpha^", '"><script>alert(1)</script>', "naïve 列 {{ 7 * 7 }}")


class Page(HTMLParser):
    """What a browser makes of a page: elements, attributes, text."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n\t]+", " ", " ".join(self.words)).strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def content_of(
    story: Story, params: Params, *, n: int = 600, gaps: float = 0.0, **changes: Any
) -> ReportInput:
    """A report of given parameters on rows drawn from them."""
    rng = np.random.default_rng(0)
    x = story.draw(params, n, rng).values
    x[rng.random(x.shape) < gaps] = np.nan
    source = NumpySource(x, story.schema)
    passes = Passes(source, scheduler="synchronous")
    trace = tuple(StepInfo(i + 1, -1000.0 + 10 * i, -3.0, float(n), n, 0, 0.1) for i in range(5))
    score = held_out(story, params, passes)
    content = ReportInput(
        "a fit",
        story,
        FitState(params, step=5, trace=trace, outcome=Outcome.CONVERGED),
        {"Source": "rows.csv"},
        score,
        score,
        predictive_check(story, params, source, rng),
        sample_rows(source, 500, rng),
        {"seed": 42, "versions": {"numpy": np.__version__}},
        created=datetime(2026, 11, 23, 2, 15, tzinfo=UTC),
    )
    return replace(content, **changes)


def gaussians(
    n_components: int, names: list[str] | int, tied: bool = False
) -> tuple[Story, Params]:
    schema = Schema.real(names)
    d = schema.n_features
    rng = np.random.default_rng(1)
    story = mixture(schema, n_components, covariance="tied" if tied else "full")
    mean = rng.normal(size=(n_components, d)) * 5
    weights = rng.dirichlet(np.full(n_components, 5.0))
    if tied:
        return story, Params(weights, TiedParams(mean, np.eye(d)))
    return story, Params(weights, FullParams(mean, np.tile(np.eye(d), (n_components, 1, 1))))


def columns(kinds: dict[str, str], n_components: int = 3) -> tuple[Story, Params]:
    """Independent columns by name and kind; categorical ones have four levels."""
    levels = ("a<1", "b&2", "$c$", "d")
    schema = Schema(
        tuple(
            Column(name, kind, levels if kind == "categorical" else (), "")  # type: ignore[arg-type]
            for name, kind in kinds.items()
        )
    )
    rng = np.random.default_rng(2)
    of = {kind: len(schema.of_kind(kind)) for kind in ("real", "binary", "count", "categorical")}  # type: ignore[arg-type]
    k = n_components
    params = Params(
        np.full(k, 1 / k),
        ColumnsParams(
            mean=rng.normal(size=(k, of["real"])) * 4,
            variance=np.ones((k, of["real"])),
            probability=rng.random((k, of["binary"])),
            rate=rng.gamma(3.0, 2.0, (k, of["count"])),
            level_probability=rng.dirichlet(np.ones(4), (k, of["categorical"])).reshape(k, -1),
        ),
    )
    return mixture(schema, k, covariance="diag"), params


@pytest.fixture(scope="module")
def fitted() -> ReportInput:
    """A real fit to mixed rows with gaps, held out rows and all."""
    story, truth = columns(
        {"delay": "real", "late": "binary", "seats": "count", "from": "categorical"}
    )
    rng = np.random.default_rng(3)
    x = story.draw(truth, 3000, rng).values
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:5] = np.nan
    source = NumpySource(x, story.schema, chunk_rows=500)
    train = Passes(Split(source, "train", 0.1, 1), scheduler="synchronous")
    test = Passes(Split(source, "test", 0.1, 1), scheduler="synchronous")
    story, state = warm_start(story, train, n_init=2, seed=1)
    state = fit(story, BatchEM(max_steps=8, tolerance=0.0), train, state)
    return ReportInput(
        "mixed rows",
        story,
        state,
        {"Source": "mixed.parquet"},
        held_out(story, state.params, train),
        held_out(story, state.params, test),
        predictive_check(story, state.params, train.source, rng),
        sample_rows(train.source, 1000, rng),
        {"seed": 1, "data": train.source.identity()},
        created=datetime(2026, 11, 23, 2, 15, tzinfo=UTC),
    )


def test_a_fit_is_reported_in_full(fitted: ReportInput) -> None:
    page = Page(render_report(fitted))
    assert not page.open
    assert page.all("title") == [{}]
    for words in (
        "mixed rows",
        "mixed.parquet",
        "3 components over independent columns",
        "Held-out rows are explained",
        "drawn rows against",
        "4 columns have gaps",
        "BIC",
        "± ",
        "delay",
        "a<1",
        "2026-11-23 02:15 UTC",
    ):
        assert words in page.text, words
    assert fitted.train is not None
    assert with_error(fitted.train.mean_loglik, fitted.train.standard_error) in page.text
    assert percent(fitted.train.missing["delay"]) in page.text
    assert fitted.train.n_unobserved + fitted.test.n_unobserved >= 5  # type: ignore[union-attr]
    assert "nothing observed" in page.text
    for weight in fitted.state.params.weights:
        assert percent(float(weight)) in page.text
    # Trace, assignments and one figure a column.
    assert len(page.all("svg")) == 2 + 4


def test_the_page_needs_no_network(fitted: ReportInput) -> None:
    html = render_report(fitted)
    assert "http" not in html.replace("http-equiv", "")
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", html)
    page = Page(html)
    for tag in ("script", "link", "iframe", "object", "embed"):
        assert not page.all(tag)
    policy = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for _, attributes in page.elements:
        for name in ("href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


def test_figures_speak_and_links_lead_somewhere(fitted: ReportInput) -> None:
    page = Page(render_report(fitted))
    images = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(images) == len(page.all("svg"))
    assert all(len(a["aria-label"] or "") > 20 for a in images)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for attributes in (a for _, a in page.elements if (a.get("href") or "").startswith("#")):
        assert (attributes["href"] or "")[1:] in ids
    html = render_report(fitted)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_the_same_fit_gives_the_same_page(fitted: ReportInput) -> None:
    assert render_report(fitted) == render_report(pickle.loads(pickle.dumps(fitted)))


@pytest.mark.parametrize("kind", ["full", "columns"])
def test_names_are_shown_as_they_are_and_run_nothing(kind: str) -> None:
    if kind == "full":
        story, params = gaussians(2, list(NASTY))
    else:
        kinds = dict(zip(NASTY, ("categorical", "real", "count", "categorical"), strict=True))
        story, params = columns(kinds)
    content = content_of(
        story,
        params,
        gaps=0.1,
        title=NASTY[0],
        data={NASTY[1]: NASTY[2]},
        reproducibility={NASTY[2]: [NASTY[0]]},
        notes=NASTY,
    )
    html = render_report(content)
    page = Page(html)
    assert not page.open
    assert not page.all("script")
    assert not page.all("b")
    for name in NASTY:
        assert name in page.text
    assert "49" not in re.findall(r"naïve 列 (\S+)", page.text)


def test_many_components_and_columns_stay_a_small_page() -> None:
    rng = np.random.default_rng(0)
    schema = Schema.real(784)
    story = mixture(schema, 500, covariance="diag")
    empty = np.empty((500, 0))
    family = ColumnsParams(
        mean=rng.normal(size=(500, 784)),
        variance=np.ones((500, 784)),
        probability=empty,
        rate=empty,
        level_probability=empty,
    )
    content = content_of(story, Params(np.full(500, 0.002), family), n=800)
    html = render_report(content)
    assert len(html) < 3_000_000
    text = Page(html).text
    assert f"{500 - MAX_COMPONENTS} lighter components, 96.0\u00a0% of the weight" in text
    assert f"{784 - MAX_CHECKS} columns with smaller distances are left out" in text
    assert "772 columns in which the components differ less are left out" in text


@pytest.mark.parametrize(
    "kinds",
    [
        {"only": "real"},
        {"only": "count"},
        {"only": "categorical"},
        {"only": "binary"},
        {"a": "categorical", "b": "binary"},
        {"a": "categorical", "b": "real"},
        {"a": "count", "b": "count", "c": "binary"},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_components", [1, 3])
def test_columns_of_any_kind_have_a_picture(kinds: dict[str, str], n_components: int) -> None:
    story, params = columns(kinds, n_components)
    page = Page(render_report(content_of(story, params, gaps=0.05)))
    assert len(page.all("svg")) == 2 + len(kinds)
    assert not page.open


def test_a_report_does_without_what_is_not_there() -> None:
    story, params = gaussians(2, 3, tied=True)
    bare = ReportInput("bare", story, FitState(params))
    page = Page(render_report(bare))
    assert "Gaps were not counted" in page.text
    assert "the fit has not ended" in page.text
    assert not page.all("svg")


def test_columns_never_observed_and_constant_columns_are_reported() -> None:
    story, params = gaussians(2, 3)
    x = story.draw(params, 400, np.random.default_rng(0)).values
    x[:, 1] = np.nan
    x[:, 2] = 7.0
    source = NumpySource(x, story.schema)
    rng = np.random.default_rng(0)
    content = content_of(
        story,
        params,
        check=predictive_check(story, params, source, rng),
        sample=sample_rows(source, 100, rng),
        train=held_out(story, params, Passes(source, scheduler="synchronous")),
        test=None,
    )
    text = Page(render_report(content)).text
    assert "no sampled row has a value in x1" in text
    assert "drawn rows differ from real rows in x2" in text


def test_what_went_wrong_stands_first() -> None:
    story, params = gaussians(2, 2)
    state = FitState(
        params,
        step=2,
        outcome=Outcome.MAX_STEPS,
        trace=tuple(
            StepInfo(i, -10.0 + i, 0.0, 5.0, 5, 0, 0.1, ("component 1 was empty: re-seeded",))
            for i in range(1, 40)
        ),
    )
    content = content_of(story, params, state=state, notes=["a note"], check=None, sample=None)
    page = Page(render_report(content))
    assert page.text.index("Worth knowing") < page.text.index("What was fitted, and on what")
    assert Outcome.MAX_STEPS.advice in page.text
    assert "step 3: component 1 was empty" in page.text
    assert "more like these" in page.text
    assert "component re-seeded" in page.text
    assert "27 earlier steps are left out" in page.text


def test_a_trace_that_is_not_finite_still_gives_a_page() -> None:
    story, params = gaussians(2, 2)
    trace = (
        StepInfo(1, -10.0, 0.0, 5.0, 5, 0, 0.1),
        StepInfo(2, -9.0, 0.0, 5.0, 5, 0, 0.1),
        StepInfo(3, float("nan"), 0.0, 5.0, 5, 0, 0.1),
    )
    state = FitState(params, step=3, outcome=Outcome.NONFINITE, trace=trace)
    text = Page(render_report(content_of(story, params, state=state))).text
    assert Outcome.NONFINITE.advice in text


def test_overfitting_is_said_in_words() -> None:
    story, params = gaussians(2, 2)
    content = content_of(story, params)
    assert content.test is not None
    worse = replace(content.test, mean_loglik=content.test.mean_loglik - 3)
    text = Page(render_report(replace(content, test=worse))).text
    assert "explained worse than the rows of the fit, by 3.0" in text
    better = replace(content.test, mean_loglik=content.test.mean_loglik + 3)
    text = Page(render_report(replace(content, test=better))).text
    assert "explained better than the rows of the fit" in text


# --- what the components say ---------------------------------------------------------------------


def test_portrait_has_the_moments_of_drawn_rows() -> None:
    story, params = columns({"r": "real", "b": "binary", "c": "count", "l": "categorical"})
    portrait = Portrait.of(story, params)
    drawn = story.draw(params, 200_000, np.random.default_rng(0))
    for j in (0, 2):
        x = drawn.values[:, j]
        assert portrait.overall[j] == pytest.approx(x.mean(), abs=0.05)
        assert portrait.spread[j] == pytest.approx(x.std(), rel=0.02)
        means = np.array([x[drawn.component == k].mean() for k in range(3)])
        between = np.average((means - x.mean()) ** 2, weights=np.bincount(drawn.component))
        assert portrait.separation[j] == pytest.approx(between / x.var(), abs=0.02)
    late = drawn.values[:, 1]
    means = np.array([late[drawn.component == k].mean() for k in range(3)])
    assert portrait.separation[1] == pytest.approx(means.var() / late.var(), abs=0.02)
    np.testing.assert_allclose(portrait.levels[3].sum(axis=1), 1)


def test_portraits_of_one_story_in_two_families_agree() -> None:
    story, params = gaussians(3, 2)
    family: Any = params.family
    empty = np.empty((3, 0))
    columns_params = ColumnsParams(family.mean, np.ones((3, 2)), empty, empty, empty)
    a = Portrait.of(story, params)
    b = Portrait.of(
        mixture(story.schema, 3, covariance="diag"), replace(params, family=columns_params)
    )
    np.testing.assert_allclose(a.separation, b.separation)
    np.testing.assert_allclose(a.sd, b.sd)
    assert a.covariance is not None
    assert b.covariance is None
    np.testing.assert_allclose(a.covariance(1), np.eye(2))


def test_signature_names_what_sets_a_component_apart() -> None:
    schema = Schema(
        (
            Column("delay", "real", unit="min"),
            Column("same", "real"),
            Column("carrier", "categorical", ("AA", "UA")),
        )
    )
    empty = np.empty((2, 0))
    params = Params(
        np.array([0.5, 0.5]),
        ColumnsParams(
            mean=np.array([[0.0, 1.0], [60.0, 1.0]]),
            variance=np.ones((2, 2)),
            probability=empty,
            rate=empty,
            level_probability=np.array([[0.9, 0.1], [0.2, 0.8]]),
        ),
    )
    portrait = Portrait.of(mixture(schema, 2), params)
    assert portrait.signature(1) == [
        "high delay 60 min",
        "carrier UA 80.0\u00a0% (overall 45.0\u00a0%)",
    ]
    assert portrait.most_telling(2) == [0, 2]
    assert portrait.top_levels(0, 2) == [("AA", 0.9), ("UA", 0.1)]


@pytest.mark.parametrize("n_components", [1, 8, 9, 500])
def test_components_have_colours_of_their_own(n_components: int) -> None:
    colours = component_colours(n_components)
    assert colours.shape == (n_components, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    assert len(np.unique(colours, axis=0)) == n_components


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (1234567.0, "1,234,567"),
        (-0.05, "−0.05"),
        (12.3456, "12.35"),
        (3.0, "3"),
        (1200.0, "1,200"),
        (1e-12, "1.000e−12"),
        (6.02e23, "6.020e+23"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_numbers_read_as_people_write_them(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    "share, text",
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50.0 %"),
        (1e-9, "< 0.1 %"),
        (0.99999, "> 99.9 %"),
        (float("nan"), "–"),
    ],
)
def test_shares_never_read_as_nothing_when_they_are_something(share: float, text: str) -> None:
    assert percent(share).replace("\u00a0", " ") == text


def test_a_figure_has_the_decimals_its_error_allows() -> None:
    assert with_error(-28.37017, 0.0224) == "−28.370"
    assert with_error(1234.567, 31.0) == "1,235"
    assert with_error(0.25, 0.0) == "0.25"


# --- the file ------------------------------------------------------------------------------------


def test_a_report_replaces_the_last_one_whole(fitted: ReportInput, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "report.html"
    assert write_report(path, fitted) == path
    first = path.read_text(encoding="utf-8")
    assert first == render_report(fitted)
    write_report(path, replace(fitted, title="again"))
    assert "<title>again</title>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_names_the_place(
    fitted: ReportInput, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        write_report(tmp_path / "file" / "report.html", fitted)


def test_a_failed_write_leaves_the_last_report(
    fitted: ReportInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(tmp_path / "report.html", fitted)
    before = path.read_text(encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report(path, replace(fitted, title="never"))
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_check_of_a_story_with_one_column_has_no_pairs() -> None:
    story, params = columns({"only": "real"})
    content = content_of(story, params)
    assert isinstance(content.check, PredictiveCheck)
    assert "Correlations" not in Page(render_report(content)).text


def test_the_picture_shows_columns_that_add_something() -> None:
    """Not a copy of the first column, nor one in which a few far rows make the difference."""
    story, params = gaussians(3, ["first", "copy", "second", "far"])
    mean = np.array(
        [[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0], [4.5, 4.5, 5.0, 900.0]],
    )
    covariance = np.tile(np.eye(4), (3, 1, 1))
    covariance[:, 0, 1] = covariance[:, 1, 0] = 0.999
    params = Params(np.array([0.485, 0.5, 0.015]), FullParams(mean, covariance))
    content = content_of(story, params, n=2000, gaps=0.05)
    labels = [
        attributes["aria-label"] or ""
        for _, attributes in Page(render_report(content)).elements
        if "Scatter" in (attributes.get("aria-label") or "")
    ]
    assert len(labels) == 1
    shown = labels[0].split("rows on ")[1].split(", coloured")[0].split(" and ")
    assert len({"first", "copy"} & set(shown)) == 1
    assert "far" not in shown
    assert "Rows with a gap there, not shown" in render_report(content)


# --- the report of an update ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A model with one version, whose ledger the tests make longer."""
    story, params = gaussians(2, ["a", NASTY[0]])
    rows = story.draw(params, 300, np.random.default_rng(0))
    state = FitState(params, sample=Rows.of(rows.values))
    store = ModelStore(tmp_path_factory.mktemp("model"))
    store.publish(story, state, {"run": "first", "rows": 300})
    return store.snapshot()


def judged(
    i: int, status: Status = "learned", score: float = -5.0, name: str = "", **changes: Any
) -> Learned:
    """What became of batch `i`, with drift in two columns."""
    name = name or f"day{i}.csv"
    band = (-6.0, -4.0)
    drift = Drift(
        name, 100, 0, score, 0.1, band, not -6 <= score <= -4, 0.01, 0.01,
        (
            ColumnDrift("a", 0.01 * i, "none", 0.02, 0.5, -1.0, 2.0),
            ColumnDrift(NASTY[0], 0.4, "strong", 0.5, None, None, None),
        ),
        (f"{name}: it shifted",),
    )  # fmt: skip
    event = Event(
        f"{i:064x}",
        name,
        status,
        f"2026-11-25T{i // 3600:02d}:{i // 60 % 60:02d}:{i % 60:02d}.000+00:00",
        100,
        1 if status == "learned" else None,
        "it would harm" if status == "rejected" else "",
        scores={
            "prequential": score,
            "band": list(band),
            "outside": drift.outside,
            "champion": -5.0,
            "candidate": -5.5,
        },
        flags=(*drift.flags, "component 2 was born from 30 badly explained rows"),
    )
    return Learned(replace(event, **changes), drift)


def told(living: Snapshot, ledger: list[Learned], batches: list[Learned]) -> UpdateInput:
    """A report of some batches of a ledger."""
    there = replace(living)
    there.__dict__["batches"] = {done.event.id: done.event for done in ledger}
    return UpdateInput("lives", there, batches, created=datetime(2026, 11, 25, tzinfo=UTC))


def test_an_update_says_what_became_of_each_batch(living: Snapshot) -> None:
    batches = [judged(1), judged(2, "rejected", -7.0), judged(3)]
    page = Page(render_update_report(told(living, batches, batches)))
    text = page.text
    assert "2 of 3" in text
    assert "rejected: it would harm" in text
    assert "outside −6 to −4" not in text  # the last one is within
    assert "within −6 to −4" in text
    assert "component 2 was born from 30 badly explained rows" in text
    assert "3 batches: 2 learned, 1 rejected" in text
    assert text.index(NASTY[0]) < text.rindex("0 of 3")  # the column furthest off comes first
    assert len(page.all("svg")) == 1
    assert not page.all("script")
    assert page.open == []


def test_names_of_batches_run_nothing(living: Snapshot) -> None:
    batches = [judged(i, "rejected", name=name) for i, name in enumerate(NASTY)]
    content = replace(
        told(living, batches, batches),
        waiting=[(NASTY[2], NASTY[0])],
        advice=[(f"genstream update {NASTY[2]}", NASTY[0])],
    )
    page = Page(render_update_report(content))
    assert not page.all("script")
    assert not page.all("b")
    for name in NASTY:
        assert name in page.text


def test_the_page_of_an_update_does_not_grow_with_history(living: Snapshot) -> None:
    def size(n: int) -> int:
        ledger = [judged(i, score=-5.0 + 0.5 * np.sin(i)) for i in range(n)]
        return len(render_update_report(told(living, ledger, ledger)))

    small = size(MAX_HISTORY)
    assert size(4 * MAX_HISTORY) < 1.1 * small
    many = [judged(i) for i in range(3 * MAX_BATCHES)]
    # A refused one is shown however early it came.
    many[0] = judged(0, "rejected")
    text = Page(render_update_report(told(living, many, many))).text
    assert "rejected: it would harm" in text
    assert "day0.csv" in text
    assert f"{2 * MAX_BATCHES} other batches of this run are left out" in text


def test_a_report_made_again_knows_nothing_of_later_batches(living: Snapshot) -> None:
    ledger = [judged(i) for i in range(1, 20)]
    content = told(living, ledger, ledger[4:6])
    assert [event.name for event in content.history] == [f"day{i}.csv" for i in range(1, 7)]
    assert "last 6 scored batches" in Page(render_update_report(content)).text


def test_one_absurd_score_leaves_the_others_to_be_seen(living: Snapshot) -> None:
    ledger = [judged(i, score=-5.0 + 0.1 * i) for i in range(5)]
    absurd = [*ledger, judged(9, "rejected", -1e12)]
    text = Page(render_update_report(told(living, absurd, absurd[-1:]))).text
    assert "Beyond the view: 1" in text
    ticks = re.findall(r"−\d+\.?\d*", text)
    assert "−5.0" in ticks or "−5" in ticks
    image = scores_png(told(living, absurd, absurd[-1:]))
    assert image is not None
    assert image.startswith(b"\x89PNG")
    assert len(image) < 100_000


def test_an_update_of_nothing_scored_has_no_picture(living: Snapshot) -> None:
    unread = Learned(Event("0" * 64, "day1.csv", "quarantined", "2026", reason="no column 'a'"))
    content = told(living, [unread], [unread])
    page = Page(render_update_report(content))
    assert "no column 'a'" in page.text
    assert page.all("svg") == []
    assert scores_png(content) is None


def test_what_became_of_a_batch_is_kept_as_json() -> None:
    done = judged(1, "rejected")
    assert Learned.from_json({"step": 1, **done.to_json()}) == done
    unread = Learned(Event("0" * 64, "day1.csv", "quarantined"), fresh=False)
    assert Learned.from_json(unread.to_json()) == unread
