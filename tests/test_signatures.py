"""The suite runs with signatures checked: a shape or a type that breaks one is an error of its own."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from pallas_kernels import quantize_blockwise
from turbojax.samplers import rcm


def test_a_call_that_breaks_its_signature_is_caught():
    with pytest.raises(TypeCheckError, match="M K"):
        quantize_blockwise(jnp.zeros(4))
    with pytest.raises(TypeCheckError, match="noise"):
        rcm.sample(lambda x, s: x, jnp.zeros((1, 2), jnp.int32), None, num_steps=1, sigma_max=80.0, mode="ode")


@pytest.mark.usefixtures("unchecked")
def test_a_test_of_what_users_see_can_go_without():
    with pytest.raises(ValueError, match="quantize_blockwise"):
        quantize_blockwise(jnp.zeros(4))
