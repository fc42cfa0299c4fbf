"""The networks against transformers' VideoMAE, the paper's counts, and weights in all namings."""

import argparse
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode

import masking
import model as m
import support.weights
from support.config import UserError, load_config

SMALL = dict(width=48, depth=3, heads=4, decoder_width=24, decoder_depth=2, decoder_heads=2, eps=1e-5)  # Hugging Face's decoder.norm has 1e-5


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter matter: mask token, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5 + (0.3 if parameter.ndim == 1 else 0))
    return module.eval()


def tokens(grid: tuple[int, int, int], batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.stack([masking.random_mask(grid, 0.75, torch.Generator().manual_seed(i)) for i in range(batch)])
    visible, masked = map(torch.stack, zip(*map(masking.split, mask)))
    return mask, visible, masked


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def hugging_face(model: m.VideoMAE) -> transformers.VideoMAEForPreTraining:
    o = model.options
    config = transformers.VideoMAEConfig(
        image_size=o["clip_size"][1], num_frames=o["clip_size"][0], patch_size=o["cube"][1], tubelet_size=o["cube"][0],
        hidden_size=o["width"], num_hidden_layers=o["depth"], num_attention_heads=o["heads"], intermediate_size=4 * o["width"],
        decoder_hidden_size=o["decoder_width"], decoder_num_hidden_layers=o["decoder_depth"], use_mean_pooling=False,
        decoder_num_attention_heads=o["decoder_heads"], decoder_intermediate_size=4 * o["decoder_width"], layer_norm_eps=o["eps"],
    )  # fmt: skip
    return transformers.VideoMAEForPreTraining(config).eval()


@pytest.mark.parametrize("clip_size, cube", [((16, 64, 64), (2, 16, 16)), ((6, 32, 32), (2, 8, 8)), ((32, 32, 32), (2, 16, 16))])
def test_prediction_and_loss_equal_transformers_both_ways(tmp_path, clip_size, cube):
    import pretrain

    own = randomize(m.VideoMAE(**SMALL, clip_size=clip_size, cube=cube))
    support.weights.export_hugging_face(own, tmp_path)
    theirs, report = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in own.parameters())

    torch.manual_seed(0)
    frames = torch.randint(0, 256, (2, clip_size[0], 3, *clip_size[1:]), dtype=torch.uint8)
    clip = pretrain.data.normalize(frames)  # (B, 3, T, H, W)
    mask, visible, masked = tokens(own.grid, 2)
    with torch.no_grad():
        prediction = own(clip, visible, masked)
        expected = theirs.eval()(clip.transpose(1, 2), bool_masked_pos=mask)
    assert relative(prediction, expected.logits) < 1e-5
    config = load_config(
        pretrain.CONFIGS / "toy.yaml", [f"data.frames={clip_size[0]}", f"data.size={clip_size[1]}", f"model.cube={list(cube)}"]
    )
    loss = pretrain.Objective(config).loss(prediction, frames, masked)
    assert abs(float(loss - expected.loss)) < 1e-5 * float(expected.loss)

    # and back: their weights, as their class names them, into a new model of ours
    theirs = randomize(hugging_face(own))
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    own = m.VideoMAE(**SMALL, clip_size=clip_size, cube=cube)
    support.weights.load_weights(own, tmp_path / "theirs.bin")
    with torch.no_grad():
        assert relative(own(clip, visible, masked), theirs(clip.transpose(1, 2), bool_masked_pos=mask).logits) < 1e-5


def test_safetensors_files_load(tmp_path):
    theirs = randomize(hugging_face(m.VideoMAE(**SMALL, clip_size=(4, 32, 32))))
    theirs.save_pretrained(tmp_path)
    own = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    support.weights.load_weights(own, tmp_path / "model.safetensors")
    assert torch.equal(own.encoder.blocks[1].attn.qkv.weight[48:96], theirs.videomae.encoder.layer[1].attention.attention.key.weight)


