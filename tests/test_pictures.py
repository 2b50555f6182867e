"""evaluation/pictures.py: shapes of known area, features fitted on training pictures, scores of
generated ones."""

import numpy as np
import pytest

from evaluation import pictures


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_morphology_of_known_shapes():
    y, x = np.mgrid[:64, :64] - 31.5
    disk, bar = np.hypot(x, y) < 20, np.zeros((64, 64))
    ellipse = ((x * np.cos(0.5) + y * np.sin(0.5)) / 24) ** 2 + (
        (y * np.cos(0.5) - x * np.sin(0.5)) / 8
    ) ** 2 < 1
    bar[10:14, 5:25] = 0.8
    found = [
        dict(zip(pictures.MORPHOLOGY, row))
        for row in pictures.morphology(np.stack([disk, ellipse, bar, 0 * bar]).astype(float))
    ]
    assert found[0]["area"] == pytest.approx(np.pi * 400, rel=0.01) and found[0][
        "major"
    ] == pytest.approx(40, rel=0.01)
    assert (
        found[0]["eccentricity"] < 0.1
        and found[0]["fill"] == pytest.approx(1, abs=0.01)
        and found[0]["extent"] == pytest.approx(np.pi / 4, abs=0.03)
    )
    assert found[1]["major"] == pytest.approx(48, rel=0.02) and found[1]["minor"] == pytest.approx(
        16, rel=0.03
    )
    assert found[1]["eccentricity"] == pytest.approx(np.sqrt(1 - 1 / 9), abs=0.01)
    assert (
        found[2]["area"] == 80
        and found[2]["perimeter"] == 48
        and found[2]["extent"] == 1
        and found[2]["mean"] == pytest.approx(0.8)
    )
    assert (
        found[2]["std"] == pytest.approx(0, abs=1e-6)
        and found[2]["max"] == 0.8
        and not any(found[3].values())
    )


def discs(rng, n, radius):
    y, x = np.mgrid[:16, :16] - 7.5
    r = radius + rng.normal(size=(n, 2, 1, 1))
    return (np.clip(r - np.hypot(x, y), 0, 1) * 255).astype(np.uint8)


def test_image_features_are_fitted_on_training_discs(rng):
    train, other = discs(rng, 200, 4), discs(rng, 100, 5)
    features = pictures.ImageFeatures().fit(train)
    x = features(train)
    assert x.shape[1] == features.used.sum() <= 36 and np.abs(x).max() <= 5
    # only what never varies is left out
    assert np.array_equal(features.used, np.ptp(features._raw(train), axis=0) > 1e-6)
    # area of larger discs
    assert np.abs(x.mean(0)).max() < 0.2 and features(other)[:, 0].mean() > 0.5
    # no picture depends on its neighbours
    assert np.array_equal(features(other[:3]), features(other)[:3])
    assert pictures._otsu(np.repeat([10, 200], 50)) == pytest.approx(
        0.5 * (10 + 199 + 1) / 255, abs=0.01
    )


def test_scores_of_generated_discs(rng):
    train, real = rng.normal(size=(500, 4)), rng.normal(size=(300, 4))
    same = pictures.generated_images(real, rng.normal(size=(300, 4)), train)
    assert (
        same["fd"] < 3 * same["fd_floor"]
        and same["ks_d"] < 0.1
        and same["nearest_train"] == pytest.approx(1, abs=0.15)
    )
    assert same["diversity"] == pytest.approx(1, abs=0.15)
    shifted = pictures.generated_images(real, rng.normal(size=(300, 4)) + 2, train)
    assert (
        shifted["fd"] > 10
        and shifted["w1"] == pytest.approx(2, abs=0.2)
        and shifted["ks_d"] > 0.5
        and shifted["kid"] > shifted["kid_floor"] + 1
    )
    copies = pictures.generated_images(real, train[:300], train)
    assert copies["nearest_train"] == 0 and copies["fd"] < 3 * copies["fd_floor"]
    collapsed = pictures.generated_images(real, np.tile(train.mean(0), (300, 1)), train)
    assert collapsed["diversity"] == 0 and collapsed["fd"] > 2
    # the halves are drawn from the seed
    assert pictures.generated_images(real, train[:300], train) == copies
    with pytest.raises(ValueError, match="row counts differ"):
        pictures.generated_images(real, train[:20], train)


def test_grey_levels_count_only_where_they_are_asked_for(rng):
    """Masks times .98: another distribution with grey levels, the same without."""
    y, x = np.mgrid[:32, :32] - 15.5
    radius = rng.uniform(3, 12, (400, 2, 1, 1))
    masks = (255 * np.clip((radius - np.hypot(x, y)) / 3, 0, 1)).astype(np.uint8)
    darker = np.rint(masks * 0.98).astype(np.uint8)
    scores = {}
    for has_grey in (True, False):
        features = pictures.ImageFeatures(has_grey).fit(masks[:200])
        real, made = features(masks[200:]), features(darker[200:])
        scores[has_grey] = pictures.generated_images(real, made, features(masks[:200]))
    assert scores[False]["fd"] < 1.2 * scores[False]["fd_floor"]
    assert scores[True]["fd"] > 1.5 * scores[True]["fd_floor"], scores
    # texture inside the cell counts with grey levels only
    noisy = np.where(masks > 0, rng.integers(150, 255, masks.shape), 0).astype(np.uint8)
    with_grey, without = (pictures.ImageFeatures(g).fit(noisy) for g in (True, False))
    assert with_grey(noisy).shape[1] > without(noisy).shape[1]


def test_statistics_of_a_stain(rng):
    image, inside = rng.random((3, 16, 16)), np.zeros((3, 16, 16), bool)
    inside[0, 4:9, 5:12], inside[1, 3, 3] = True, True
    found = pictures.stain_statistics(image, inside)
    values = image[0][inside[0]]
    assert found.shape == (3, 11) and (found[2, :10] == 0).all()
    np.testing.assert_allclose(
        found[0, [0, 1, 2, 5, 8]],
        [values.mean(), values.std(), values.min(), np.median(values), values.max()],
    )
    np.testing.assert_allclose(found[:, 10], image.mean((1, 2)))
    assert pictures.stain_channel(["own", "other", "dapi"]) == 2
    assert pictures.stain_channel(["own", "other"]) is None and pictures.stain_channel(["x"]) == 0
