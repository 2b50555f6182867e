"""Colour of H&E images: Reinhard's transfer to a reference that all slides share."""

import copy

import numpy as np

# Reinhard et al. 2001, Eq. 4
RGB_TO_LMS = np.array(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
)
# Eq. 6, Ruderman's l alpha beta
LMS_TO_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
# mean and std of l alpha beta under the spots of DLPFC 151673
REFERENCE = np.array([[8.429, -0.135, 0.030], [0.160, 0.049, 0.0124]])


def to_lab(rgb):
    """(n, 3) uint8 or float 0-255 -> (n, 3) l alpha beta of the logarithms of LMS, natural
    logarithm."""
    lms = np.maximum(rgb.astype(np.float32), 1) @ RGB_TO_LMS.T.astype(np.float32)
    return np.log(lms) @ LMS_TO_LAB.T.astype(np.float32)


def tissue_colour(slide, reach=2):
    """(2, 3) mean and std of l alpha beta over the pixels within `reach` of the spots' centres.

    The rule R + G + B < 600 of MultiST takes the whole picture of 151673 for tissue: its background
    is grey (525)."""
    step = np.arange(-reach, reach + 1)
    # (N, 2)
    centre = np.rint(slide.xy * slide.image_scale).astype(int)
    x, y = (np.clip(centre[:, i, None] + step, 0, slide.image.shape[1 - i] - 1) for i in (0, 1))
    # (n, 3)
    lab = to_lab(slide.image[y[:, :, None], x[:, None, :]].reshape(-1, 3))
    return np.stack([lab.mean(0), lab.std(0)])


def normalise_colour(image, source, target=REFERENCE):
    """Reinhard's colour transfer (2001): every channel of l alpha beta goes from the source's mean
    and std to the target's.

    image (H, W, 3) uint8 -> the same; source, target (2, 3). One affine map per channel for the
    whole slide, background included. Works in strips of rows, so that a large picture needs little
    memory.
    """
    gain = target[1] / np.maximum(source[1], 1e-6)
    out = np.empty_like(image)
    for i in range(0, len(image), 256):
        # (n, 3)
        strip = (to_lab(image[i : i + 256].reshape(-1, 3)) - source[0]) * gain + target[0]
        rgb = np.exp(strip @ np.linalg.inv(LMS_TO_LAB).T) @ np.linalg.inv(RGB_TO_LMS).T
        out[i : i + 256] = (
            np.clip(np.rint(rgb), 0, 255).reshape(out[i : i + 256].shape).astype(np.uint8)
        )
    return out


def normalised_slide(slide):
    """The slide with its image in the colours of the reference; itself where it has ready-made
    patches, no image or no scale of the image."""
    if slide.patches is not None or slide.image is None or not slide.image_scale:
        return slide
    slide = copy.copy(slide)
    slide.image = normalise_colour(slide.image, tissue_colour(slide))
    return slide