@pytest.mark.parametrize("clip_size, cube", [((8, 32, 32), (2, 16, 16)), ((6, 24, 24), (2, 8, 8)), ((16, 64, 64), (2, 16, 16))])
@pytest.mark.parametrize("naming", ["theirs", "hub", "official", "official under module", "own"])
def test_classifier_equals_transformers(tmp_path, clip_size, cube, naming):
    """In every naming: of their class, of the files on their hub, of the authors' files, and this project's."""
    config = transformers.VideoMAEConfig(
        image_size=clip_size[1], num_frames=clip_size[0], patch_size=cube[1], tubelet_size=cube[0], hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-5, num_labels=7,
    )  # fmt: skip
    theirs = randomize(transformers.VideoMAEForVideoClassification(config))
    torch.save(theirs.state_dict(), tmp_path / "file.bin")
    own = m.VideoClassifier(width=48, depth=2, heads=4, classes=7, clip_size=clip_size, cube=cube, eps=1e-5, drop_path=0.3, dropout=0.5).eval()
    support.weights.load_weights(own, tmp_path / "file.bin")
    hub = {key.replace("query.bias", "q_bias").replace("value.bias", "v_bias") for key in theirs.state_dict()}
    assert set(support.weights.to_hugging_face(own.state_dict())) == hub
    if naming != "theirs":
        state = own.state_dict()
        official = {key.removeprefix("encoder."): value for key, value in state.items()}
        own_file = {"model": state, "model_options": own.options, "positions": own.encoder.pos_embed, "classes": list("abcdefg")}
        files = {"hub": support.weights.to_hugging_face(state), "official": official, "official under module": {"module": official, "epoch": 3}, "own": own_file}
        torch.save(files[naming], tmp_path / "file.bin")
        own = m.VideoClassifier(width=48, depth=2, heads=4, classes=7, clip_size=clip_size, cube=cube, eps=1e-5).eval()
        support.weights.load_weights(own, tmp_path / "file.bin")
    clip = torch.randn(2, 3, *clip_size)
    with torch.no_grad():
        logits, expected = own(clip), theirs(clip.transpose(1, 2)).logits
    assert relative(logits, expected) < 1e-5 and float(expected.std()) > 0.1


@pytest.mark.parametrize(
    "size, decoder_depth, count", [("S", 4, 24_029_376), ("B", 4, 94_210_944), ("L", 12, 342_996_992), ("H", 12, 692_487_296)]
)
def test_parameter_counts(size, decoder_depth, count):
    with torch.device("meta"):
        model = m.VideoMAE(**m.SIZES[size], decoder_depth=decoder_depth)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("size, count", [("S", 22_033_936), ("B", 86_534_800), ("L", 304_270_736), ("H", 632_119_440)])
def test_classifier_parameter_counts(size, count):
    encoder = {key: m.SIZES[size][key] for key in ("width", "depth", "heads")}
    with torch.device("meta"):
        model = m.VideoClassifier(**encoder, classes=400)
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


