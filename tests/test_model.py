"""The networks against transformers' VideoMAE, the paper's counts, and weights in all namings."""

import argparse
from collections import OrderedDict

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import masking
import model as m
from common import UserError

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
    m.export_hugging_face(own, tmp_path)
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
    config = pretrain.common.load_config(
        pretrain.CONFIGS / "toy.yaml", [f"data.frames={clip_size[0]}", f"data.size={clip_size[1]}", f"model.cube={list(cube)}"]
    )
    loss = pretrain.Objective(config).loss(prediction, frames, masked)
    assert abs(float(loss - expected.loss)) < 1e-5 * float(expected.loss)

    # and back: their weights, as their class names them, into a new model of ours
    theirs = randomize(hugging_face(own))
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    own = m.VideoMAE(**SMALL, clip_size=clip_size, cube=cube)
    m.load_weights(own, tmp_path / "theirs.bin")
    with torch.no_grad():
        assert relative(own(clip, visible, masked), theirs(clip.transpose(1, 2), bool_masked_pos=mask).logits) < 1e-5


def test_safetensors_files_load(tmp_path):
    theirs = randomize(hugging_face(m.VideoMAE(**SMALL, clip_size=(4, 32, 32))))
    theirs.save_pretrained(tmp_path)
    own = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    m.load_weights(own, tmp_path / "model.safetensors")
    assert torch.equal(own.encoder.blocks[1].attn.qkv.weight[48:96], theirs.videomae.encoder.layer[1].attention.attention.key.weight)


def test_classifier_equals_transformers(tmp_path):
    config = transformers.VideoMAEConfig(
        image_size=32, num_frames=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-5, num_labels=7
    )
    theirs = randomize(transformers.VideoMAEForVideoClassification(config))
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    own = m.VideoClassifier(width=48, depth=2, heads=4, classes=7, clip_size=(8, 32, 32), eps=1e-5)
    m.load_weights(own, tmp_path / "theirs.bin")
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        assert relative(own(clip), theirs(clip.transpose(1, 2)).logits) < 1e-5
    assert {key for key in m.to_hugging_face(own.state_dict())} == {key.replace("query.bias", "q_bias").replace("value.bias", "v_bias") for key in theirs.state_dict()}


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
    m.load_weights(model, tmp_path / "official.pth")
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
    m.load_weights(model, tmp_path / "official.pth")
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
    m.load_weights(model, tmp_path / "mm.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


def test_pretrained_encoder_into_classifier_says_what_is_fresh(tmp_path, capsys):
    source = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    torch.save(official_pretraining(source.state_dict()), tmp_path / "official.pth")
    model = m.VideoClassifier(width=48, depth=3, heads=4, classes=5, clip_size=(4, 32, 32))
    m.load_weights(model, tmp_path / "official.pth", fresh=("fc_norm.", "head."))
    said = capsys.readouterr().err
    assert "start fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in said
    assert "not used: decoder.blocks" in said and "encoder.norm" in said and "mask_token" in said
    assert torch.equal(model.encoder.blocks[2].mlp.fc2.weight, source.encoder.blocks[2].mlp.fc2.weight)


def test_a_head_for_other_classes_starts_fresh_only_if_allowed(tmp_path):
    torch.save(m.VideoClassifier(width=48, depth=1, heads=4, classes=5, clip_size=(4, 32, 32)).state_dict(), tmp_path / "five.pth")
    model = m.VideoClassifier(width=48, depth=1, heads=4, classes=3, clip_size=(4, 32, 32))
    with pytest.raises(UserError, match=r"head.bias is \(5,\), the model's \(3,\)"):
        m.load_weights(model, tmp_path / "five.pth")
    m.load_weights(model, tmp_path / "five.pth", fresh=("head.",))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    small = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    torch.save(small.state_dict(), tmp_path / "three.pth")
    shallow = m.VideoMAE(**{**SMALL, "depth": 2}, clip_size=(4, 32, 32))
    with pytest.raises(UserError, match="encoder.blocks.2.attn.proj.bias is left over"):
        m.load_weights(shallow, tmp_path / "three.pth")
    deep = m.VideoMAE(**{**SMALL, "depth": 4}, clip_size=(4, 32, 32))
    with pytest.raises(UserError, match="encoder.blocks.3.attn.proj.bias is missing"):
        m.load_weights(deep, tmp_path / "three.pth")
    with pytest.raises(UserError, match="no weights at"):
        m.load_weights(small, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(UserError, match="cannot|safely"):
        m.load_weights(small, tmp_path / "text.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        m.load_weights(small, tmp_path / "empty.pth")


class Evil:
    def __reduce__(self):
        return print, ("code from a file was run",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": {}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="safely"):
        m.read_checkpoint(tmp_path / "evil.pth")
    assert "code from a file" not in capsys.readouterr().out


def test_build_from_official_checkpoint_reads_the_sizes(tmp_path):
    torch.save(official_pretraining(m.VideoMAE(**m.SIZES["S"], decoder_depth=2).state_dict()), tmp_path / "official.pth")
    model = m.build_from_checkpoint(tmp_path / "official.pth")
    assert model.options["heads"] == 6 and model.options["decoder_depth"] == 2 and model.grid == (8, 14, 14)
    classifier = m.VideoClassifier(width=384, depth=1, heads=6, classes=4)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="not a pre-training checkpoint"):
        m.build_from_checkpoint(tmp_path / "classifier.pth")


def test_indivisible_sizes_are_refused():
    with pytest.raises(UserError, match="100 pixels of height is not a whole number of cubes of 16"):
        m.VideoMAE(**SMALL, clip_size=(16, 100, 112))
    with pytest.raises(UserError, match="15 frames"):
        m.VideoMAE(**SMALL, clip_size=(15, 112, 112))
