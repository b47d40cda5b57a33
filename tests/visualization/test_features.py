"""Principal components, similarities and boxes: the numbers, and where they are drawn."""
import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from selfpatch.errors import ConfigError
from selfpatch.visualization import features as pictures


def object_features(rows, columns, noise=0.05):
    """A 4 × 4 object in the middle of a background; the object's lower half is a little apart."""
    features = torch.zeros(rows, columns, 12)
    features[..., 0] = 1
    top, left = rows // 2 - 2, columns // 2 - 2
    features[top:top + 4, left:left + 4] = torch.eye(12)[1] * 2
    features[top + 2:top + 4, left:left + 4, 2] = 1
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[top:top + 4, left:left + 4] = True
    return (features + noise * torch.randn(features.shape)).flatten(0, 1), inside.flatten()


def test_components_are_those_of_the_covariance():
    x = torch.randn(200, 10) @ torch.diag(torch.tensor([5.0, 4, 3] + [0.1] * 7)) + 3
    ours = pictures.principal_components(x)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(ours.abs(), (u * s)[:, :3].abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pictures.principal_components(x.flip(0)).flip(0), ours, rtol=1e-4, atol=1e-4)


def test_foreground_is_the_object_in_all_images():
    parts = [object_features(10, 12), object_features(14, 8)]
    features, inside = (torch.cat([part[i] for part in parts]) for i in range(2))
    colours, coloured = pictures.component_colours(features, [(10, 12), (14, 8)])
    assert torch.equal(coloured, inside)
    assert [colour.shape for colour in colours] == [(10, 12, 3), (14, 8, 3)]
    assert (colours[0].reshape(-1, 3)[~inside[:120].numpy()] == pictures.BACKGROUND).all()
    object_colours = colours[0][3:7, 4:8].astype(int)
    halves = object_colours[:2].reshape(-1, 3).mean(0), object_colours[2:].reshape(-1, 3).mean(0)
    assert abs(halves[0] - halves[1]).max() > 100  # the halves of the object differ most, so that their colours do
    assert pictures.component_colours(features, [(10, 12), (14, 8)], foreground=False)[1].all()


@pytest.mark.parametrize("top, left, height, width", [
    (3, 4, 4, 4),      # in the middle
    (1, 0, 9, 11),     # fills the image: most of the border is the object's
    (4, 3, 6, 6),      # cut off by the lower edge
    (0, 0, 2, 2),      # in a corner: most of the object is border
    (0, 4, 10, 4)])    # from edge to edge
@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_wherever_the_object_is(top, left, height, width, sign):
    inside = torch.zeros(10, 12, dtype=torch.bool)
    inside[top:top + height, left:left + width] = True
    features = 0.3 * torch.randn(10, 12, 8)
    features[..., 0] += 3 * sign * inside
    first = pictures.principal_components(features.flatten(0, 1), 1)[:, 0]
    for values in (first, -first):
        assert torch.equal(pictures.split_foreground(values, [(10, 12)]), inside.flatten())


def test_a_small_object_does_not_bring_the_noise_of_the_background():
    inside = torch.arange(400) < 16
    values = torch.where(inside, 5.0, 0.0) + torch.randn(400)
    values[399] = 500.0  # one patch far from all others is no side of its own
    upper = pictures.upper_side(values)
    assert upper[inside].float().mean() > 0.9 and upper[~inside].float().mean() < 0.02
    assert (values > values.mean())[~inside].float().mean() > 0.02  # as the mean would
    assert not pictures.upper_side(torch.ones(1)).any() and not pictures.upper_side(torch.ones(5)).any()


def test_constant_features_have_a_colour():
    colours, coloured = pictures.component_colours(torch.ones(16, 5), [(4, 4)])
    assert len(colours) == 1 and coloured.any()


def test_similarity_is_drawn_where_it_is():
    features, inside = object_features(10, 12, noise=0)
    cosines = pictures.similarity(features[4 * 12 + 5], features)
    assert cosines[inside].min() > 0.85 and cosines[~inside].abs().max() < 1e-6
    maps = [cosines.reshape(10, 12).numpy(), np.zeros((6, 6), np.float32)]
    images = [Image.new("RGB", (192, 160), "blue"), Image.new("RGB", (96, 96), "blue")]
    sheet = np.asarray(pictures.similarity_panels(images, maps, (4, 5), 16)).astype(int)
    width, top = pictures.PANEL_WIDTH, pictures.LABEL_HEIGHT
    height = width  # of the square image, the taller one
    right = sheet[top:top + height, 2 * pictures.GAP + width:2 * pictures.GAP + 2 * width]
    bright = (right.sum(2) > 500) & (right.sum(2) < 765)
    ys, xs = np.nonzero(bright)
    assert (xs.mean() / width, ys.mean() / height) == pytest.approx((6 / 12, 0.5), abs=0.03)
    lower = sheet[top + height + pictures.GAP + top:, 2 * pictures.GAP + width:]
    assert (lower.sum(2) < 30).mean() > 0.9  # one scale for both maps: all of the second is dark


def test_boxes_are_drawn_where_they_are():
    drawn = np.asarray(pictures.boxes_over(Image.new("RGB", (320, 240)), {"LOST": [(32, 48, 160, 200)],
                                                                          "true": [(200, 10, 300, 100)]})).astype(int)
    line = drawn.shape[0] - 240
    red = (drawn[line:] == [int(pictures.COLOURS[0][i:i + 2], 16) for i in (1, 3, 5)]).all(2)
    ys, xs = np.nonzero(red)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (32, 48, 160, 200)
    white = (drawn[line:] == 255).all(2)
    assert white[:, 195:305].sum() > 100 and white[:, :190].sum() == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, size in enumerate([(140, 90), (90, 120)]):
        pixels = np.random.RandomState(i).randint(0, 255, (9, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{i}.jpg")
    return [folder / "0.jpg", folder / "1.jpg"]


def run(*argv):
    args = visualize.get_args_parser().parse_args([str(arg) for arg in argv])
    args.func(args)


@pytest.mark.parametrize("drawing_name, says", [("pca", "principal components of"),
                                                ("similarity", "cosine of patch 1,4 to 44 patches")])
def test_jobs_draw_both_images(photos, tmp_path, capsys, drawing_name, says):
    output = tmp_path / "out.png"
    options = (drawing_name, "--random_weights", "--arch", "vit_tiny", "--image_size", 64, "--layer", 3,
               *(("--patch", "1,4") if drawing_name == "similarity" else ()), "--image_path")
    run(*options, *photos, "--output", output)
    assert says in capsys.readouterr().out
    assert Image.open(output).width == 2 * pictures.PANEL_WIDTH + 3 * pictures.GAP
    with pytest.raises(ConfigError, match="exists: give another name"):
        run(*options, *photos, "--output", output)
    with pytest.raises(ConfigError, match="cannot read the image none.jpg"):
        run(*options, "none.jpg", "--output", tmp_path / "other.png")


def test_patch_outside_the_image(photos, tmp_path):
    with pytest.raises(ConfigError, match="--patch 9,0 is outside the image"):
        run("similarity", "--random_weights", "--arch", "vit_tiny", "--image_size", 64, "--patch", "9,0",
            "--output", tmp_path / "out.png", "--image_path", photos[0])
