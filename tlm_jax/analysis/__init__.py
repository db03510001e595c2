"""Plans, plots and reports; importing it loads neither jax nor matplotlib."""
