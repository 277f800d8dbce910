"""Opening data: whatever rows were given in, as a source of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from genstream.errors import DataError
from genstream.estimators.containers import (
    FilledArray,
    FilledColumns,
    FilledPartitions,
    FilledTable,
    Form,
    as_table,
    columns_of,
    is_numeric,
    is_table,
    refilled,
)
from genstream.estimators.questions import Data, Labelled, is_lazy
from genstream.schema import Column, Kind, Schema
from genstream.sources import NumpySource
from genstream.story import Story
from genstream.tables import Encoder, TableSource, open_source

# What is known of the columns.
COLUMNS = ("n_features_in_", "feature_names_in_", "_form")


class Opening(BaseEstimator):  # type: ignore[misc]
    """An estimator that knows the columns it was fitted with, and opens data of any form."""

    chunk_rows: int | None

    # Whether columns may be of other kinds than real, and so hold labels.
    takes_labels: ClassVar[bool] = False
    _form: Form = Form()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = self._takes_sparse
        return tags

    @property
    def _takes_sparse(self) -> bool:
        """Whether rows may be sparse, where zeros are worth nothing more than to be left out."""
        return False

    def _story(self) -> Story:
        """The story that was fitted."""
        raise NotImplementedError

    def _describe(self, found: Schema) -> Schema:
        """What the columns of an array are, of which only the names were found."""
        if self._kind is None:
            return found
        return Schema(tuple(Column(name, self._kind) for name in found.names))

    def _wanted_columns(self) -> Schema | Mapping[str, Kind | Column] | None:
        """What the caller said of the columns; None to find out."""
        return None

    @property
    def _kind(self) -> Kind | None:
        """What all columns are, where a face knows it and the caller does not say."""
        return None

    def _numbers(self, array: Any) -> Any:
        """What an array (n, d) of numbers, which may be dask's, stands for."""
        return array

    @contextlib.contextmanager
    def _columns_kept(self) -> Iterator[None]:
        """Where what is done within it fails, the columns are those of before."""
        held = self.__dict__
        known = {name: held[name] for name in COLUMNS if name in held}
        try:
            yield
        except BaseException:
            for name in COLUMNS:
                held.pop(name, None)
            held.update(known)
            raise

    def _open(self, X: Any, sample_weight: Any = None, *, reset: bool = False) -> Data:
        """The data as a source; with `reset` their columns become those of the estimator."""
        if is_lazy(X):
            data = self._open_source(X, sample_weight, reset)
            if reset:
                package = type(X).__module__.partition(".")[0]
                self._form = Form(isinstance(data.source, TableSource), package)
            return data
        table = as_table(X) if self.takes_labels and is_table(X) else None
        columns = self._wanted_columns() if reset else self._story().schema
        if not self.takes_labels:
            encoded = False
        elif reset:
            labelled = table is not None and not all(map(is_numeric, table.schema.types))
            named = table is not None and columns is not None
            encoded = labelled or named or isinstance(columns, Mapping)
        else:
            assert isinstance(columns, Schema)
            encoded = self._form.encoded
            if table is not None and not hasattr(self, "feature_names_in_"):
                mixed = set(columns.kinds) != {"real"}
                encoded |= mixed and set(columns.names) <= set(table.column_names)
        if encoded:
            return self._open_table(X, table, columns, sample_weight, reset)
        if reset:
            self._form = Form()
        return self._open_array(X, sample_weight, reset)

    def _open_array(self, X: Any, sample_weight: Any, reset: bool) -> Data:
        """Rows of numbers in memory."""
        if isinstance(X, np.ma.MaskedArray):
            X = np.ma.filled(X.astype(np.float64), np.nan)
        array = validate_data(
            self,
            X,
            accept_sparse="csr" if self._takes_sparse else False,
            reset=reset,
            dtype=[np.float64, np.float32],
            # The source looks for what cannot be used as rows are read, and names the row.
            ensure_all_finite=False,
            ensure_min_samples=2 if reset else 1,
        )
        if reset:
            names = getattr(self, "feature_names_in_", None)
            schema = self._describe(Schema.real(array.shape[1] if names is None else names))
        else:
            schema = self._story().schema
        if sample_weight is not None and not isinstance(sample_weight, str):
            sample_weight = np.asarray(sample_weight, dtype=np.float64)
        array = self._numbers(array)
        source = NumpySource(array, schema, sample_weight, self.chunk_rows, name="X")
        if issparse(X):
            # What is not stored is a zero, not a gap.
            return Data(source, refill=lambda *_: X)
        refill = FilledTable(X, source) if is_table(X) else FilledArray(array.dtype)
        return Data(source, refill=refill)

    def _open_table(
        self, X: Any, table: Any, columns: Any, sample_weight: Any, reset: bool
    ) -> Data:
        """Rows in memory whose labels and types are turned into numbers: of a table, or of an
        array whose columns are described.
        """
        package = type(X).__module__.partition(".")[0] if table is not None else "numpy"
        by_name = isinstance(sample_weight, str)
        if table is None:
            names = columns.names if isinstance(columns, Schema) else tuple(columns)
            table = columns_of(X, names)
        elif columns is None and self._kind is not None:
            data = [name for name in table.column_names if name != sample_weight]
            columns = dict.fromkeys(data, self._kind)
        encoder = Encoder(columns, carried=[sample_weight] if by_name else ())
        rows = encoder.encode(table, place="X")
        schema = encoder.schema
        weights = sample_weight
        if by_name:
            weights = encoder.weights(table, sample_weight, place="X")
        if reset:
            if rows.n_rows < 2:
                raise DataError("found array with 1 sample(s), while a minimum of 2 is required")
            self._set_names(schema.names, package != "numpy")
            self._form = Form(True, package, {n: table.schema.field(n).type for n in schema.names})
        if weights is not None:
            weights = np.asarray(weights, dtype=np.float64)
        source = NumpySource(rows.filled(), schema, weights, self.chunk_rows, name="X")
        if package == "numpy":
            return Data(source, refill=FilledColumns(self._form))
        return Data(source, refill=FilledTable(X, source, schema.names))

    def _open_source(self, X: Any, sample_weight: Any, reset: bool) -> Data:
        labels = None if reset else getattr(self, "feature_names_in_", None)
        wanted: Any = self._wanted_columns() if reset else None
        if not reset and (labels is not None or set(self._story().schema.kinds) != {"real"}):
            wanted = self._story().schema
        refill = None
        if hasattr(X, "to_dask_array"):
            whole, found = X, [str(name) for name in X.columns]
            if labels is not None:
                absent = [name for name in labels if name not in found]
                if absent:
                    raise DataError(
                        f"X: no column {absent[0]!r}: the columns are {', '.join(found)}"
                    )
                X, found = X[list(labels)], list(labels)
            for name, kind in X.dtypes.items():
                if getattr(kind, "kind", "O") not in "biuf":
                    raise DataError(
                        f"X: column {name!r} of the dask DataFrame holds {kind}, not numbers: "
                        "write it to parquet, and give that path to a Mixture"
                    )
            refill = FilledPartitions(whole, found)
            X = X.astype(np.float64).to_dask_array(lengths=True)
            wanted = wanted or found
            if reset and self._kind is not None:
                wanted = self._describe(Schema.real(found))
        elif reset and wanted is None and self._kind is not None:
            every = open_source(X).schema.names
            wanted = self._describe(Schema.real(n for n in every if n != sample_weight))
        X = self._numbers(X)
        source = open_source(X, wanted, sample_weight)
        data = Data(source, lazy=True, refill=refill or refilled(X, source))
        if type(X).__module__.partition(".")[0] == "xarray":
            # Without chunks the caller is content to hold the answers in memory.
            data = replace(data, lazy=bool(X.chunks), wrap=Labelled.like(X))
        names, n_features = source.schema.names, source.schema.n_features
        if reset:
            if sum(source.chunk_rows) < 2:
                raise DataError("found array with 1 sample(s), while a minimum of 2 is required")
            self._set_names(names, names != Schema.real(n_features).names)
            return data
        expected = self._story().schema
        if n_features != expected.n_features:
            raise DataError(
                f"X has {n_features} features, but {type(self).__name__} is expecting "
                f"{expected.n_features} features as input"
            )
        if source.schema.kinds != expected.kinds:
            raise DataError(
                f"the columns of X are {', '.join(source.schema.kinds)}; {type(self).__name__} was "
                f"fitted with {', '.join(expected.kinds)}"
            )
        return data

    def _set_names(self, names: tuple[str, ...], named: bool) -> None:
        self.n_features_in_ = len(names)
        if named:
            self.feature_names_in_ = np.array(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
