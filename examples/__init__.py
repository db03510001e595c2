"""Extensions of tlm-jax, each complete in one file."""
