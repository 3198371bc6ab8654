"""Drawn clips show what their captions say, stay in the frame, and never show what is held out."""

import numpy as np
import pytest

from turbojax.train import data


def test_a_seed_gives_the_same_clips():
    assert data.clips(3, 20) == data.clips(3, 20)
    assert data.clips(3, 20) != data.clips(4, 20)


@pytest.mark.parametrize("shape", data.SHAPES)
def test_every_shape_has_the_area_of_its_circle(shape):
    """Antialiasing by clipped distance keeps the area to within a percent: the ideal is pi r^2 for all shapes."""
    centres = np.array([[64.0, 64.0], [50.3, 70.8]])
    area = data.coverage(shape, 21.0, centres).sum((1, 2))
    np.testing.assert_allclose(area, np.pi * 21.0**2, rtol=0.01)


@pytest.mark.parametrize("shape", data.SHAPES)
def test_a_shape_is_centred_on_its_position(shape):
    centre = np.array([[57.25, 66.5]])
    cover = data.coverage(shape, 20.0, centre)[0]
    grid = np.arange(data.SIZE) + 0.5
    found = (cover.sum(0) @ grid / cover.sum(), cover.sum(1) @ grid / cover.sum())
    np.testing.assert_allclose(found, centre[0], atol=0.1)  # a tenth of a pixel: the edge is quantised to one


def test_shapes_stay_in_the_frame_and_move_as_said():
    for scene in data.clips(5, 96, data.COMBINATIONS):
        first, last = scene.positions()[[0, -1]]
        left, right, up, down = data.extent(scene.shape, scene.radius)
        for x, y in (first, last):
            assert left <= x <= data.SIZE - right
            assert up <= y <= data.SIZE - down
        direction = (last - first) / np.linalg.norm(last - first)
        np.testing.assert_allclose(direction, data.MOTIONS[scene.motion], atol=1e-9)


def test_the_background_is_plain_and_the_shape_has_its_colour():
    scene = data.clips(6, 1)[0]
    video = data.render(scene)
    assert (video[:, 0] == scene.background).all()
    x, y = scene.positions()[8].astype(int)
    assert tuple(video[8, y, x]) == scene.rgb


def test_held_out_combinations_are_never_trained_and_cover_every_word():
    assert not set(data.TRAINED) & data.HELD_OUT
    assert len(data.TRAINED) + len(data.HELD_OUT) == len(data.COMBINATIONS) == 48
    for i, words in enumerate((data.COLOURS, data.SHAPES, data.MOTIONS)):
        assert {c[i] for c in data.HELD_OUT} == set(words)
    drawn = {(s.colour, s.shape, s.motion) for s in data.clips(0, 400)}
    assert drawn == set(data.TRAINED)


def test_uint8_round_trip_is_exact():
    video = data.render(data.clips(7, 1)[0])
    assert (data.to_uint8(data.to_float(video)) == video).all()
