"""RandAugment with the 15 operations of the authors' code (timm's "rand-m7-n4-mstd0.5-inc1"), alike in all frames."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF


def operations(
    width: int, height: int, level: float, sign: int, interpolation: InterpolationMode
) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """What each operation does to an image of this size, by timm's names.

    level: from 0 to 1, the magnitude. sign: 1 or -1, for operations that go either way. Empty corners become grey.
    """
    geometry = dict(interpolation=interpolation, fill=[128, 128, 128])
    move = partial(TF.affine, angle=0, scale=1, center=[0, 0], **geometry)
    factor, shear = 1 + sign * 0.9 * level, sign * math.degrees(math.atan(0.3 * level))
    brighter = [min(i + int(110 * level), 255) if i < 128 else i for i in range(256)]
    return {
        "AutoContrast": TF.autocontrast,
        "Equalize": TF.equalize,
        "Invert": TF.invert,
        "Rotate": partial(TF.rotate, angle=sign * 30 * level, **geometry),
        "PosterizeIncreasing": partial(TF.posterize, bits=max(1, 4 - int(4 * level))),
        "SolarizeIncreasing": partial(TF.solarize, threshold=256 - int(256 * level)),
        "SolarizeAdd": partial(Image.Image.point, lut=3 * brighter),
        "ColorIncreasing": partial(TF.adjust_saturation, saturation_factor=factor),
        "ContrastIncreasing": partial(TF.adjust_contrast, contrast_factor=factor),
        "BrightnessIncreasing": partial(TF.adjust_brightness, brightness_factor=factor),
        "SharpnessIncreasing": partial(TF.adjust_sharpness, sharpness_factor=factor),
        "ShearX": partial(move, translate=[0, 0], shear=[shear, 0]),
        "ShearY": partial(move, translate=[0, 0], shear=[0, shear]),
        "TranslateXRel": partial(move, translate=[-sign * 0.45 * level * width, 0], shear=[0, 0]),
        "TranslateYRel": partial(move, translate=[0, -sign * 0.45 * level * height], shear=[0, 0]),
    }


def rand_augment(frames: Tensor, count: float, magnitude: float, std: float) -> Tensor:
    """`count` random operations on frames uint8 (T, 3, H, W), each done half the time. Same shape and type.

    magnitude: of 10, the mean of a normal distribution with this std, which is sampled for each operation. All numbers
    come from PyTorch's global generator.
    """
    if not count:
        return frames
    images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    for _ in range(int(count)):
        if torch.rand(()) < 0.5:
            level = (magnitude + std * torch.randn(())).clamp(0, 10).item() / 10
            sign, bicubic, choice = (int(torch.randint(most, ())) for most in (2, 2, 15))
            interpolation = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
            operation = list(operations(*images[0].size, level, 2 * sign - 1, interpolation).values())[choice]
            images = [operation(image) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (T, 3, H, W)
