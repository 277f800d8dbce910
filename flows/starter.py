"""A first configuration for a data file, from a look at its first rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.config import in_place
from genstream.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

LOOK_ROWS = 50_000
MAX_LEVELS = 50
MAX_COUNT = 100


@dataclass(frozen=True)
class Suggestion:
    """What a column seems to be; one left out is written as a comment, with a remark why."""

    name: str
    kind: str
    left_out: bool = False
    remark: str = ""


def suggest(name: str, values: pa.Array) -> Suggestion:
    """The kind of a column, from some of its values (numbers, booleans or text).

    Whole numbers from 0 to 100 become counts, 0 and 1 alone binary, other numbers real; text of
    at most 50 labels becomes categorical. A column that is constant, empty, or text of its own in
    every row tells components nothing and is left out.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_nested(values.type):
        return Suggestion(name, "real", left_out=True, remark=f"holds {values.type}")
    seen = values.drop_null()
    n_distinct = len(pc.unique(seen))
    numbers = _numbers(seen)
    if not len(seen):
        return Suggestion(name, "real", left_out=True, remark="nothing but gaps at first sight")
    if n_distinct == 1:
        kind = "categorical" if numbers is None else "real"
        return Suggestion(name, kind, left_out=True, remark="always the same at first sight")
    if numbers is None:
        if n_distinct <= MAX_LEVELS:
            return Suggestion(name, "categorical")
        return Suggestion(
            name, "categorical", left_out=True, remark=f"text with {n_distinct} different values"
        )
    whole = bool((numbers == np.floor(numbers)).all())
    if whole and numbers.min() == 0 and numbers.max() == 1:
        return Suggestion(name, "binary")
    if whole and n_distinct == len(seen) > MAX_COUNT and re.search(r"(?i)id$|^(row|index)", name):
        return Suggestion(name, "real", left_out=True, remark="different in every row: an id?")
    if whole and numbers.min() >= 0 and numbers.max() <= MAX_COUNT:
        remark = "categorical, if these numbers are codes" if n_distinct <= MAX_LEVELS else ""
        return Suggestion(name, "count", remark=remark)
    return Suggestion(name, "real")


def _numbers(values: pa.Array) -> np.ndarray[Any, Any] | None:
    """The values as float64, or None where one of them is not a number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_temporal(values.type):
        return None
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        found: np.ndarray[Any, Any] = pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return found[np.isfinite(found)] if np.isfinite(found).any() else None


def look(data: Path) -> tuple[list[Suggestion], int]:
    """What the columns of a file seem to be, from its first rows, and how many those were."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from genstream.tables import NULL_VALUES, read_tables

    table = next(iter(read_tables(data, chunk_rows=LOOK_ROWS)))
    nulls = pa.array(NULL_VALUES)
    columns = []
    for name in table.column_names:
        values = table.column(name).combine_chunks()
        if pa.types.is_string(values.type):
            missing = pc.is_in(values, value_set=nulls)
            values = pc.if_else(missing, pa.scalar(None, pa.string()), values)
        columns.append(suggest(name, values))
    return columns, table.num_rows


def write_starter(data: Path, target: Path) -> list[dict[str, str]]:
    """Write a configuration for `data`; returns its columns and their kinds.

    Raises ConfigError where `target` exists already, DataError where no column can be used.
    """
    import jinja2

    if target.exists():
        raise ConfigError(f"{target} exists: name another file with -o")
    columns, n_looked = look(data)
    used = [column for column in columns if not column.left_out]
    if not used:
        raise DataError(f"{data}: no column can be modelled: {columns[0].remark}")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", data.name.split(".")[0]).strip("-_") or "data"
    plain = in_place(str(data))
    identity = next((c.name for c in columns if c.remark.endswith("an id?")), None)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flows", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - the result is YAML, and values are written as JSON
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON is YAML, but Jinja's own filter escapes for HTML.
    environment.filters["tojson"] = _quoted
    text = environment.get_template("config.yaml.j2").render(
        source=str(data),
        target=str(target),
        name=name,
        dataset=None if plain else f"data/{name}",
        columns=columns,
        id=None if plain else identity,
        n_looked=f"{n_looked:,}",
    )
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{target} exists: name another file with -o") from None
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror}") from None
    return [{"name": column.name, "kind": column.kind} for column in used]


def _quoted(text: str) -> str:
    """A YAML scalar: plain where that is unmistakable, else quoted."""
    import json

    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and text.lower() not in (
        *("true", "false", "null", "yes", "no", "on", "off", "y", "n"),
    ):
        return text
    return json.dumps(text, ensure_ascii=False)
