"""Optimizer, loss, train step, loop and checkpoints."""
