"""The networks against the paper's counts, position tables, initial values, regularization and parameter groups."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import masking
import model as m
from support.config import UserError

# Hugging Face's decoder.norm has an eps of 1e-5.
SMALL = dict(width=48, depth=3, heads=4, decoder_width=24, decoder_depth=2, decoder_heads=2, eps=1e-5)
TINY = dict(width=48, depth=2, heads=4, classes=5)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter matter: mask token, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / fan_in**0.5 + (0.3 if parameter.ndim == 1 else 0)
            )
    return module.eval()


def tokens(grid: tuple[int, int, int], batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.stack([masking.random_mask(grid, 0.75, torch.Generator().manual_seed(i)) for i in range(batch)])
    visible, masked = map(torch.stack, zip(*map(masking.split, mask), strict=True))
    return mask, visible, masked


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "size, decoder_depth, count",
    [("S", 4, 24_029_376), ("B", 4, 94_210_944), ("L", 12, 342_996_992), ("H", 12, 692_487_296)],
)
def test_parameter_counts(size, decoder_depth, count):
    with torch.device("meta"):
        model = m.VideoMAE(**m.SIZES[size], decoder_depth=decoder_depth)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("size, count", [("S", 22_033_936), ("B", 86_534_800), ("L", 304_270_736), ("H", 632_119_440)])
def test_classifier_parameter_counts(size, count):
    with torch.device("meta"):
        model = m.VideoClassifier(**m.encoder_size(size), classes=400)
    assert sum(p.numel() for p in model.parameters()) == count


def test_table_8_output_sizes():
    with torch.device("meta"):
        model = m.VideoMAE(**m.SIZES["B"], decoder_depth=4)
        clip = torch.empty(1, 3, 16, 224, 224)
        visible, masked = torch.empty(1, 160, dtype=torch.long), torch.empty(1, 1408, dtype=torch.long)
        assert model.encoder.patch_embed(clip).shape == (1, 8 * 196, 768)
        assert model.encoder(clip, visible).shape == (1, 8 * 20, 768)
        sizes = []
        model.decoder.blocks[0].register_forward_pre_hook(lambda block, inputs: sizes.append(inputs[0].shape))
        assert model(clip, visible, masked).shape == (1, 1408, 1536)
    assert sizes == [(1, 8 * 196, 384)]
    assert model.grid == (8, 14, 14)
    assert m.cube_grid((32, 320, 320), (2, 16, 16)) == (16, 20, 20)  # 6400 tokens


@pytest.mark.parametrize(
    "size, decoder_depth, giga", [("S", 4, 11.5), ("B", 4, 35.4), ("L", 12, 142.6), ("H", 12, 237.6)]
)
def test_multiply_accumulates_of_a_pretraining_forward(size, decoder_depth, giga):
    """The figures count the embedding of all 1568 cubes; this model embeds the 160 visible ones only."""
    with torch.device("meta"):
        model = m.VideoMAE(**m.SIZES[size], decoder_depth=decoder_depth)
        clip, visible, masked = (
            torch.empty(1, 3, 16, 224, 224),
            torch.empty(1, 160, dtype=torch.long),
            torch.empty(1, 1408, dtype=torch.long),
        )
        with FlopCounterMode(display=False) as counter:
            model(clip, visible, masked)
    saved = 1408 * 1536 * m.SIZES[size]["width"]
    assert (counter.get_total_flops() / 2 + saved) / 1e9 == pytest.approx(giga, abs=0.06)


@pytest.mark.parametrize(
    "size, clip_size, giga",
    [
        ("S", (16, 224, 224), 57),
        ("B", (16, 224, 224), 180),
        ("L", (16, 224, 224), 597),
        ("H", (16, 224, 224), 1192),
        ("L", (32, 224, 224), 1436),
        ("L", (32, 320, 320), 3958),
        ("H", (32, 320, 320), 7397),
    ],
)
def test_gflops_of_tables_6_and_7(size, clip_size, giga):
    """The paper counts multiply-accumulates and five operations for each element that a LayerNorm normalizes."""
    normalized = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal normalized
        normalized += inputs[0].numel()

    with torch.device("meta"):
        model = m.VideoClassifier(**m.encoder_size(size), classes=400)
        clip = torch.empty(1, 3, *clip_size)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(count)
        with FlopCounterMode(display=False) as counter:
            assert model(clip).shape == (1, 400)
    assert round((counter.get_total_flops() / 2 + 5 * normalized) / 1e9) == giga


def test_position_table_by_hand():
    table = m.sincos_positions(5, 4)
    angle = torch.tensor([3.0, 3.0 / 100], dtype=torch.float64)  # 10000 ** (2 / 4) = 100
    assert torch.allclose(table[3].double(), torch.stack([angle.sin(), angle.cos()], 1).flatten(), atol=1e-7)
    assert not any("pos_embed" in key for key in m.VideoMAE(**SMALL, clip_size=(4, 32, 32)).state_dict())


def test_only_visible_cubes_matter():
    model = randomize(m.VideoMAE(**SMALL, clip_size=(4, 64, 64)))
    mask, visible, masked = tokens(model.grid, 1)
    clip = torch.randn(1, 3, 4, 64, 64)
    masked_changed = clip.clone()
    area = mask.view(model.grid).repeat_interleave(2, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    masked_changed[:, :, area] = 9.0
    assert torch.equal(model(clip, visible, masked), model(masked_changed, visible, masked))


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


def test_indivisible_sizes_are_refused():
    with pytest.raises(UserError, match="100 pixels of height is not a whole number of cubes of 16"):
        m.VideoMAE(**SMALL, clip_size=(16, 100, 112))
    with pytest.raises(UserError, match="15 frames"):
        m.VideoMAE(**SMALL, clip_size=(15, 112, 112))


def test_interpolated_positions():
    table, grid = torch.randn(4 * 6 * 6, 10), (4, 6, 6)
    assert m.interpolate_positions(table, grid, grid) is table
    constant = torch.randn(10)
    for new in ((4, 9, 9), (8, 6, 6), (8, 9, 10), (2, 3, 3), (1, 6, 6)):
        assert torch.allclose(
            m.interpolate_positions(constant.expand(4 * 6 * 6, -1), grid, new),
            constant.expand(new[0] * new[1] * new[2], -1),
            atol=1e-5,
        )
    # what changes in time alone is interpolated linearly in time, and its place in space does not matter
    times = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 6, 6, 1).reshape(-1, 1)
    stretched = m.interpolate_positions(times, grid, (8, 9, 9)).view(8, 81)
    assert torch.allclose(
        stretched, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])[:, None].expand(8, 81), atol=1e-5
    )
    # and rows and columns are not mixed up
    rows = torch.arange(6.0).view(1, 6, 1, 1).expand(4, 6, 6, 1).reshape(-1, 1)
    stretched = m.interpolate_positions(rows, grid, (4, 12, 6)).view(4, 12, 6)
    assert (
        (stretched.diff(dim=1) > 0.2).sum() >= 4 * 9 * 6
        and stretched.diff(dim=2).abs().max() < 1e-5
        and stretched.diff(dim=0).abs().max() < 1e-5
    )


def test_initial_values_of_the_classifier():
    torch.manual_seed(0)
    model = m.VideoClassifier(**{**TINY, "classes": 400}, clip_size=(4, 32, 32))
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.patch_embed."):
            assert parameter.abs().max() <= 1536**-0.5  # PyTorch's default
        elif "norm" in name:
            assert torch.equal(
                parameter, torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
            )
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            std = 2e-5 if name == "head.weight" else 0.02 * (768 / model.options["width"]) ** 0.5
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name


def test_drop_path_rises_with_depth_and_skips_whole_clips():
    model = m.VideoClassifier(width=48, depth=5, heads=4, classes=3, clip_size=(4, 32, 32), drop_path=0.2)
    assert [block.drop_path.p for block in model.encoder.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    block = randomize(m.Block(width=48, heads=4, eps=1e-6, drop_path=0.5)).train()
    x = torch.randn(400, 3, 48)
    with torch.no_grad():
        attention = block.attn(block.norm1(x))
        torch.manual_seed(0)
        out = block(x)
        skipped = [(out == x).flatten(1).all(dim=1)]
        for after in (x, x + 2 * attention):  # the other branch is skipped: the first was, or was not and counts twice
            both = after + 2 * block.mlp(block.norm2(after))
            skipped += [torch.isclose(out, y, atol=1e-4).flatten(1).all(dim=1) for y in (after, both)]
    outcomes = torch.stack([skipped[1], skipped[2], skipped[3], skipped[4]]).float()
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
    classifier = m.VideoClassifier(**TINY, drop_path=0.1, dropout=0.1)  # these two belong to the training
    assert classifier.options == dict(**TINY, clip_size=[16, 224, 224], cube=[2, 16, 16], eps=1e-6)
    assert m.encoder_size("L") == dict(width=1024, depth=24, heads=16)
    with pytest.raises(UserError, match="model.size=XL is not known; choose one of tiny, S, B, L, H"):
        m.encoder_size("XL")


# ---- the optimizer's parameter groups ----


def groups_by_name(model: torch.nn.Module, *arguments: float) -> list[tuple[list[str], float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = m.parameter_groups(model, *arguments)
    return [([names[id(p)] for p in group["params"]], group["lr_scale"], group["weight_decay"]) for group in groups]


def test_groups_of_pretraining_are_those_of_older_checkpoints():
    """Optimizer state is matched by position, so the order counts."""
    model = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim == 1 or name == "mask_token" else decayed).append(name)
    assert groups_by_name(model, 0.05) == [(decayed, 1.0, 0.05), (others, 1.0, 0.0)]
    assert "mask_token" in others and "encoder.blocks.0.attn.q_bias" in others and "decoder.norm.weight" in others


class WithLastNorm(m.VideoClassifier):
    """As the action detector: the encoder keeps its last norm, and there is none after the mean."""

    def __init__(self) -> None:
        super().__init__(**TINY, clip_size=(4, 32, 32))
        self.encoder.norm = torch.nn.LayerNorm(48)
        del self.fc_norm


@pytest.mark.parametrize("build", [lambda: m.VideoClassifier(**TINY, clip_size=(4, 32, 32)), WithLastNorm])
def test_groups_with_layer_decay_are_those_of_older_checkpoints(build):
    model, expected = build(), {}
    for name, parameter in model.named_parameters():  # by layer and kind, in the order of first occurrence
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        layer = 0 if name.startswith("encoder.patch_embed.") else int(block[1]) + 1 if block else 3
        decays = parameter.ndim > 1
        options = [], 0.75 ** (3 - layer), 0.05 if decays else 0.0
        expected.setdefault((layer, decays), options)[0].append(name)
    assert groups_by_name(model, 0.05, 0.75) == list(expected.values())


def test_layer_wise_rates_of_every_parameter_of_vit_b():
    with torch.device("meta"):
        model = m.VideoClassifier(**m.encoder_size("B"), classes=400)
    scales, decays = {}, {}
    for names, scale, decay in groups_by_name(model, 0.05, 0.75):
        for name in names:
            assert name not in scales  # none twice
            scales[name], decays[name] = scale, decay
    assert scales.keys() == {name for name, _ in model.named_parameters()}  # none forgotten
    assert scales["encoder.patch_embed.proj.weight"] == scales["encoder.patch_embed.proj.bias"]
    assert scales["encoder.patch_embed.proj.bias"] == pytest.approx(0.75**13) == pytest.approx(0.0238, abs=1e-4)
    for name, scale in scales.items():
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        if block:
            assert scale == pytest.approx(0.75 ** (12 - int(block[1]))), name
        elif not name.startswith("encoder.patch_embed."):
            assert name.startswith(("fc_norm.", "head.")) and scale == 1, name
    for name, decay in decays.items():
        assert decay == (0 if re.search(r"bias$|norm\d?\.weight$", name) else 0.05), name
    # a block: two norms' four and five other biases; then the cube embedding's, fc_norm's two, the head's
    assert sum(decay == 0 for decay in decays.values()) == 12 * 9 + 4
    for depth, size in ((24, "L"), (32, "H")):
        with torch.device("meta"):
            model = m.VideoClassifier(**m.encoder_size(size), classes=400)
        smallest = min(scale for _, scale, _ in groups_by_name(model, 0.05, 0.75))
        assert smallest == pytest.approx(0.75 ** (depth + 1))


def test_activation_checkpointing_changes_neither_outputs_nor_gradients():
    x, results = torch.randn(4, 3, 4, 32, 32), []
    for recompute in (False, True):
        model = randomize(m.VideoClassifier(**TINY, clip_size=(4, 32, 32), drop_path=0.5))
        if recompute:
            m.recompute_blocks(model)
        with torch.inference_mode():
            evaluated = model.eval()(x)
        torch.manual_seed(0)  # for drop path
        trained = model.train()(x)
        trained.square().sum().backward()
        results.append([evaluated, trained, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
