"""The story that a configuration tells about its columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genstream.errors import ConfigError

if TYPE_CHECKING:
    from flows.config import Config
    from genstream.online import OnlineEM
    from genstream.responsibility import Responsibility
    from genstream.schema import Schema
    from genstream.story import Params, Story


def make_story(config: Config, schema: Schema) -> Story:
    """The story of `model`, over the columns found in the data.

    Raises ConfigError where it does not fit them.
    """
    from flows.config import PriorSpec
    from genstream import stories
    from genstream.priors import Prior

    model, dtype = config.model, config.fit.dtype
    k = model.n_components or 1
    frozen = tuple(model.frozen)
    told = model.prior
    prior = Prior.of(told.model_dump()) if isinstance(told, PriorSpec) else told
    match model.kind:
        case "mixture":
            return stories.mixture(
                schema,
                k,
                covariance=model.covariance,
                tails=model.tails,
                counts=model.counts or {},
                blocks=[
                    stories.Block(tuple(block.columns), block.family)
                    for block in model.blocks or ()
                ],
                prior=prior,
                dtype=dtype,
                frozen=frozen,
            )
        case "kmeans":
            if model.frozen:
                raise ConfigError("model.frozen: kmeans has nothing to learn but its centres")
            return stories.kmeans(schema, k, dtype=dtype)
    assert model.n_factors is not None
    if model.kind == "factors" and set(schema.kinds) != {"real"}:
        return stories.latent_factors(
            schema, model.n_factors, prior=prior, dtype=dtype, frozen=frozen
        )
    return stories.factors(
        schema,
        model.n_factors,
        k,
        noise=model.noise,
        shared_noise=model.shared_noise,
        prior=prior,
        dtype=dtype,
        frozen=frozen,
    )


def check_components(config: Config, rows: int) -> None:
    """Raise ConfigError where a fit would begin with more components than rows.

    A model that `model.start` names has its components already. No rows at all are told elsewhere.
    """
    k = config.model.n_components or 1
    if 0 < rows < k and config.model.start is None:
        raise ConfigError(
            f"model.n_components is {k}, more than the rows that are fitted: there are {rows}"
        )


def responsibility_of(config: Config) -> Responsibility:
    """How the fit of a configuration shares rows among components."""
    from genstream.responsibility import by_size, named

    rule = "hard" if config.model.kind == "kmeans" else config.fit.responsibility
    if rule == "auto":
        return by_size(config.model.n_components or 1)
    return named(rule, n=config.fit.top)


def online_of(config: Config) -> OnlineEM:
    """Online EM at the pace that a configuration says."""
    from genstream.online import OnlineEM

    fit = config.fit
    return OnlineEM(
        fit.batch_rows,
        fit.kappa,
        fit.t0,
        fit.forgetting,
        fit.passes,
        responsibility=responsibility_of(config),
    )


def given_start(config: Config, story: Story) -> Params | None:
    """The parameters of `model.start`, where one is named.

    Raises ConfigError where they are of another story.
    """
    if config.model.start is None:
        return None
    from flows.scoring import load_model

    there, params = load_model(config.model.start)
    if there.schema.names != story.schema.names or there.schema.kinds != story.schema.kinds:
        raise ConfigError(
            f"model.start: {config.model.start} is of the columns {', '.join(there.schema.names)}, "
            f"not {', '.join(story.schema.names)}"
        )
    if [c.levels for c in there.schema.columns] != [c.levels for c in story.schema.columns]:
        raise ConfigError(
            f"model.start: {config.model.start} knows other levels than these data have: list "
            "them in data.columns"
        )
    same = there.family.params_type is story.family.params_type
    if not same or there.n_components != story.n_components or there.n_factors != story.n_factors:
        raise ConfigError(
            f"model.start: {config.model.start} is another story: {there.n_components} components "
            f"of {there.family.name} and {there.n_factors} factors"
        )
    return params
