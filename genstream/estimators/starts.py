"""Parameters that a caller gives to begin with, whole or in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from genstream.errors import ConfigError
from genstream.families.blocks import Array
from genstream.stats import Record
from genstream.story import Params, Story

# Parameters that are variances or matrices of them, by the last part of their name.
VARIANCES = ("covariance", "variance", "noise", "scale", "dof")


def given_leaves(start: Any, story: Story) -> dict[str, Array]:
    """Parameters by name (`weights`, `family.mean`, ...), checked against those of the story.

    `start` is None, `Params`, or a mapping from names to arrays such as the dataset that `params_`
    gives; `family.` may be left out of a name. Labels along an axis of a dataset may come in any
    order. Raises ConfigError naming what is unknown, of another shape or not possible.
    """
    if start is None:
        return {}
    if isinstance(start, Params):
        given = {name: value for name, _, value in start.leaves()}
    elif isinstance(start, Mapping):
        labels = story.labels()
        given = {str(name): _in_order(value, labels) for name, value in start.items()}
    else:
        raise ConfigError(
            "The 'start' parameter must be Params, a dataset or mapping of parameters by name, or "
            f"a fitted estimator. Got {start!r} instead."
        )
    expected = {name: (axes, np.shape(x)) for name, axes, x in story.vague().leaves()}
    found = {}
    for key, value in given.items():
        name = key if key in expected else f"family.{key}"
        if name not in expected:
            raise ConfigError(
                f"start: there is no parameter {key!r}; there are {', '.join(expected)}"
            )
        found[name] = _checked(name, value, *expected[name])
    return found


def _in_order(value: Any, labels: Mapping[str, Sequence[str]]) -> Any:
    """Entries of a labelled array in the order of the story's labels."""
    for dim in getattr(value, "dims", ()):
        wanted = list(labels.get(str(dim).removesuffix("_other"), ()))
        if not wanted or dim not in value.coords:
            continue
        known = [str(label) for label in value.coords[dim].values]
        if sorted(known) != sorted(wanted):
            raise ConfigError(
                f"start: {value.name!r} is labelled {', '.join(known)}, and the columns are "
                f"{', '.join(wanted)}"
            )
        value = value.isel({dim: [known.index(label) for label in wanted]})
    return value


def _checked(name: str, value: Any, axes: Sequence[str], shape: tuple[int, ...]) -> Array:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"start: {name!r} is no array of numbers: {error}") from None
    if array.shape != shape:
        raise ConfigError(f"start: {name!r} has shape {array.shape}, but {shape} is needed")
    if not np.isfinite(array).all():
        raise ConfigError(f"start: {name!r} holds NaN or infinity")
    last = name.rpartition(".")[2]
    if name == "weights" and ((array < 0).any() or abs(array.sum() - 1) > 1e-6):
        raise ConfigError(f"start: 'weights' must be shares that add up to 1, not {array.sum():g}")
    if last not in VARIANCES:
        return array
    if axes[-2:] == ("feature", "feature_other"):
        symmetric = np.allclose(array, array.swapaxes(-1, -2))
        if not symmetric or not (np.linalg.eigvalsh(array) > 0).all():
            raise ConfigError(f"start: {name!r} must be symmetric and positive definite")
    elif not (array > 0).all():
        raise ConfigError(f"start: {name!r} must be positive")
    return array


def replaced(params: Params, leaves: Mapping[str, Array]) -> Params:
    """The parameters with those replaced that are given, by their names."""

    def renewed(item: Any, prefix: str) -> Any:
        values: dict[str, Any] = {}
        for field in fields(item):
            value = getattr(item, field.name)
            name = prefix + field.name
            if isinstance(value, Record):
                values[field.name] = renewed(value, f"{name}.")
            elif name in leaves:
                number = np.ndim(value) == 0
                values[field.name] = float(leaves[name]) if number else leaves[name]
        return replace(item, **values)

    found: Params = renewed(params, "")
    return found