@pytest.mark.parametrize("size, decoder_depth, giga", [("S", 4, 11.5), ("B", 4, 35.4), ("L", 12, 142.6), ("H", 12, 237.6)])
def test_multiply_accumulates_of_a_pretraining_forward(size, decoder_depth, giga):
    """The figures count the embedding of all 1568 cubes; this model embeds the 160 visible ones only."""
    with torch.device("meta"):
        model = m.VideoMAE(**m.SIZES[size], decoder_depth=decoder_depth)
        clip, visible, masked = torch.empty(1, 3, 16, 224, 224), torch.empty(1, 160, dtype=torch.long), torch.empty(1, 1408, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(clip, visible, masked)
    saved = 1408 * 1536 * m.SIZES[size]["width"]
    assert (counter.get_total_flops() / 2 + saved) / 1e9 == pytest.approx(giga, abs=0.06)


@pytest.mark.parametrize(
    "size, clip_size, giga",
    [
        ("S", (16, 224, 224), 57), ("B", (16, 224, 224), 180), ("L", (16, 224, 224), 597), ("H", (16, 224, 224), 1192),
        ("L", (32, 224, 224), 1436), ("L", (32, 320, 320), 3958), ("H", (32, 320, 320), 7397),
    ],
)  # fmt: skip
def test_gflops_of_tables_6_and_7(size, clip_size, giga):
    """The paper counts multiply-accumulates and five operations for each element that a LayerNorm normalises."""
    normalised = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal normalised
        normalised += inputs[0].numel()

    with torch.device("meta"):
        model = m.VideoClassifier(**{key: m.SIZES[size][key] for key in ("width", "depth", "heads")}, classes=400)
        clip = torch.empty(1, 3, *clip_size)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(count)
        with FlopCounterMode(display=False) as counter:
            assert model(clip).shape == (1, 400)
    assert round((counter.get_total_flops() / 2 + 5 * normalised) / 1e9) == giga


def test_position_table_by_hand():
    table = m.sincos_positions(5, 4)
    angle = torch.tensor([3.0, 3.0 / 100], dtype=torch.float64)  # 10000 ** (2 / 4) = 100
    assert torch.allclose(table[3].double(), torch.stack([angle.sin(), angle.cos()], 1).flatten(), atol=1e-7)
    assert not any("pos_embed" in key for key in m.VideoMAE(**SMALL, clip_size=(4, 32, 32)).state_dict())


def test_only_visible_cubes_matter():
    model = randomize(m.VideoMAE(**SMALL, clip_size=(4, 64, 64)))
    mask, visible, masked = tokens(model.grid, 1)
    clip = torch.randn(1, 3, 4, 64, 64)
    hidden_changed = clip.clone()
    area = mask.view(model.grid).repeat_interleave(2, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    hidden_changed[:, :, area] = 9.0
    assert torch.equal(model(clip, visible, masked), model(hidden_changed, visible, masked))


def test_initialisation():
    torch.manual_seed(0)
    model = m.VideoMAE(**m.SIZES["S"], decoder_depth=4)
    bound = (6 / (384 + 3 * 384)) ** 0.5  # q, k, v as one matrix
    weight = model.encoder.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert model.decoder.head.weight.abs().max() <= (6 / (192 + 1536)) ** 0.5
    assert 0 < model.mask_token.abs().max() <= 0.02
    assert all(not block.mlp.fc1.bias.any() for block in model.encoder.blocks)
    assert model.encoder_to_decoder.weight.abs().max() <= 384**-0.5  # PyTorch's default


# ---- weights in ----


def official_pretraining(state: dict) -> dict:
    """As the authors' code saves it: under 'model', beside its command line."""
    return {"model": OrderedDict(state), "optimizer": {"state": {}, "param_groups": []}, "epoch": 799, "args": argparse.Namespace(lr=1e-3, mask_type="tube")}


def test_official_pretraining_checkpoint(tmp_path):
    source = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    torch.save(official_pretraining(source.state_dict()), tmp_path / "official.pth")
    model = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "official.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder."])
