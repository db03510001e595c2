"""Collection stops inside the block only."""

import gc

import pytest

from tlm_jax.garbage import no_collection


def test_collection_returns_as_it_was() -> None:
    """After an error too; an outer block is not ended by an inner one."""
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), no_collection():
        raise ZeroDivisionError
    assert gc.isenabled()
