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


def operations(width: int, height: int, level: float, sign: int) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """Return all operations on images of this size, by timm's names.

    level: magnitude from 0 to 1. sign: 1 or -1, for operations that go either way.
    """
    geometry = dict(interpolation=InterpolationMode.BICUBIC, fill=[128, 128, 128])  # empty corners are gray
    move = partial(TF.affine, angle=0, scale=1, center=[0, 0], **geometry)
    factor = 1 + sign * 0.9 * level
    shear = sign * math.degrees(math.atan(0.3 * level))
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
    """Apply `count` random operations to frames uint8 (T, 3, H, W), each with probability 1/2.

    The magnitude of each operation is normally distributed with this mean and std, from 0 to 10. All random numbers
    come from PyTorch's global generator.
    """
    if not count:
        return frames
    images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    for _ in range(int(count)):
        if torch.rand(()) < 0.5:
            level = (magnitude + std * torch.randn(())).clamp(0, 10).item() / 10
            sign = 2 * int(torch.randint(2, ())) - 1
            choices = list(operations(*images[0].size, level, sign).values())
            operation = choices[torch.randint(len(choices), ())]
            images = [operation(image) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (T, 3, H, W)