def test_official_finetuning_checkpoint(tmp_path, wrapper, prefix):
    source = randomize(m.VideoClassifier(width=48, depth=2, heads=4, classes=5, clip_size=(4, 32, 32)))
    state = {}
    for key, value in source.state_dict().items():
        key = key.removeprefix("encoder.")
        state[key if key.startswith(("head.", "fc_norm.")) and prefix == "encoder." else prefix + key] = value
    torch.save({wrapper: state} if wrapper else state, tmp_path / "official.pth")
    model = m.VideoClassifier(width=48, depth=2, heads=4, classes=5, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "official.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


def test_mmaction2_checkpoint(tmp_path):
    source = randomize(m.VideoClassifier(width=48, depth=2, heads=4, classes=5, clip_size=(4, 32, 32)))
    names = {"encoder.patch_embed.proj": "backbone.patch_embed.projection", "encoder.": "backbone.", "fc_norm": "backbone.fc_norm", "head": "cls_head.fc_cls"}
    state = {"backbone.pos_embed": torch.zeros(1, 8, 48)}
    for key, value in source.state_dict().items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = key.replace(ours, theirs, 1)
                break
        state[key.replace("mlp.fc1", "mlp.layers.0.0").replace("mlp.fc2", "mlp.layers.1")] = value
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "mm.pth")
    model = m.VideoClassifier(width=48, depth=2, heads=4, classes=5, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "mm.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


def test_pretrained_encoder_into_classifier_says_what_is_fresh(tmp_path, capsys):
    source = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    torch.save(official_pretraining(source.state_dict()), tmp_path / "official.pth")
    model = m.VideoClassifier(width=48, depth=3, heads=4, classes=5, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "official.pth", fresh=("fc_norm.", "head."))
    said = capsys.readouterr().err
    assert "start fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in said
    assert "not used: decoder.blocks" in said and "encoder.norm" in said and "mask_token" in said
    assert torch.equal(model.encoder.blocks[2].mlp.fc2.weight, source.encoder.blocks[2].mlp.fc2.weight)


def test_a_head_for_other_classes_starts_fresh_only_if_allowed(tmp_path):
    torch.save(m.VideoClassifier(width=48, depth=1, heads=4, classes=5, clip_size=(4, 32, 32)).state_dict(), tmp_path / "five.pth")
    model = m.VideoClassifier(width=48, depth=1, heads=4, classes=3, clip_size=(4, 32, 32))
    with pytest.raises(UserError, match=r"head.bias is \(5,\), the model's \(3,\)"):
        support.weights.load_weights(model, tmp_path / "five.pth")
    support.weights.load_weights(model, tmp_path / "five.pth", fresh=("head.",))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    small = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    torch.save(small.state_dict(), tmp_path / "three.pth")
    shallow = m.VideoMAE(**{**SMALL, "depth": 2}, clip_size=(4, 32, 32))
    with pytest.raises(UserError, match="encoder.blocks.2.attn.proj.bias is left over"):
        support.weights.load_weights(shallow, tmp_path / "three.pth")
    deep = m.VideoMAE(**{**SMALL, "depth": 4}, clip_size=(4, 32, 32))
    with pytest.raises(UserError, match="encoder.blocks.3.attn.proj.bias is missing"):
        support.weights.load_weights(deep, tmp_path / "three.pth")
    with pytest.raises(UserError, match="no weights at"):
        support.weights.load_weights(small, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(UserError, match="cannot|safely"):
        support.weights.load_weights(small, tmp_path / "text.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        support.weights.load_weights(small, tmp_path / "empty.pth")


class Evil:
    def __reduce__(self):
        return print, ("code from a file was run",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": {}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="safely"):
        support.weights.read_checkpoint(tmp_path / "evil.pth")
    assert "code from a file" not in capsys.readouterr().out


def test_build_from_official_checkpoint_reads_the_sizes(tmp_path):
    torch.save(official_pretraining(m.VideoMAE(**m.SIZES["S"], decoder_depth=2).state_dict()), tmp_path / "official.pth")
    model = support.weights.build_from_checkpoint(tmp_path / "official.pth")
    assert model.options["heads"] == 6 and model.options["decoder_depth"] == 2 and model.grid == (8, 14, 14)
    classifier = m.VideoClassifier(width=384, depth=1, heads=6, classes=4)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="not a pre-training checkpoint"):
        support.weights.build_from_checkpoint(tmp_path / "classifier.pth")


def test_indivisible_sizes_are_refused():
    with pytest.raises(UserError, match="100 pixels of height is not a whole number of cubes of 16"):
        m.VideoMAE(**SMALL, clip_size=(16, 100, 112))
    with pytest.raises(UserError, match="15 frames"):
        m.VideoMAE(**SMALL, clip_size=(15, 112, 112))


# ---- fine-tuning: positions, image weights, regularisation ----

TINY = dict(width=48, depth=2, heads=4, classes=5)


def test_interpolated_positions():
    table, grid = torch.randn(4 * 6 * 6, 10), (4, 6, 6)
    assert m.interpolate_positions(table, grid, grid) is table
    constant = torch.randn(10)
    for new in ((4, 9, 9), (8, 6, 6), (8, 9, 10), (2, 3, 3), (1, 6, 6)):
        assert torch.allclose(m.interpolate_positions(constant.expand(4 * 6 * 6, -1), grid, new), constant.expand(new[0] * new[1] * new[2], -1), atol=1e-5)
    # what changes in time alone is interpolated linearly in time, and its place in space does not matter
    times = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 6, 6, 1).reshape(-1, 1)
    stretched = m.interpolate_positions(times, grid, (8, 9, 9)).view(8, 81)
    assert torch.allclose(stretched, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])[:, None].expand(8, 81), atol=1e-5)
    # and rows and columns are not mixed up
    rows = torch.arange(6.0).view(1, 6, 1, 1).expand(4, 6, 6, 1).reshape(-1, 1)
    stretched = m.interpolate_positions(rows, grid, (4, 12, 6)).view(4, 12, 6)
    assert (stretched.diff(dim=1) > 0.2).sum() >= 4 * 9 * 6 and stretched.diff(dim=2).abs().max() < 1e-5 and stretched.diff(dim=0).abs().max() < 1e-5


