"""RandAugment's operations are timm's, to the bit, and are chosen as the authors choose them."""

import random
from collections import Counter

import pytest
import torch
from conftest import numbered_frame
from PIL import Image, ImageChops
from timm.data import auto_augment
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from data import sample_generator
from support import randaugment

INTERPOLATION = {InterpolationMode.BICUBIC: Image.BICUBIC, InterpolationMode.BILINEAR: Image.BILINEAR}
AUTHORS = [  # "rand-m7-n4-mstd0.5-inc1" in the authors' rand_augment.py
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """An image of 113 x 70 with edges, gradients and noise."""
    frame = torch.from_numpy(numbered_frame(1234, 113, 70).to_ndarray(format="rgb24").copy()).permute(2, 0, 1)
    noise = torch.randint(0, 60, frame.shape, generator=torch.Generator().manual_seed(0))
    return TF.to_pil_image((frame.int() * 0.7 + noise).byte())  # up to 220


def test_the_operations_are_the_authors():
    assert list(randaugment.operations(8, 8, 0.5, 1, InterpolationMode.BICUBIC)) == AUTHORS


@pytest.mark.parametrize("name", AUTHORS)
def test_each_operation_is_timms_to_the_bit(monkeypatch, image, name):
    changed = False
    for level in (0.0, 1.3, 5.0, 6.7, 7.0, 7.4, 9.0, 9.9):
        for sign in (1, -1):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.1 if sign > 0 else 0.9)  # timm's _randomly_negate
            for ours, theirs in INTERPOLATION.items():
                options = dict(img_mean=(128, 128, 128), interpolation=theirs)
                expected = auto_augment.AugmentOp(name, 1.0, level, options)(image)
                found = randaugment.operations(*image.size, level / 10, sign, ours)[name](image)
                # TF's inverse of a shear differs in the last bit, which can round otherwise.
                extrema = ImageChops.difference(found, expected).getextrema()
                assert max(high for _, high in extrema) <= (1 if name == "ShearY" else 0), (level, sign, ours)
                changed |= found.tobytes() != image.tobytes()
    assert changed


def test_the_highest_level_keeps_one_bit(image):
    """Pillow refuses none; the first versions that the authors used made the frame black."""
    posterize = randaugment.operations(*image.size, 1.0, 1, InterpolationMode.BICUBIC)["PosterizeIncreasing"]
    assert set(posterize(image).tobytes()) == {0, 128}


def test_choices_by_their_numbers(monkeypatch):
    """Four operations, each half the time, of magnitude 7 of 10 with std 0.5; all fifteen, both signs, both filters."""
    chosen, per_clip, original = [], Counter(), randaugment.operations

    def recorded(width, height, level, sign, interpolation):
        def with_name(name, operation):
            def recorded_operation(image):
                chosen.append((level, sign, interpolation, name))
                return operation(image)

            return recorded_operation

        table = original(width, height, level, sign, interpolation)
        return {name: with_name(name, operation) for name, operation in table.items()}

    monkeypatch.setattr(randaugment, "operations", recorded)
    frames = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    for number in range(300):
        before = len(chosen)
        torch.manual_seed(number)
        result = randaugment.rand_augment(frames, 4, 7.0, 0.5)
        assert result.shape == frames.shape and result.dtype == torch.uint8
        per_clip[len(chosen) - before] += 1
    assert set(per_clip) == {0, 1, 2, 3, 4} and len(chosen) == pytest.approx(600, abs=60)
    levels, *others = zip(*chosen, strict=True)
    levels = torch.tensor(levels, dtype=torch.float64)
    assert float(levels.mean()) == pytest.approx(0.7, abs=0.01) and float(levels.std()) == pytest.approx(0.05, abs=0.01)
    for values, number in zip(others, (2, 2, 15), strict=True):
        counts = Counter(values)
        assert len(counts) == number and min(counts.values()) > 0.5 * len(chosen) / number


def test_all_frames_are_augmented_alike():
    frame = torch.randint(0, 256, (1, 3, 30, 40), dtype=torch.uint8)
    for number in range(40):
        torch.manual_seed(sample_generator(0, 0, number).initial_seed())
        clip = randaugment.rand_augment(frame.expand(3, -1, -1, -1), 4, 7.0, 0.5)
        assert torch.equal(clip, clip[:1].expand_as(clip))
    assert torch.equal(randaugment.rand_augment(frame, 0, 7.0, 0.5), frame)
