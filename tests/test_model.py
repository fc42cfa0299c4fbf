"""The networks against the paper's counts, position tables, initial values, regularization and parameter groups."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import masking
import model as m
from support.config import UserError

SMALL = dict(width=48, depth=3, heads=4, decoder_width=24, decoder_depth=2, decoder_heads=2, eps=1e-5)
TINY = dict(width=48, depth=2, heads=4, classes=5)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter matter: mask token, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        if parameter.ndim == 1:
            parameter.data += 0.3
    return module.eval()


def tokens(grid: tuple[int, int, int], batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random masks (B, N) with the positions of visible and masked cubes."""
    mask = torch.stack([masking.random_mask(grid, 0.75, torch.Generator().manual_seed(i)) for i in range(batch)])
    visible, masked = map(torch.stack, zip(*map(masking.split, mask), strict=True))
    return mask, visible, masked


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


PRETRAINING = [("S", 4, 24_029_376, 11.5), ("B", 4, 94_210_944, 35.4)]
PRETRAINING += [("L", 12, 342_996_992, 142.6), ("H", 12, 692_487_296, 237.6)]


@pytest.mark.parametrize("size, decoder_depth, parameters, giga", PRETRAINING)
def test_parameters_and_multiply_accumulates_of_pretraining(size, decoder_depth, parameters, giga):
    """The multiply-accumulates include embedding all 1568 cubes; this model embeds the 160 visible ones only."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = m.VideoMAE(**m.SIZES[size], decoder_depth=decoder_depth)
        visible, masked = torch.empty(1, 160, dtype=torch.long), torch.empty(1, 1408, dtype=torch.long)
        assert model(torch.empty(1, 3, 16, 224, 224), visible, masked).shape == (1, 8 * 176, 1536)  # Table 8
    assert sum(p.numel() for p in model.parameters()) == parameters
    saved = 1408 * 1536 * m.SIZES[size]["width"]
    assert (counter.get_total_flops() / 2 + saved) / 1e9 == pytest.approx(giga, abs=0.06)


PARAMETERS = dict(S=22_033_936, B=86_534_800, L=304_270_736, H=632_119_440)
GFLOPS = [("S", 16, 224, 57), ("B", 16, 224, 180), ("L", 16, 224, 597), ("H", 16, 224, 1192)]
GFLOPS += [("L", 32, 224, 1436), ("L", 32, 320, 3958), ("H", 32, 320, 7397)]


@pytest.mark.parametrize("size, frames, pixels, giga", GFLOPS)
def test_parameters_and_gflops_of_tables_6_and_7(size, frames, pixels, giga):
    """The paper counts multiply-accumulates and five operations for each element that a LayerNorm normalizes."""
    normalized = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = m.VideoClassifier(**m.encoder_size(size), classes=400)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: normalized.append(inputs[0].numel()))
        assert model(torch.empty(1, 3, frames, pixels, pixels)).shape == (1, 400)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    assert round((counter.get_total_flops() / 2 + 5 * sum(normalized)) / 1e9) == giga


def test_interpolated_positions():
    grid = (4, 6, 6)
    table = torch.randn(4 * 6 * 6, 10)
    assert m.interpolate_positions(table, grid, grid) is table
    # what changes in time alone is interpolated linearly in time, everywhere alike
    times = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 6, 6, 1).reshape(-1, 1)
    stretched = m.interpolate_positions(times, grid, (8, 9, 9)).view(8, 81)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert torch.allclose(stretched, expected[:, None].expand(8, 81), atol=1e-5)
    # bicubic: Keys' kernel for A = -0.75, at distances 1.75, 1.25, 0.75 and 0.25 from row 2, in all columns alike
    rows = torch.arange(6.0).view(1, 6, 1, 1).expand(4, 6, 6, 1).reshape(-1, 1)
    stretched = m.interpolate_positions((rows == 2).float(), grid, (4, 12, 6)).view(4, 12, 6)
    expected = torch.tensor([-0.03515625, -0.10546875, 0.26171875, 0.87890625])
    assert torch.allclose(stretched[:, 1:5], expected[:, None].expand(4, 4, 6), atol=1e-6)


def test_initial_values_of_pretraining():
    torch.manual_seed(0)
    model = m.VideoMAE(**m.SIZES["S"], decoder_depth=4)
    bound = (6 / (384 + 3 * 384)) ** 0.5  # q, k, v as one matrix
    weight = model.encoder.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert model.decoder.head.weight.abs().max() <= (6 / (192 + 1536)) ** 0.5
    assert 0 < model.mask_token.abs().max() <= 0.02
    assert all(not block.mlp.fc1.bias.any() for block in model.encoder.blocks)
    assert model.encoder_to_decoder.weight.abs().max() <= 384**-0.5  # PyTorch's default


def test_initial_values_of_the_classifier():
    torch.manual_seed(0)
    model = m.VideoClassifier(**{**TINY, "classes": 400}, clip_size=(4, 32, 32))
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.patch_embed."):
            assert parameter.abs().max() <= 1536**-0.5  # PyTorch's default
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all()
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            std = 2e-5 if name == "head.weight" else 0.02 * (768 / 48) ** 0.5
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


def test_drop_path_rises_with_depth_and_skips_whole_clips():
    model = m.VideoClassifier(**TINY | dict(depth=5), clip_size=(4, 32, 32), drop_path=0.2)
    assert [block.drop_path.p for block in model.encoder.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    block = randomize(m.Block(width=48, heads=4, eps=1e-6, drop_path=0.5)).train()
    x = torch.randn(400, 3, 48)
    with torch.no_grad():
        attention = block.attn(block.norm1(x))
        torch.manual_seed(0)
        out = block(x)
        outcomes = []
        for after in (x, x + 2 * attention):  # a branch that is not skipped counts twice
            for expected in (after, after + 2 * block.mlp(block.norm2(after))):
                outcomes.append(torch.isclose(out, expected, atol=1e-4).flatten(1).all(dim=1))
    outcomes = torch.stack(outcomes).float()
    assert torch.equal(outcomes.sum(dim=0), torch.ones(400)) and (outcomes.mean(dim=1) - 0.25).abs().max() < 0.09


def test_dropout_is_before_the_last_layer_and_only_in_training():
    model = randomize(m.VideoClassifier(**TINY, clip_size=(4, 32, 32), dropout=0.5))
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    clip = torch.randn(8, 3, 4, 32, 32)
    with torch.no_grad():
        model.eval()(clip), model.train()(clip)
    zero = seen[1] == 0
    assert 0.35 < zero.float().mean() < 0.65 and torch.allclose(seen[1], torch.where(zero, 0.0, 2 * seen[0]), atol=1e-5)


def test_options_build_the_same_model_again():
    model = m.VideoMAE(**SMALL, clip_size=(4, 32, 48), cube=(2, 16, 8), frames_per_token=4)
    assert model.options == dict(**SMALL, clip_size=[4, 32, 48], cube=[2, 16, 8], frames_per_token=4)
    m.VideoMAE(**model.options).load_state_dict(model.state_dict())
    assert not any("pos_embed" in key for key in model.state_dict())
    classifier = m.VideoClassifier(**TINY, drop_path=0.1, dropout=0.1)  # these two belong to the training
    assert classifier.options == dict(**TINY, clip_size=[16, 224, 224], cube=[2, 16, 16], eps=1e-6)
    with pytest.raises(UserError, match="three sides"):
        m.VideoMAE(**SMALL, cube=(16, 16))


@pytest.mark.parametrize("size, depth", [("B", 12), ("L", 24), ("H", 32)])
def test_layer_wise_rates_of_every_parameter(size, depth):
    """Groups are by layer, first what decays: optimizer state is matched by position."""
    with torch.device("meta"):
        model = m.VideoClassifier(**m.encoder_size(size), classes=400)
    expected = [(["encoder.patch_embed.proj.weight"], ["encoder.patch_embed.proj.bias"])]
    for i in range(depth):
        names = [name for name, _ in model.named_parameters() if name.startswith(f"encoder.blocks.{i}.")]
        others = [name for name in names if re.search(r"bias$|norm\d\.weight$", name)]
        assert len(others) == 9  # two norms' four and five other biases
        expected.append(([name for name in names if name not in others], others))
    expected.append((["head.weight"], ["fc_norm.weight", "fc_norm.bias", "head.bias"]))
    groups, names_of = m.parameter_groups(model, 0.05, 0.75), {p: name for name, p in model.named_parameters()}
    names = [[names_of[parameter] for parameter in group["params"]] for group in groups]
    assert names == [names for layer in expected for names in layer]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0] * (depth + 2)
    scales = [group["lr_scale"] for group in groups]
    assert scales[::2] == scales[1::2] == pytest.approx([0.75 ** (depth + 1 - layer) for layer in range(depth + 2)])