def test_weights_of_one_clip_size_run_at_another(tmp_path):
    """16 x 224 x 224 to 32 x 320 x 320, in small: the table is that of the weights, stretched; all else is as it was."""
    small = randomize(m.VideoClassifier(**TINY, clip_size=(4, 48, 48)))
    torch.save({"module": {key.removeprefix("encoder."): value for key, value in small.state_dict().items()}}, tmp_path / "official.pth")
    model = m.VideoClassifier(**TINY, clip_size=(4, 48, 48)).eval()
    support.weights.load_weights(model, tmp_path / "official.pth")
    clip = torch.randn(2, 3, 8, 80, 64)
    with torch.no_grad():
        x = small.encoder.patch_embed(clip) + m.interpolate_positions(small.encoder.pos_embed, (2, 3, 3), (4, 5, 4))
        for block in small.encoder.blocks:
            x = block(x)
        assert torch.equal(model(clip), small.head(small.fc_norm(x.mean(dim=1))))

    # built for the larger clips, the model gives the same: what a checkpoint of this project keeps is enough for that
    torch.save({"model": small.state_dict(), "model_options": small.options, "positions": small.encoder.pos_embed}, tmp_path / "own.pt")
    large = m.VideoClassifier(**TINY, clip_size=(8, 80, 64)).eval()
    support.weights.load_weights(large, tmp_path / "own.pt")
    assert support.weights.read_options(tmp_path / "own.pt")["clip_size"] == [4, 48, 48]
    with torch.no_grad():
        assert relative(large(clip), small(clip)) < 1e-6
        assert torch.equal(support.weights.build_classifier(tmp_path / "own.pt").eval()(clip), small(clip))


