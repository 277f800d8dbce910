"""Images of clothes: mixtures of factor analysers beside other densities, drawn and filled in.

    python -m benchmarks.fashion [--rows N] [--components K] [--factors Q] [--steps S] [--figure F]

Fashion-MNIST (Xiao, Rasul & Vollgraf 2017; Debian package `dataset-fashion-mnist`) holds 60,000
training and 10,000 test images of 28 x 28 pixels from 0 to 255. Two kinds of figures:

- Densities of pixels. A density of whole numbers could be made as high as one likes, so that each
  pixel gets noise, uniform on [0, 1), from a fixed seed, in training and test images alike: the
  mean log-density of such data is a lower bound of the log-probability of the images themselves
  (Theis, van den Oord & Bethge 2016, section 3.1). Nats are per image, for pixels on [0, 256).
- Bernoulli mixtures of pixels above 127, first 20,000 training images, all test images, beside the
  reference values -221.7 (K = 10) and -178.9 (K = 50) nats per image.

The figure shows images drawn, and test images of which half is hidden, filled in.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import parser
from genstream.families.factors import FactorsParams
from genstream.learn import BatchEM, FitState, fit
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import NumpySource
from genstream.start import warm_start
from genstream.stories import factors, mixture
from genstream.story import Params, Story

Array = NDArray[Any]

FOLDER = Path("/usr/share/datasets/fashion-mnist")
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "fashion.png"
SIDE = 28
CHUNK_ROWS = 8192
# Columns of the figure, and by how much its pixels are enlarged.
SHOWN, ENLARGED = 14, 2
REFERENCES = {10: -221.7, 50: -178.9}


def images(part: str) -> NDArray[np.uint8]:
    """(n, 784) pixels of the `train` or `t10k` part."""
    with gzip.open(FOLDER / f"{part}-images-idx3-ubyte.gz") as stream:
        content = stream.read()
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, SIDE * SIDE)


def dequantised(pixels: Array, seed: int) -> NDArray[np.float32]:
    """Pixels plus uniform noise on [0, 1): a density of these is one of the whole numbers too."""
    rng = np.random.default_rng(seed)
    return pixels + rng.random(pixels.shape, dtype=np.float32)


def learned(story: Story, passes: Passes, steps: int) -> tuple[Story, FitState, float]:
    """The story and its fit from a short start on a sample, and processor seconds a step."""
    story, state = warm_start(
        story, passes, n_init=1, seed=0, sample_rows=10_000, short_steps=5, long_steps=15
    )
    begin = time.process_time()
    state = fit(story, BatchEM(steps, tolerance=0.05), passes, state)
    return story, state, (time.process_time() - begin) / len(state.trace)


def densities(train: Array, test: Array, chosen: argparse.Namespace) -> dict[str, Any]:
    """Fit every model of pixels and print what it makes of the test images."""
    k, q = chosen.components, chosen.factors
    schema = Schema.real(train.shape[1])
    many = min(train.shape[1] - 1, 200)
    stories: dict[str, Callable[[], Story]] = {
        "diagonal mixture": lambda: mixture(schema, k, covariance="diag", dtype="float32"),
        "one full Gaussian": lambda: mixture(schema, 1, covariance="tied"),
        f"PPCA, q={many}": lambda: factors(
            schema, many, noise="isotropic", statistics="moments", prior=None
        ),
        "mixture of PPCA": lambda: factors(schema, q, k, noise="isotropic", dtype="float32"),
        "mixture of factor analysers": lambda: factors(schema, q, k, dtype="float32"),
    }
    source = NumpySource(train, chunk_rows=CHUNK_ROWS)
    print(f"{len(train)} training and {len(test)} test images, K={k}, q={q}, nats per image")
    print(f"{'':28}{'test':>10}{'bits/pixel':>12}{'train':>10}{'parameters':>12}"
          f"{'passes':>8}{'s/pass':>8}{'CPU s/pass':>12}")  # fmt: skip
    found = {}
    for name, make in stories.items():
        begin = time.perf_counter()
        story, state, processor = learned(
            make(), Passes(source, workers=chosen.workers), chosen.steps
        )
        took = time.perf_counter() - begin
        held_out = float(story.log_prob(state.params, Rows.of(test)).mean())
        seconds = [info.seconds for info in state.trace]
        bits = -held_out / (test.shape[1] * math.log(2))
        print(
            f"{name:28}{held_out:10.1f}{bits:12.3f}{state.trace[-1].mean_loglik:10.1f}"
            f"{story.n_parameters:12,}{len(seconds):8}{np.median(seconds):8.2f}{processor:12.2f}"
            f"   {took:.0f} s in all",
            flush=True,
        )
        found[name] = (story, state.params)
    return found


def bernoulli(train: Array, test: Array, workers: int) -> None:
    """Mixtures of Bernoulli pixels beside the reference values."""
    black = (train[:20_000] > 127).astype(np.float64)
    held_out = (test > 127).astype(np.float64)
    schema = Schema(tuple(Column(f"x{j}", "binary") for j in range(train.shape[1])))
    source = NumpySource(black, schema, chunk_rows=CHUNK_ROWS)
    for k, reference in REFERENCES.items():
        begin = time.perf_counter()
        story, state = warm_start(
            mixture(schema, k), Passes(source, workers=workers), n_init=3, sample_rows=10_000
        )
        learner = BatchEM(200, tolerance=1e-3, accelerate=True)
        state = fit(story, learner, Passes(source, workers=workers), state)
        value = story.log_prob(state.params, Rows.of(held_out)).mean()
        print(
            f"Bernoulli mixture K={k:2}: {value:8.1f} nats per test image, reference {reference}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )


def hidden(n: int, how: str) -> NDArray[np.bool_]:
    """(n, 784) mask of hidden pixels: the `lower` half, or half of them at `random`."""
    if how == "lower":
        return np.tile(np.arange(SIDE * SIDE) >= SIDE * SIDE // 2, (n, 1))
    return np.random.default_rng(3).random((n, SIDE * SIDE)) < 0.5


def fill_in(found: dict[str, Any], test: Array, n: int = 1000) -> None:
    """Print how far filled-in pixels are from the hidden ones."""
    some = test[:n]
    for how in ("lower", "random"):
        mask = hidden(n, how)
        for name, (story, params) in found.items():
            # Where each row has gaps of its own, d x d or 200 x 200 solves a row take minutes.
            if how == "random" and story.n_components == 1:
                continue
            begin = time.perf_counter()
            filled = story.impute(params, Rows.of(np.where(mask, np.nan, some)))
            error = math.sqrt(np.mean((filled - some)[mask] ** 2))
            print(
                f"{how} half hidden, {name:28} RMSE {error:6.2f}, "
                f"{time.perf_counter() - begin:.1f} s for {n} images",
                flush=True,
            )


def draw_figure(story: Story, params: Params, test: Array, target: Path) -> None:
    """Images drawn, and hidden halves filled in, as one PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rng = np.random.default_rng(5)
    draw = story.draw(params, SHOWN, rng)
    theta = params.family
    assert isinstance(theta, FactorsParams)
    assert draw.factors is not None
    smooth = theta.mean[draw.component] + np.einsum(
        "ndq,nq->nd", theta.loadings[draw.component], draw.factors
    )
    some = test[rng.choice(len(test), SHOWN, replace=False)]
    lines = [("drawn", draw.values), ("drawn, without noise", smooth), ("test images", some)]
    for how in ("lower", "random"):
        mask = hidden(SHOWN, how)
        rows = Rows.of(np.where(mask, np.nan, some))
        lines += [
            (f"{how} half hidden", np.where(mask, 255.0 if how == "lower" else 0.0, some)),
            ("filled in: mean", story.impute(params, rows)),
            ("filled in: draw", story.impute(params, rows, rng)),
        ]
    strips = [
        np.clip(line, 0, 255).reshape(-1, SIDE, SIDE).swapaxes(0, 1).reshape(SIDE, -1)
        for _, line in lines
    ]
    picture = np.concatenate(strips)
    height, width = picture.shape
    dpi, margin = 100, 150
    size = ((ENLARGED * width + margin) / dpi, ENLARGED * height / dpi)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=size, dpi=dpi)
        share = margin / (ENLARGED * width + margin)
        axis = figure.add_axes((share, 0.0, 1 - share, 1.0))
        axis.imshow(picture, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        axis.set_axis_off()
        for i, (name, _) in enumerate(lines):
            y = 1 - (i + 0.5) / len(lines)
            figure.text(share * 0.95, y, name, ha="right", va="center")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Software": None})
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Read the options, fit, compare and draw."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=60_000)
    options.add_argument("--components", type=int, default=50)
    options.add_argument("--factors", type=int, default=10)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--figure", type=Path, default=FIGURE)
    chosen = options.parse_args()
    if not FOLDER.is_dir():
        print(f"skipped: {FOLDER} is missing; apt install dataset-fashion-mnist")
        return
    pixels, held_out = images("train"), images("t10k")
    train, test = dequantised(pixels[: chosen.rows], 1), dequantised(held_out, 2)
    found = densities(train, test, chosen)
    story, params = found["mixture of factor analysers"]
    draw_figure(story, params, test, chosen.figure)
    fill_in(found, test)
    bernoulli(pixels, held_out, chosen.workers)


if __name__ == "__main__":
    main()
