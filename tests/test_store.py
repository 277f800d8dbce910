"""Datasets, checkpoints and models at rest: what is read is what was committed, or an error."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from genstream import manifests, models, store
from genstream.errors import ConfigError, ConflictError, CorruptError, DataError, StorageError
from genstream.learn import BatchEM, FitState, Resident, fit
from genstream.online import OnlineEM
from genstream.rows import Rows
from genstream.schema import Column, Schema
from genstream.sources import Split
from genstream.stories import mixture
from genstream.story import Story

REAL = Schema.real(3)


def rows(n: int, seed: int, *, gaps: float = 0.1, weights: bool = False) -> Rows:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, 3))
    values[rng.random(values.shape) < gaps] = np.nan
    return Rows.of(values, rng.random(n) if weights else None)


def append(path: Path, n: int, seed: int, **options: object) -> tuple:
    pieces = options.pop("pieces", None) or [rows(n // 2, seed), rows(n - n // 2, seed + 1)]
    return store.append_batch(path, f"part-{seed}", pieces, lambda: REAL, **options)


def contents(dataset: store.Dataset) -> np.ndarray:
    source = dataset.source()
    return np.concatenate([source.read(i).filled() for i in range(len(source.chunk_rows))])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genstream.segments.CHUNK_NBYTES", 100 * 3 * 8)
    monkeypatch.setattr("genstream.segments.LEAST_ROWS", 1)
    monkeypatch.setattr("genstream.segments.SEGMENT_CHUNKS", 4)


# --- datasets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 399, 400, 401, 1234])
@pytest.mark.usefixtures("small_chunks")
def test_rows_come_back_as_they_were(tmp_path: Path, n: int) -> None:
    pieces = [rows(n, 0)[i : i + 37] for i in range(0, n, 37)]
    dataset, batch = append(tmp_path / "d", n, 0, pieces=pieces)
    assert batch is not None
    assert batch.n_rows == n == dataset.n_rows
    again = store.Dataset.open(tmp_path / "d")
    np.testing.assert_array_equal(contents(again), rows(n, 0).filled())
    assert again.schema == REAL
    assert max(again.source().chunk_rows) <= 100


@pytest.mark.usefixtures("small_chunks")
def test_a_segment_is_plain_zarr(tmp_path: Path) -> None:
    append(tmp_path / "d", 250, 0, pieces=[rows(250, 0)])
    (group,) = (tmp_path / "d" / "segments").glob("*.zarr")
    array = zarr.open_group(str(group), mode="r")["values"]
    assert isinstance(array, zarr.Array)
    assert array.metadata.dimension_names == ("row", "feature")
    np.testing.assert_array_equal(np.asarray(array[...]), rows(250, 0).filled())


def test_weights_and_ids_are_carried(tmp_path: Path) -> None:
    first = rows(50, 0, weights=True)
    dataset, _ = append(
        tmp_path / "d", 50, 0, pieces=[(first, [f"r{i}" for i in range(50)])], weighted=True
    )
    source = dataset.source()
    np.testing.assert_array_equal(source.read(0).weights, first.weights)
    assert source.ids(0) == [f"r{i}" for i in range(50)]


def test_float32_is_kept_and_its_limit_is_named(tmp_path: Path) -> None:
    values = np.array([[1.5, 2.0, 1e300]])
    with pytest.raises(DataError, match=r"row 0, column 2.*float32"):
        append(tmp_path / "d", 1, 0, pieces=[Rows.of(values / 1e160)], dtype="float32")
    assert not list((tmp_path / "d").rglob("*.json"))


def test_the_same_bytes_are_a_duplicate(tmp_path: Path) -> None:
    _, first = append(tmp_path / "d", 40, 0)
    dataset, again = append(tmp_path / "d", 40, 0)
    assert first is not None
    assert again is None
    assert dataset.n_rows == 40
    assert len(list((tmp_path / "d" / "segments").glob("*.json"))) == 1


def test_a_failing_batch_leaves_nothing(tmp_path: Path) -> None:
    append(tmp_path / "d", 40, 0)
    before = sorted(p for p in (tmp_path / "d").rglob("*") if p.is_file())

    def broken() -> Iterator[Rows]:
        yield rows(30, 5)
        raise DataError("row 31 is wrong")

    with pytest.raises(DataError, match="row 31"):
        append(tmp_path / "d", 0, 5, pieces=broken())
    with pytest.raises(DataError, match="no rows"):
        append(tmp_path / "d", 0, 5, pieces=[rows(0, 0)])
    assert sorted(p for p in (tmp_path / "d").rglob("*") if p.is_file()) == before


def test_a_source_stays_with_its_manifest(tmp_path: Path) -> None:
    dataset, _ = append(tmp_path / "d", 40, 0)
    source, number = dataset.source(), dataset.manifest.number
    append(tmp_path / "d", 30, 7)
    assert sum(source.chunk_rows) == 40
    newest = store.Dataset.open(tmp_path / "d")
    assert newest.n_rows == 70
    assert sum(newest.source(number).chunk_rows) == 40
    assert newest.source(number).identity() == source.identity()
    assert newest.source().identity() != source.identity()


@pytest.mark.usefixtures("small_chunks")
def test_the_ledger_pages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "PAGE", 3)
    for seed in range(0, 28, 2):
        dataset, _ = append(tmp_path / "d", 10, seed)
    assert [batch.name for batch in dataset.batches] == [f"part-{s}" for s in range(0, 28, 2)]
    assert len(dataset.manifest.content["batches"]) < 6
    assert append(tmp_path / "d", 10, 0)[1] is None


def test_rows_are_held_out_by_batch_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    for nbytes in (100 * 24, 33 * 24):
        monkeypatch.setattr("genstream.segments.CHUNK_NBYTES", nbytes)
        dataset, _ = append(tmp_path / str(nbytes), 1000, 0, pieces=[rows(1000, 0)])
        split = Split(dataset.source(), "test", 0.2, seed=1)
        read = [split.read(i).filled() for i in range(len(split.chunk_rows))]
        parts.append(np.concatenate(read))
    np.testing.assert_array_equal(*parts)
    assert 140 < len(parts[0]) < 260


def test_levels_grow_at_the_end_only() -> None:
    def schema(*levels: str) -> Schema:
        return Schema((Column("x"), Column("c", "categorical", levels)))

    assert store.extends(schema("a", "b", "c"), schema("a", "b"))
    assert store.extends(schema("a"), schema("a"))
    assert not store.extends(schema("b", "a"), schema("a", "b"))
    assert not store.extends(schema("a"), schema("a", "b"))
    assert not store.extends(Schema.real(2), schema("a"))


def test_a_writer_whose_levels_lost_the_race_is_told(tmp_path: Path) -> None:
    def one(level: str) -> Schema:
        return Schema((Column("x"), Column("y"), Column("c", "categorical", ("a", level))))

    for seed, level in ((0, "b"), (1, "c")):
        pieces = [rows(5, seed)]
        call = (tmp_path / "d", level, pieces, lambda level=level: one(level))
        if level == "b":
            store.append_batch(*call)
        else:
            with pytest.raises(ConflictError, match="levels"):
                store.append_batch(*call)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    append(tmp_path / "d", 10, 0)
    with pytest.raises(DataError, match=r"columns a .*has x0 "):
        store.append_batch(tmp_path / "d", "other", [rows(5, 3)], lambda: Schema.real("abc"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no dataset"):
        store.Dataset.open(tmp_path / "none")
    with pytest.raises(StorageError, match="no model"):
        models.load(tmp_path / "none")
    assert store.load_checkpoint(tmp_path / "none") is None
    append(tmp_path / "d", 10, 0)
    with pytest.raises(StorageError, match="version 7"):
        store.Dataset.open(tmp_path / "d", 7)
    with pytest.raises(StorageError, match="a dataset, not a model"):
        models.ModelStore(tmp_path / "d").load()


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    append(tmp_path / "d", 350, 0, pieces=[rows(350, 0)])
    rng = np.random.default_rng(0)
    files = [p for p in (tmp_path / "d").rglob("*") if p.is_file() and p.name != "HEAD"]
    files = [p for p in files if p.parent.suffix != ".zarr"]
    assert len(files) >= 6
    for path in files:
        data = path.read_bytes()
        for at in rng.integers(0, len(data), 4):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            with pytest.raises((CorruptError, StorageError)):
                contents(store.Dataset.open(tmp_path / "d"))
        path.write_bytes(data)
    np.testing.assert_array_equal(
        contents(store.Dataset.open(tmp_path / "d")), rows(350, 0).filled()
    )


@pytest.mark.usefixtures("small_chunks")
def test_missing_swapped_and_cut_chunks_are_noticed(tmp_path: Path) -> None:
    append(tmp_path / "d", 350, 0, pieces=[rows(350, 0)])
    a, b, *_ = sorted((tmp_path / "d").rglob("c.*"))
    whole = a.read_bytes(), b.read_bytes()
    a.unlink()
    with pytest.raises(CorruptError, match=f"{a.name}: is missing"):
        contents(store.Dataset.open(tmp_path / "d"))
    a.write_bytes(whole[1])
    b.write_bytes(whole[0])
    with pytest.raises(CorruptError, match="not the file that was committed"):
        contents(store.Dataset.open(tmp_path / "d"))
    a.write_bytes(whole[0][:-9])
    with pytest.raises(CorruptError, match="bytes, not"):
        contents(store.Dataset.open(tmp_path / "d"))


def test_a_stale_or_silly_head_is_only_a_hint(tmp_path: Path) -> None:
    for seed in (0, 2, 4):
        append(tmp_path / "d", 10, seed)
    for text in ("1\n", "99\n", "-3", "x", ""):
        (tmp_path / "d" / "HEAD").write_text(text)
        assert store.Dataset.open(tmp_path / "d").n_rows == 30
    (tmp_path / "d" / "HEAD").unlink()
    assert store.Dataset.open(tmp_path / "d").n_rows == 30


def test_a_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    append(tmp_path / "d", 10, 0)
    with pytest.raises(CorruptError, match="outside"):
        store.LocalStorage(tmp_path / "d").read("../d/HEAD")


# --- states and models ---------------------------------------------------------------------------


def fitted(covariance: str = "full") -> tuple[Story, FitState]:
    data = rows(400, 3)
    story = mixture(REAL, 3, covariance=covariance).anchored(data)
    family = story.vague()
    state = FitState(family, seed=5, sample=data[:20], rescues=(0, 1, 0))
    return story, fit(story, BatchEM(3, 0.0), Resident(data), state)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_a_checkpoint_keeps_every_bit(tmp_path: Path, covariance: str) -> None:
    story, state = fitted(covariance)
    store.save_checkpoint(tmp_path, story, state)
    found = store.load_checkpoint(tmp_path)
    assert found is not None
    again_story, again = found
    assert json.dumps(again_story.to_json()) == json.dumps(story.to_json())
    assert again.params.digest() == state.params.digest()
    assert again.stats is not None
    assert state.stats is not None
    assert again.stats.digest() == state.stats.digest()
    assert again.trace == state.trace
    assert (again.seed, again.step, again.outcome, again.rescues) == (
        5,
        3,
        state.outcome,
        state.rescues,
    )
    # The story began with three components that were the same: two of them were moved.
    assert any(again.rescues)
    assert again.sample is not None
    assert state.sample is not None
    np.testing.assert_array_equal(again.sample.filled(), state.sample.filled())


def test_the_memory_of_online_learning_is_kept(tmp_path: Path) -> None:
    story, state = fitted()
    state = FitState(state.params, sample=state.sample)
    learner = OnlineEM(batch_rows=50)
    state, _ = learner.step(story, state, Resident(rows(400, 9)))
    store.save_checkpoint(tmp_path, story, state)
    found = store.load_checkpoint(tmp_path)
    assert found is not None
    assert found[1].memory is not None
    assert state.memory is not None
    assert found[1].memory.digest() == state.memory.digest()
    assert found[1].cursor == 1


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    story, state = fitted()
    for _ in range(5):
        store.save_checkpoint(tmp_path, story, state, keep=2)
    assert len(list((tmp_path / "states").glob("*.json"))) == 2
    assert len(list((tmp_path / "manifests").glob("*.json"))) == 2
    assert store.load_checkpoint(tmp_path) is not None


def test_versions_champion_and_rollback(tmp_path: Path) -> None:
    story, state = fitted()
    shelf = models.ModelStore(tmp_path)
    assert shelf.publish(story, state, {"run": "a", "held_out": -3.5}) == 1
    assert shelf.publish(story, state, {"run": "a", "held_out": -3.5}) == 1
    assert shelf.publish(*fitted("tied"), {"run": "b"}) == 2
    assert shelf.champion == 2
    assert [v.record["run"] for v in shelf.versions()] == ["a", "b"]
    assert models.load(tmp_path)[0].family.tied
    assert shelf.rollback() == 1
    assert shelf.champion == 1
    assert models.load(tmp_path)[1].params.digest() == state.params.digest()
    with pytest.raises(ConfigError, match="no version to go back"):
        shelf.rollback()
    assert shelf.rollback(2) == 2
    with pytest.raises(ConfigError, match="no version 9; it has 1, 2"):
        shelf.load(9)
    assert shelf.publish(story, state, {"run": "c"}) == 3


def test_the_oldest_versions_are_dropped(tmp_path: Path) -> None:
    shelf = models.ModelStore(tmp_path)
    for run in "abcd":
        shelf.publish(*fitted(), {"run": run}, keep=2)
    assert [v.number for v in shelf.versions()] == [3, 4]


@pytest.mark.parametrize("n_writers", [2, 8])
def test_racing_writers_lose_nothing(tmp_path: Path, n_writers: int) -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            append(tmp_path / "d", 20, 100 * seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset = store.Dataset.open(tmp_path / "d")
    assert not failed
    assert sorted(b.name for b in dataset.batches) == sorted(
        f"part-{100 * i}" for i in range(n_writers)
    )
    assert dataset.n_rows == 20 * n_writers


# --- upkeep --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_fsck_names_every_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "PAGE", 3)
    for seed in range(0, 14, 2):
        append(tmp_path / "d", 250, seed)
    assert store.fsck(tmp_path / "d") == ()
    chunks = sorted((tmp_path / "d").rglob("c.*"))
    data = chunks[3].read_bytes()
    chunks[3].write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    chunks[7].unlink()
    (page,) = (tmp_path / "d" / "ledger").glob("*.json")
    index = next(p for p in sorted((tmp_path / "d" / "segments").glob("*.json")))
    index.write_bytes(b"{}")
    found = store.fsck(tmp_path / "d")
    damaged = {chunks[3], chunks[7]}
    hidden = {p for p in damaged if str(p).startswith(str(index.with_suffix(".zarr")))}
    assert len(found) == len(damaged - hidden) + 1
    for path in (damaged - hidden) | {index}:
        assert sum(line.startswith(str(path)) for line in found) == 1
    page.write_bytes(page.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=page.name):
        store.fsck(tmp_path / "d")


def test_gc_deletes_only_what_nothing_names(tmp_path: Path) -> None:
    for folder, fill in (
        ("d", lambda path: append(path, 40, 0)),
        ("m", lambda path: models.ModelStore(path).publish(*fitted(), {"run": "a"})),
        ("c", lambda path: [store.save_checkpoint(path, *fitted(), keep=2) for _ in range(3)]),
    ):
        path = tmp_path / folder
        fill(path)
        before = {p for p in path.rglob("*") if p.is_file()}
        top = "segments" if folder == "d" else "states"
        (path / top / "0f.zarr" / "values").mkdir(parents=True)
        (path / top / "0f.zarr" / "values" / "c.0.0").write_bytes(b"x")
        (path / "manifests" / ".4d").write_bytes(b"x")
        assert store.gc(path) == 0
        assert store.gc(path, older_than=-1) == 2
        assert {p for p in path.rglob("*") if p.is_file()} == before
        assert store.fsck(path) == ()
    with pytest.raises(StorageError, match="no dataset or model"):
        store.gc(tmp_path / "none")


def test_a_source_travels_as_its_address(tmp_path: Path) -> None:
    for seed in range(0, 100, 2):
        dataset, _ = append(tmp_path / "d", 10, seed)
    source = dataset.source()
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    append(tmp_path / "d", 10, 1000)
    again = pickle.loads(sent)
    assert again.chunk_rows == source.chunk_rows
    assert again.identity() == source.identity()
    np.testing.assert_array_equal(again.read(7).filled(), source.read(7).filled())
    assert pickle.loads(sent) is again


def test_it_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset, _ = append(Path("d"), 10, 0)
    columns = [Column("x0", lower=-9.0, resolution=0.5), Column("x1", "count")]
    source = dataset.source(columns=columns)
    # Of the kind that is stored alone.
    assert source.schema.columns[0] == columns[0]
    assert source.schema.columns[1:] == REAL.columns[1:]
    sent, values = pickle.dumps(source), source.read(0).filled()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again.read(0).filled(), values)
    assert again.schema == source.schema


def test_states_of_any_numbers_keep_every_bit(tmp_path: Path) -> None:
    bits = np.array([0x7FF8000000000123, 0xFFF8000000000001, 1 << 63, 1], np.uint64)
    given = xarray.Dataset(
        {
            "bits": ("a", bits.view(np.float64)),
            "zeros": (("a", "b"), np.zeros((4, 3))),
            "minus.zeros": ("a", -np.zeros(4)),
            "gaps": ("a", np.full(4, np.nan)),
            "flags": ("a", np.array([True, False, False, True])),
            "no_flags": ("a", np.zeros(4, bool)),
            "large": ("a", np.array([2**62 + 1, -(2**62) - 1, 0, -1])),
            "small": ("a", np.arange(4, dtype=np.int8)),
            "single": ("b", np.array([0.1, 1e-40, 3e38], np.float32)),
            "number": ((), np.float64(0.1)),
            "count": ((), np.int64(0)),
            "nothing": (("z", "a"), np.zeros((0, 4))),
        },
        attrs={"text": "\u00e9", "number": 0.1, "list": [1, 2.5, float("-inf")], "none": None},
    )
    storage = store.LocalStorage(tmp_path)
    ref = store.write_record(storage, "states", given, {"more": [1]})
    found, content = store.read_record(storage, ref)
    assert content == {"more": [1]}
    assert found.attrs == given.attrs
    assert set(found.variables) == set(given.variables)
    for name, variable in given.data_vars.items():
        assert found[name].dims == variable.dims
        assert found[name].dtype == variable.dtype
        assert found[name].values.tobytes() == variable.values.tobytes()
    (group,) = tmp_path.glob("states/*.zarr")
    np.testing.assert_array_equal(xarray.open_zarr(group, consolidated=False)["zeros"], 0.0)
    # Every chunk is written, also where it is all fill value, so that a missing one is noticed.
    chunks = [p for p in group.rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert len(chunks) == len(given.data_vars) - 1


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    given = xarray.Dataset(
        {"cube": (("a", "b", "c"), np.arange(24.0).reshape(2, 3, 4)), "n": ((), np.int64(7))},
        attrs={"text": "x"},
    )
    files: dict[str, Any] = {}
    # As xarray lays arrays out: chunks in folders of their own.
    crc = {name: {"compressors": [zarr.codecs.Crc32cCodec()]} for name in given}
    given.drop_attrs().to_zarr(
        zarr.storage.MemoryStore(files), zarr_format=3, consolidated=False, encoding=crc
    )
    assert "cube/c/0/0/0" in files
    piece = manifests.PieceWriter(store.LocalStorage(tmp_path), "states")
    chunks = [f"zarr/{name}" for name in files if not name.endswith("zarr.json")]
    piece.add({f"zarr/{n}": d.to_bytes() for n, d in files.items()}, checksummed=chunks)
    empty = {"nothing": {"dims": ["z"], "shape": [0], "dtype": "<f8"}}
    ref = piece.seal({"attributes": given.attrs, "empty": empty, "record": {}})
    found, _ = store.read_record(piece.storage, ref)
    xarray.testing.assert_identical(found, given.assign(nothing=("z", np.empty(0))))


def test_all_files_of_a_piece_and_their_folders_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}

    def sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr("os.fsync", sync)
    storage = store.LocalStorage(tmp_path / "model")
    story, state = fitted()
    store.write_record(storage, "states", state.to_dataset(story), {})
    below = [tmp_path, *tmp_path.rglob("*")]
    assert sum(path.is_file() for path in below) > 20
    for path in below:
        # Files when they were whole.
        assert path.stat().st_ino in synced
        assert path.is_dir() or synced[path.stat().st_ino] == path.stat().st_size


def test_what_is_kept_of_a_commit_is_what_is_read(tmp_path: Path) -> None:
    story, state = fitted("diag")
    shelf = models.ModelStore(tmp_path)
    shelf.publish(story, state, {})
    learned, _ = OnlineEM(batch_rows=50).learn(story, state, rows(100, 9))
    event = models.Event("0" * 64, "a.csv", "learned", n_rows=100)
    there = shelf.commit(shelf.snapshot(), event, model=(story, learned))
    kept_story, kept = there.load()
    read_story, read = store.read_state(there.storage, there.version().state)
    assert read is not kept
    assert json.dumps(kept_story.to_json()) == json.dumps(read_story.to_json())
    a, b = kept.to_dataset(kept_story), read.to_dataset(read_story)
    assert a.identical(b)
    for one, other in ((kept.params, read.params), (kept.stats, read.stats)):
        assert one is not None
        assert other is not None
        assert one.digest() == other.digest()
        for (_, _, x), (_, _, y) in zip(one.leaves(), other.leaves(), strict=True):
            # The same layout too: products of matrices round as it has them.
            assert type(x) is type(y)
            assert np.asarray(x).strides == np.asarray(y).strides
    assert kept.trace == read.trace


# --- ingest --------------------------------------------------------------------------------------


def test_levels_learned_by_two_writers_at_once_agree(tmp_path: Path) -> None:
    for name, labels in (("a", "xyx"), ("b", "xzzz"), ("c", "wzy")):
        lines = [f"{i},{label}" for i, label in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["n,label", *lines]) + "\n")
    columns = {"n": "real", "label": "categorical"}
    store.ingest([tmp_path / "a.csv"], tmp_path / "d", columns=columns)
    told = []

    def another(n_rows: int) -> None:
        told.append(n_rows)
        if len(told) == 1:
            store.ingest([tmp_path / "b.csv"], tmp_path / "d", columns=columns)

    report = store.ingest(
        [tmp_path / "c.csv"], tmp_path / "d", columns=columns, on_progress=another
    )
    assert told == [3, 3]
    assert [batch.status for batch in report.batches] == ["stored"]
    dataset = store.Dataset.open(tmp_path / "d")
    assert dataset.schema["label"].levels == ("x", "y", "z", "w")
    labels = [dataset.schema["label"].levels[int(code)] for code in contents(dataset)[:, 1]]
    assert "".join(labels) == "xyx" + "xzzz" + "wzy"
    assert store.fsck(tmp_path / "d") == ()
    assert len(list((tmp_path / "d" / "segments").glob("*.json"))) == 3


@pytest.mark.parametrize("named", [None, {"x": "real", "c": "categorical"}])
def test_a_further_file_keeps_limits_resolution_and_unit(tmp_path: Path, named: Any) -> None:
    for name, lines in (("a", "1.5,u\n2,v"), ("b", "3,u"), ("c", "4,w")):
        (tmp_path / f"{name}.csv").write_text(f"x,c\n{lines}\n")
    x = Column("x", unit="mg", lower=0.5, upper=9.0, resolution=0.25)
    store.ingest([tmp_path / "a.csv"], tmp_path / "d", columns={"x": x, "c": "categorical"})
    store.ingest([tmp_path / "b.csv", tmp_path / "c.csv"], tmp_path / "d", columns=named)
    found = store.Dataset.open(tmp_path / "d").schema
    assert found["x"] == x
    assert found["c"].levels == ("u", "v", "w")
    # What a caller says anew counts, field by field.
    (tmp_path / "e.csv").write_text("x,c\n5,u\n")
    columns = {"x": Column("x", lower=1.0), "c": "categorical"}
    store.ingest([tmp_path / "e.csv"], tmp_path / "d", columns=columns)
    assert store.Dataset.open(tmp_path / "d").schema["x"] == replace(x, lower=1.0)


def test_how_many_rows_are_decoded_at_once_shows_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    lines = ["id,x,c,late", *(f"r{i},{rng.normal()},{'ab'[i % 2]},{i}" for i in range(30))]
    lines[20] = "r19,,z,text"
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    found = []
    for name, n in (("whole", 100), ("pieces", 7)):
        monkeypatch.setattr("genstream.sources.LEAST_PIECE_ROWS", n)
        monkeypatch.setattr("genstream.sources.PIECE_NBYTES", 1)
        store.ingest([tmp_path / "a.csv"], tmp_path / name, id_column="id")
        dataset = store.Dataset.open(tmp_path / name)
        (batch,) = dataset.batches
        (folder,) = (tmp_path / name / "segments").glob("*.zarr")
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        found.append((dataset.schema, batch.digest, dataset.source().chunk_rows, files))
    assert found[0] == found[1]
    assert found[0][0].kinds == ("real", "categorical", "categorical")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x\n1\n2\n")

    def append_line(_: int) -> None:
        path.write_text("x\n1\n2\n3\n")

    with pytest.raises(DataError, match=r"a\.csv: changed while it was read"):
        store.ingest([path], tmp_path / "d", on_progress=append_line)
    assert not [p for p in (tmp_path / "d").rglob("*") if p.is_file()]
    report = store.ingest([path, path], tmp_path / "d", weights=None, id_column=None)
    assert [batch.status for batch in report.batches] == ["stored", "duplicate"]
    assert report.to_json()["batches"][0]["rows"] == 3
