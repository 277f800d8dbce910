"""Families `p(x | k, theta)`: what a component makes of a row, and what it needs summed.

Each family stacks the parameters of all K components in arrays and offers

- `anchored(sample, n_components, prior)`: the family with its pivot and prior fixed from a sample;
- `prepare(params, log_weights)`: a kernel, made once a pass, that holds natural parameters;
- `kernel.walk(rows)`: a walk over one chunk in cache-sized blocks, that scores blocks, gathers
  statistics and returns their sum;
- `maximise(stats, previous)`: the parameters that maximise the expected log-posterior;
- `log_prior(params)`, `draw(params, component, rng)`.

See `genstream.families.blocks.Family` for the exact protocol.
"""
