"""The power average: TurboDiffusion's decay, and the average that it stands for."""

import numpy as np
import pytest
from golden import seeded

from turbojax.train import ema


def test_decay_is_turbodiffusions():
    _, golden = seeded.load("rcm")
    ours = [float(ema.decay(0.1, i)) for i in (0, 1, 10, 100, 1000, 10000)]
    np.testing.assert_allclose(ours, golden["ema_beta"], rtol=1e-5, atol=1e-12)


def test_average_weighs_by_a_power_of_the_age():
    # Weights i^a: the average of a ramp is (a + 1) / (a + 2) of its end, whatever the length.
    average, steps = {"w": np.zeros(())}, 2000
    for i in range(steps):
        average = ema.update(average, {"w": np.float32(i)}, 0.1, i)
    a = ema.exponent(0.1)
    assert float(average["w"]) / steps == pytest.approx((a + 1) / (a + 2), rel=2e-3)


def test_unusable_rate_is_refused():
    with pytest.raises(ValueError, match="EMA rate"):
        ema.exponent(0.5)
