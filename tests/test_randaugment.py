"""Fine-tuning's augmentation: RandAugment is timm's to the bit, the rest by its numbers."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops
from timm.data import auto_augment
from torchvision.transforms.v2 import functional as TF
from videos import coordinates

import finetune
from data import sample_generator
from support import randaugment

AUTHORS = [  # "rand-m7-n4-mstd0.5-inc1" in the authors' rand_augment.py
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
]


def noisy_frames(count: int, width: int = 96, height: int = 64) -> torch.Tensor:
    """Frames uint8 (T, 3, H, W), no pixel above 220."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, 221, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", AUTHORS)
def test_each_operation_is_timms_to_the_bit(monkeypatch, name):
    image = TF.to_pil_image(noisy_frames(1, 113, 70)[0])
    options = dict(img_mean=(128, 128, 128), interpolation=Image.BICUBIC)  # as in all of 40,231 draws of the authors
    changed = False
    for level in (0.0, 1.3, 5.0, 6.7, 7.0, 7.4, 9.0, 9.9):
        for sign in (1, -1):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.1 if sign > 0 else 0.9)  # timm's _randomly_negate
            expected = auto_augment.AugmentOp(name, 1.0, level, options)(image)
            result = randaugment.operations(*image.size, level / 10, sign)[name](image)
            # TF's inverse of a shear differs in the last bit, which can round otherwise.
            extrema = ImageChops.difference(result, expected).getextrema()
            assert max(high for _, high in extrema) <= (1 if name == "ShearY" else 0), (level, sign)
            changed |= result.tobytes() != image.tobytes()
    assert changed


def test_the_highest_level_keeps_one_bit():
    """Pillow refuses none; the first versions that the authors used made the frame black."""
    image = Image.linear_gradient("L").convert("RGB")
    assert set(randaugment.operations(*image.size, 1.0, 1)["PosterizeIncreasing"](image).tobytes()) == {0, 128}


def test_choices_by_their_numbers(monkeypatch):
    """Four operations, each half the time, of magnitude 7 of 10 with std 0.5; all fifteen, both signs."""
    chosen, frames, counts = [], noisy_frames(1, 12, 8), Counter()

    def recorded(width, height, level, sign) -> dict:
        """Operations that do nothing but record that they are called."""
        choices = {name: (level, sign, name) for name in AUTHORS}
        return {name: lambda image, choice=choice: chosen.append(choice) or image for name, choice in choices.items()}

    assert list(randaugment.operations(8, 8, 0.5, 1)) == AUTHORS
    monkeypatch.setattr(randaugment, "operations", recorded)
    for number in range(300):
        before = len(chosen)
        torch.manual_seed(number)
        assert torch.equal(randaugment.rand_augment(frames, 4, 7.0, 0.5), frames)
        counts[len(chosen) - before] += 1
    assert set(counts) == {0, 1, 2, 3, 4} and len(chosen) == pytest.approx(600, abs=60)
    levels, signs, names = zip(*chosen, strict=True)
    levels = torch.tensor(levels, dtype=torch.float64)
    assert float(levels.mean()) == pytest.approx(0.7, abs=0.01) and float(levels.std()) == pytest.approx(0.05, abs=0.01)
    for values, options in ((signs, (1, -1)), (names, AUTHORS)):
        counts = Counter(values)
        assert set(counts) == set(options) and min(counts.values()) > 0.5 * len(chosen) / len(options)


def augmentation(**options) -> finetune.Augmentation:
    nothing = dict(size=32, randaugment=(0, 0, 0), crop_area=(1, 1), crop_aspect=(1, 1), flip=False, erase=0.0)
    return finetune.Augmentation(SimpleNamespace(**{**nothing, **options}))


def test_randaugment_comes_first_and_with_nothing_else_a_square_clip_stays_as_it_is(monkeypatch):
    calls, square = [], noisy_frames(2, 32, 32)
    monkeypatch.setattr(finetune, "rand_augment", lambda *arguments: calls.append(arguments) or arguments[0])
    assert torch.equal(augmentation(randaugment=(4, 7, 0.5))(square, sample_generator(0, 0, 0)), square)
    assert calls == [(square, 4, 7, 0.5)]


def test_one_augmentation_for_all_frames():
    """Each frame comes out as if it had been alone."""
    augment = augmentation(randaugment=(4, 7, 0.5), crop_area=(0.08, 1.0), crop_aspect=(0.75, 1.3333), flip=True)
    moving, results = noisy_frames(3), set()
    state = torch.get_rng_state()
    for number in range(40):
        clip = augment(moving, sample_generator(0, 0, number))
        assert clip.shape == (3, 3, 32, 32) and clip.dtype == torch.uint8
        for t in range(3):
            assert torch.equal(clip[t], augment(moving[t : t + 1], sample_generator(0, 0, number))[0])
        results.add(clip.numpy().tobytes())
    assert len(results) == 40
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_crop_and_flip_by_their_numbers():
    """Edges read off coordinates: area 8 to 100 %, sides between 3:4 and 4:3; half of the clips are flipped."""
    clip, augment = coordinates(240, 240, 1), augmentation(crop_area=(0.08, 1.0), crop_aspect=(0.75, 1.3333), flip=True)
    areas, aspects, flipped = [], [], 0
    for number in range(200):
        result = augment(clip, sample_generator(0, 0, number))[0].float()
        width, height = ((result[c].amax() - result[c].amin()).item() * 32 / 31 for c in (0, 1))
        areas.append(width * height / 240**2)
        aspects.append(width / height)
        flipped += bool((result[0].diff() <= 0).all())  # red is the column
        assert (result[1].diff(dim=0) >= 0).all()
    assert 0.06 < min(areas) < 0.15 and 0.85 < max(areas) < 1.05
    assert 0.68 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.46
    assert 75 < flipped < 125


def test_random_resized_crop_is_not_antialiased():
    """As F.interpolate resizes in the authors' code: of stripes one pixel wide, every second column is left."""
    stripes = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    stripes[..., 1::4], stripes[..., 2::4] = 200, 200
    assert (augmentation(size=16)(stripes, sample_generator(0, 0, 0)) == 200).all()  # antialiased: gray


def test_erasing_is_one_box_of_noise_in_all_frames():
    clip, augment, erased = torch.full((5, 3, 32, 32), 7, dtype=torch.uint8), augmentation(erase=0.25), 0
    for number in range(200):
        result = augment(clip, sample_generator(0, 0, number))
        changed = (result != 7).any(dim=1)  # (5, 32, 32)
        if not changed.any():
            continue
        erased += 1
        rows, columns = changed.any(dim=(0, 2)), changed.any(dim=(0, 1))
        box = result[:, :, rows][..., columns].float()  # (5, 3, H, W)
        assert 0.01 < box[0, 0].numel() / 32**2 <= 0.36
        assert changed[:, rows][..., columns].float().mean(dim=(1, 2)).min() > 0.9  # some pixels of noise are 7
        assert box.std(dim=(2, 3)).min() > 20 and not torch.equal(box[0], box[1])
    assert 30 < erased < 70
    assert (clip == 7).all()  # the decoded frames, which other repeats use too