def image_vit(naming: str, side: int = 3) -> dict[str, torch.Tensor]:
    """Random weights of a 2-D ViT of TINY's size, 16 x 16 patches, as timm or facebookresearch/mae name them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {"cls_token": draw(1, 1, 48), "pos_embed": draw(1, side * side + 1, 48), "patch_embed.proj.weight": draw(48, 3, 16, 16) / 9, "patch_embed.proj.bias": draw(48)}
    for i in range(2):
        shapes = {
            "norm1.weight": (48,), "norm1.bias": (48,), "attn.qkv.weight": (144, 48), "attn.qkv.bias": (144,), "attn.proj.weight": (48, 48), "attn.proj.bias": (48,),
            "norm2.weight": (48,), "norm2.bias": (48,), "mlp.fc1.weight": (192, 48), "mlp.fc1.bias": (192,), "mlp.fc2.weight": (48, 192), "mlp.fc2.bias": (48,),
        }  # fmt: skip
        state |= {f"blocks.{i}.{name}": draw(*shape) for name, shape in shapes.items()}
    state |= {"norm.weight": draw(48), "norm.bias": draw(48)}
    if naming == "timm":
        state |= {"head.weight": draw(1000, 48), "head.bias": draw(1000)}
    else:
        state |= {"mask_token": draw(1, 1, 24), "decoder_pos_embed": draw(1, side * side + 1, 24), "decoder_embed.weight": draw(24, 48), "decoder_embed.bias": draw(24)}
        state |= {f"decoder_blocks.0.{name}": draw(*shape) for name, shape in {"norm1.weight": (24,), "attn.qkv.weight": (72, 24), "attn.qkv.bias": (72,)}.items()}
        state |= {"decoder_norm.weight": draw(24), "decoder_norm.bias": draw(24), "decoder_pred.weight": draw(768, 24), "decoder_pred.bias": draw(768)}
    return state


@pytest.mark.parametrize("naming", ["timm", "mae"])
@pytest.mark.parametrize("cube_frames", [2, 4])
def test_inflated_image_weights(tmp_path, capsys, naming, cube_frames):
    """A still video gives through the cube embedding what the image gave, in each slice of time."""
    image_state = image_vit(naming)
    torch.save(image_state if naming == "timm" else {"model": image_state}, tmp_path / "image.pth")
    model = m.VideoClassifier(**TINY, clip_size=(8, 48, 48), cube=(cube_frames, 16, 16)).eval()
    fresh_head = model.head.weight.clone()
    support.weights.load_weights(model, tmp_path / "image.pth", fresh=("fc_norm.", "head."))
    said = capsys.readouterr().err
    assert "weights of an image model, inflated" in said and "start fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in said
    left_over = said.partition("not used: ")[2]
    assert "cls_token" in left_over and "encoder.norm" in left_over and ("decoder_embed" in left_over and "mask_token" in left_over) == (naming == "mae")
    assert torch.equal(model.head.weight, fresh_head)

    image = torch.randn(2, 3, 48, 48)
    expected = F.conv2d(image, image_state["patch_embed.proj.weight"], image_state["patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)  # (2, 9, 48)
    with torch.no_grad():
        embedded = model.encoder.patch_embed(image[:, :, None].expand(-1, -1, 8, -1, -1)).unflatten(1, (8 // cube_frames, 9))
    assert all(relative(embedded[:, slot], expected) < 1e-6 for slot in range(8 // cube_frames))

    # the image's positions in each slice of time, but for what tells slices apart, which is 0 on average and as large
    positions = model.encoder.pos_embed.view(8 // cube_frames, 9, 48)
    assert torch.allclose(positions.mean(dim=0), image_state["pos_embed"][0, 1:], atol=1e-5)
    added = positions - positions.mean(dim=0)
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-6)
    assert float(added.std()) == pytest.approx(float(image_state["pos_embed"][0, 1:].std()), rel=0.05)

    # a bias of the keys changes nothing: timm's own attention, written out, is this project's
    block, x = model.encoder.blocks[1], torch.randn(2, 7, 48)
    q, k, v = (part.unflatten(2, (4, 12)).transpose(1, 2) for part in F.linear(x, image_state["blocks.1.attn.qkv.weight"], image_state["blocks.1.attn.qkv.bias"]).chunk(3, dim=2))
    attended = ((q @ k.transpose(2, 3)) / 12**0.5).softmax(dim=3) @ v
    attended = F.linear(attended.transpose(1, 2).flatten(2), image_state["blocks.1.attn.proj.weight"], image_state["blocks.1.attn.proj.bias"])
    assert image_state["blocks.1.attn.qkv.bias"][48:96].abs().max() > 0.05
    with torch.no_grad():
        assert relative(block.attn(x), attended) < 1e-5
    assert torch.equal(block.mlp.fc1.weight, image_state["blocks.1.mlp.fc1.weight"])


def test_image_positions_of_another_size_are_interpolated(tmp_path):
    state = image_vit("timm", side=3)
    state["pos_embed"] = state["pos_embed"][:, :1].expand(-1, 10, -1)  # the same everywhere
    torch.save(state, tmp_path / "image.pth")
    model = m.VideoClassifier(**TINY, clip_size=(2, 80, 64))
    support.weights.load_weights(model, tmp_path / "image.pth", fresh=("fc_norm.", "head."))
    assert torch.allclose(model.encoder.pos_embed, state["pos_embed"][0, 0].expand(20, -1), atol=1e-5)  # one slice of time: nothing is added


@pytest.mark.parametrize("kind", ["own", "image", "official"])
def test_weights_of_another_width_are_refused_in_a_sentence(tmp_path, kind):
    source = m.VideoMAE(**SMALL, clip_size=(4, 48, 48))
    content = {"own": dict(model=source.state_dict(), model_options=source.options), "image": image_vit("timm"), "official": {"model": source.state_dict()}}
    torch.save(content[kind], tmp_path / "file.pth")
    model = m.VideoClassifier(width=96, depth=3, heads=4, classes=5, clip_size=(4, 48, 48))
    with pytest.raises(UserError, match="does not fit this VideoClassifier"):
        support.weights.load_weights(model, tmp_path / "file.pth", fresh=("fc_norm.", "head."))


def test_classifier_initialisation():
    torch.manual_seed(0)
    model = m.VideoClassifier(**{**TINY, "classes": 400}, clip_size=(4, 32, 32))
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.patch_embed."):
            assert parameter.abs().max() <= 1536**-0.5  # PyTorch's default
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter))
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02 * (0.001 if name == "head.weight" else 1), rel=0.05), name


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
