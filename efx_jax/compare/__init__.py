"""A grid of runs, trained and evaluated alike, in one table: `python -m efx_jax.compare --config FILE`."""
