"""A trace of chosen steps."""

import pathlib

import jax.numpy as jnp
import pytest

from tlm_jax.config import UserError
from tlm_jax.training import profiling


def test_a_trace_of_the_steps_asked_for(tmp_path: pathlib.Path) -> None:
    """Nothing before, a trace that says where it lies after the last of them, then nothing."""
    profiler = profiling.Profiler(profiling.parse("1:2"), tmp_path / "profile")
    said = []
    for done in range(4):
        profiler.before_step(done)
        said.append(profiler.after_step(done + 1, jnp.ones(3) + done))
        if done == 0:
            assert not (tmp_path / "profile").exists()
    where = f"Profile in {tmp_path / 'profile'}; look at it with xprof or TensorBoard."
    assert said == [None, None, where, None]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    profiler.close()


@pytest.mark.parametrize("text", ["5", "5:0", "a:b", "-1:3", "3:4:5"])
def test_wrong_spans_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match=f"--profile {text} is not START:STEPS"):
        profiling.parse(text)
