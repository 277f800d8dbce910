"""What passes cost beside the work: a chunk's share of it, and storage that is slow.

    python -m benchmarks.input [--chunks N] [--workers W] [--rounds R]

The first figure is a pass over many chunks of one row whose work is nothing. Then come chunks that
take as long to arrive as they take to work on, from storage that sleeps and from storage that does
not: with the next chunk read meanwhile, the former should cost little more than the latter.
`python -m benchmarks run out_of_core` has the ratios of datasets on disk.
"""

from __future__ import annotations

import time
from typing import Any, Self

import numpy as np

from benchmarks.contestants import clock
from benchmarks.measure import parser
from genstream.learn import EStep
from genstream.passes import Passes
from genstream.rows import Rows
from genstream.schema import Schema
from genstream.sources import NumpySource
from genstream.stories import mixture


class Nothing:
    """What a pass comes to that does nothing."""

    def merge(self, other: Self) -> Self:
        """Nothing more."""
        del other
        return self


class Far(NumpySource):
    """An array whose chunks take some seconds each to arrive."""

    seconds = 0.0

    def read(self, i: int) -> Rows:
        """Chunk `i`, late."""
        time.sleep(self.seconds)
        return super().read(i)


def seconds(passes: Passes, work: Any, rounds: int) -> float:
    """The shortest of some passes."""
    return min(clock(lambda: passes.fold(work)) for _ in range(rounds))


def main() -> None:
    """Print both figures."""
    options = parser(__doc__)
    options.add_argument("--chunks", type=int, default=10_000)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    tiny = NumpySource(np.zeros((chosen.chunks, 1)), chunk_rows=1)
    passes = Passes(tiny, workers=chosen.workers)
    alone = seconds(passes, lambda _chunk, _rows: Nothing(), chosen.rounds)
    begin = time.perf_counter()
    for i in range(chosen.chunks):
        tiny.read(i)
    reading = time.perf_counter() - begin
    print(
        f"{chosen.chunks} chunks: {1e6 * alone / chosen.chunks:.1f} us a chunk, "
        f"of which reading it takes {1e6 * reading / chosen.chunks:.1f} us"
    )
    x = np.random.default_rng(0).standard_normal((32 * 16_384, 16))
    story = mixture(Schema.real(16), 16).anchored(Rows.of(x[:10_000]))
    work = EStep(story, story.vague())
    near, far = NumpySource(x, chunk_rows=16_384), Far(x, chunk_rows=16_384)
    at_hand = seconds(Passes(near, workers=chosen.workers), work, chosen.rounds)
    far.seconds = at_hand * chosen.workers / 32
    late = seconds(Passes(far, workers=chosen.workers), work, chosen.rounds)
    print(
        f"at hand {at_hand:.3f} s a pass; {1e3 * far.seconds:.1f} ms away a chunk {late:.3f} s, "
        f"{late / at_hand:.2f} times as long (2 without reading ahead)"
    )


if __name__ == "__main__":
    main()
