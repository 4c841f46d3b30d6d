"""A grid of runs, trained and evaluated identically, in one table: `python -m efx_jax.compare --config FILE`."""
