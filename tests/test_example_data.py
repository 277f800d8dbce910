"""The example data is what it should be, or says which command makes it so."""

import json
import lzma

import numpy as np
import pytest

from benchmarks import data


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROOT", tmp_path)
    return tmp_path


def test_missing_file_names_the_command(root):
    with pytest.raises(FileNotFoundError, match=r"flights\.csv\.zip is missing: run `make data`"):
        data.path("flights.csv.zip")
    with pytest.raises(FileNotFoundError, match="run `make power`"):
        data.path("power/train.npy")


def test_unknown_name_lists_the_known():
    with pytest.raises(KeyError, match=r"penguins\.csv"):
        data.path("pinguins.csv")


def test_fetch_without_packages_names_the_command(root):
    with pytest.raises(data.DataError, match="run `make data`"):
        data.fetch()
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_altered_file_is_refused_and_not_copied(root):
    origin = root / "packages" / data.SOURCES["flights.csv.zip"].path
    origin.parent.mkdir(parents=True)
    origin.write_bytes(b"something else")
    with pytest.raises(data.DataError, match="sha256"):
        data.fetch()
    assert not (root / "flights.csv.zip").exists()


def test_altered_copy_is_replaced(root, monkeypatch):
    good = b"species,island\n"
    source = data.Source("p/penguins.csv", data._digest(good))
    monkeypatch.setattr(data, "SOURCES", {"penguins.csv": source})
    (root / "packages" / "p").mkdir(parents=True)
    (root / "packages" / "p" / "penguins.csv").write_bytes(good)
    (root / "penguins.csv").write_bytes(b"damaged")
    assert data.fetch() == [root / "penguins.csv"]
    assert (root / "penguins.csv").read_bytes() == good


def test_power_recipe(root):
    """A recording in miniature: gaps dropped, noise within the meters' resolution, standardised."""
    lines = [
        (
            "Date,Time,Global_active_power,Global_reactive_power,Voltage,Global_intensity,"
            "Sub_metering_1,Sub_metering_2,Sub_metering_3"
        )
    ]
    n_rows = 1000
    for i in range(n_rows):
        lines.append(
            f"1/1/2007,{i // 60 % 24:02d}:{i % 60:02d}:00,{i % 7},0.1,{240 + i % 3},4,0,1,17"
        )
        if i % 10 == 0:
            lines.append("1/1/2007,00:00:00,?,?,?,?,?,?,")
    (root / "minute_household_power.csv.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    train, validation, test, about_path = data.power()
    about = json.loads(about_path.read_text())
    assert about["rows"] == {"train": 810, "validation": 90, "test": 100}
    mean, sd = np.array(about["mean"]), np.array(about["sd"])
    parts = [np.load(path) for path in (train, validation, test)]
    np.testing.assert_allclose(parts[0].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(parts[0].std(axis=0), 1, rtol=1e-12)
    rows = np.concatenate(parts) * sd + mean
    active, voltage, minute = rows[:, 0], rows[:, 1], rows[:, 5]
    np.testing.assert_allclose(np.sort(np.rint(minute)), np.sort(np.arange(n_rows) % 1440))
    np.testing.assert_allclose(minute, np.rint(minute), atol=1e-8)
    assert np.all(active % 1 < 0.001 + 1e-9)
    assert np.all(voltage % 1 < 0.01 + 1e-9)
    assert np.all((rows[:, 4] >= 17) & (rows[:, 4] < 18))


def test_power_benchmark_has_its_published_size(example_data):
    example_data("power/train.npy")
    rows = {
        part: np.load(data.path(f"power/{part}.npy"), mmap_mode="r").shape
        for part in ("train", "validation", "test")
    }
    assert rows == {"train": (1_659_917, 6), "validation": (184_435, 6), "test": (204_928, 6)}


def test_old_faithful(example_data):
    table = np.genfromtxt(example_data("faithful.csv"), delimiter=",", skip_header=1)
    assert table.shape[0] == 272
