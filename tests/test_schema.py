"""Columns and schemas: what is refused, and what survives a round trip."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genstream.errors import ConfigError, DataError, GenstreamError
from genstream.schema import KINDS, Column, Schema

names = st.text(min_size=1, max_size=8)


@st.composite
def columns(draw: st.DrawFn) -> Column:
    kind = draw(st.sampled_from(KINDS))
    levels: tuple[str, ...] = ()
    if kind == "categorical":
        levels = tuple(draw(st.lists(st.text(max_size=5), min_size=1, max_size=5, unique=True)))
    elif kind == "binary" and draw(st.booleans()):
        levels = tuple(draw(st.lists(st.text(max_size=5), min_size=2, max_size=2, unique=True)))
    return Column(draw(names), kind, levels, draw(st.text(max_size=5)))


schemas = st.lists(columns(), min_size=1, max_size=6, unique_by=lambda c: c.name).map(
    lambda found: Schema(tuple(found))
)


class TestColumn:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("",), "empty name"),
            (("a", "int"), "'int' is not one of real, binary, count, categorical"),
            (("a", "categorical", ("x", "y", "x")), "listed twice"),
            (("a", "real", ("x",)), "real column has no levels"),
            (("a", "count", ("x",)), "count column has no levels"),
            (("a", "categorical"), "needs its levels"),
            (("a", "binary", ("x",)), "two levels, not 1"),
            (("a", "binary", ("x", "y", "z")), "two levels, not 3"),
        ],
    )
    def test_wrong_columns_are_named(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Column(*arguments)

    def test_levels_are_counted_for_categories_only(self) -> None:
        assert Column("a", "categorical", ("x", "y", "z")).n_levels == 3
        assert Column("a", "binary", ("no", "yes")).n_levels == 0
        assert Column("a").n_levels == 0

    def test_numbers_go_for_the_levels_so_labelled(self) -> None:
        month = Column("month", "categorical", ("6", "5", "7"))
        assert [month.code(value) for value in ("7", 7, 7.0, np.float64(5))] == [2, 2, 2, 1]
        assert Column("x", "categorical", ("1.0", "0.0")).code("1.0") == 0
        assert Column("x", "categorical", ("2.0", "2")).code(2.0) == 0
        assert Column("x", "categorical", ("no", "yes")).code(1) == 1
        with pytest.raises(DataError, match="cannot be 0: it takes the levels 6, 5, 7"):
            month.code(0)


class TestSchema:
    def test_needs_a_column(self) -> None:
        with pytest.raises(ConfigError, match="at least one column"):
            Schema(())

    def test_names_are_unique(self) -> None:
        with pytest.raises(ConfigError, match="'a' appears twice"):
            Schema.real(["a", "b", "a"])

    def test_real_by_number_and_by_name(self) -> None:
        assert Schema.real(3).names == ("x0", "x1", "x2")
        assert Schema.real(["u", "v"]).kinds == ("real", "real")

    @given(schemas)
    def test_json_round_trip(self, schema: Schema) -> None:
        assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema

    @given(schemas)
    def test_every_column_is_of_one_kind(self, schema: Schema) -> None:
        found = sorted(j for kind in KINDS for j in schema.of_kind(kind))
        assert found == list(range(schema.n_features))
        assert schema.kinds == tuple(c.kind for c in schema.columns)

    @given(schemas, st.randoms())
    def test_select_keeps_the_order_named(self, schema: Schema, random: Any) -> None:
        order = random.sample(schema.names, len(schema.names))
        chosen = schema.select(order)
        assert list(chosen.names) == order
        assert all(chosen[name] == schema[name] for name in order)
        assert all(schema.names[schema.index(name)] == name for name in order)

    def test_a_missing_column_is_named_with_those_there_are(self) -> None:
        schema = Schema.real(["u", "v"])
        with pytest.raises(DataError, match="no column 'w'; the columns are u, v"):
            schema["w"]
        with pytest.raises(DataError, match="'w'"):
            schema.select(["u", "w"])

    def test_a_stored_column_must_be_valid(self) -> None:
        with pytest.raises(ConfigError, match="'a'"):
            Schema.from_json([{"name": "a", "kind": "real", "levels": ["x"]}])


def test_errors_have_their_own_exit_codes() -> None:
    codes = [error.exit_code for error in GenstreamError.__subclasses__()]
    assert sorted(codes) == list(range(1, 1 + len(codes)))
    assert GenstreamError.exit_code == 70
