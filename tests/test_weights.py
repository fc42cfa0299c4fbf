"""Weights in all namings, against transformers, mmaction2 and image models; what configurations need of them."""

import argparse
import json
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, run
from test_model import SMALL, TINY, randomize, relative, tokens

import model as m
import pretrain
import support.video
import support.weights
from support.config import UserError, as_dict, load_config


def hugging_face(model: m.VideoMAE) -> transformers.VideoMAEForPreTraining:
    o = model.options
    config = transformers.VideoMAEConfig(
        image_size=o["clip_size"][1],
        num_frames=o["clip_size"][0],
        patch_size=o["cube"][1],
        tubelet_size=o["cube"][0],
        hidden_size=o["width"],
        num_hidden_layers=o["depth"],
        num_attention_heads=o["heads"],
        intermediate_size=4 * o["width"],
        decoder_hidden_size=o["decoder_width"],
        decoder_num_hidden_layers=o["decoder_depth"],
        use_mean_pooling=False,
        decoder_num_attention_heads=o["decoder_heads"],
        decoder_intermediate_size=4 * o["decoder_width"],
        layer_norm_eps=o["eps"],
    )
    return transformers.VideoMAEForPreTraining(config).eval()


@pytest.mark.parametrize(
    "clip_size, cube", [((16, 64, 64), (2, 16, 16)), ((6, 32, 32), (2, 8, 8)), ((32, 32, 32), (2, 16, 16))]
)
def test_prediction_and_loss_equal_transformers_both_ways(tmp_path, clip_size, cube):
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
        pretrain.DEFAULT.parent / "toy.yaml",
        [f"data.frames={clip_size[0]}", f"data.size={clip_size[1]}", f"model.cube={list(cube)}"],
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
    assert torch.equal(
        own.encoder.blocks[1].attn.qkv.weight[48:96], theirs.videomae.encoder.layer[1].attention.attention.key.weight
    )


@pytest.mark.parametrize(
    "clip_size, cube", [((8, 32, 32), (2, 16, 16)), ((6, 24, 24), (2, 8, 8)), ((16, 64, 64), (2, 16, 16))]
)
@pytest.mark.parametrize("naming", ["theirs", "hub", "official", "official under module", "own"])
def test_classifier_equals_transformers(tmp_path, clip_size, cube, naming):
    """In every naming: of their class, of the files on their hub, of the authors' files, and this project's."""
    config = transformers.VideoMAEConfig(
        image_size=clip_size[1],
        num_frames=clip_size[0],
        patch_size=cube[1],
        tubelet_size=cube[0],
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        layer_norm_eps=1e-5,
        num_labels=7,
    )
    theirs = randomize(transformers.VideoMAEForVideoClassification(config))
    torch.save(theirs.state_dict(), tmp_path / "file.bin")
    own = m.VideoClassifier(
        width=48, depth=2, heads=4, classes=7, clip_size=clip_size, cube=cube, eps=1e-5, drop_path=0.3, dropout=0.5
    ).eval()
    support.weights.load_weights(own, tmp_path / "file.bin")
    hub = {key.replace("query.bias", "q_bias").replace("value.bias", "v_bias") for key in theirs.state_dict()}
    assert set(support.weights.to_hugging_face(own.state_dict())) == hub
    if naming != "theirs":
        state = own.state_dict()
        official = {key.removeprefix("encoder."): value for key, value in state.items()}
        own_file = {
            "model": state,
            "model_options": own.options,
            "positions": own.encoder.pos_embed,
            "classes": list("abcdefg"),
        }
        files = {
            "hub": support.weights.to_hugging_face(state),
            "official": official,
            "official under module": {"module": official, "epoch": 3},
            "own": own_file,
        }
        torch.save(files[naming], tmp_path / "file.bin")
        own = m.VideoClassifier(width=48, depth=2, heads=4, classes=7, clip_size=clip_size, cube=cube, eps=1e-5).eval()
        support.weights.load_weights(own, tmp_path / "file.bin")
    clip = torch.randn(2, 3, *clip_size)
    with torch.no_grad():
        logits, expected = own(clip), theirs(clip.transpose(1, 2)).logits
    assert relative(logits, expected) < 1e-5 and float(expected.std()) > 0.1


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- weights in ----


def official_pretraining(state: dict) -> dict:
    """As the authors' code saves it: under 'model', with its command line."""
    return {
        "model": OrderedDict(state),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 799,
        "args": argparse.Namespace(lr=1e-3, mask_type="tube"),
    }


def test_official_pretraining_checkpoint(tmp_path):
    source = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    torch.save(official_pretraining(source.state_dict()), tmp_path / "official.pth")
    model = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "official.pth")
    assert same(model, source)


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_official_checkpoint_with_its_optimizer(tmp_path, module):
    """As the authors' save_model writes it: their schedule is a numpy array, so learning rates are numpy's scalars."""
    model = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    optimizer = torch.optim.AdamW(m.parameter_groups(model, 0.05), lr=1e-3)
    schedule = np.linspace(0, 1e-3, 10)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = schedule[3] * group["lr_scale"], np.float32(0.05)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    scaler = {"scale": 65536.0, "_growth_tracker": np.int64(3)}
    content = official_pretraining(model.state_dict()) | {"optimizer": optimizer.state_dict(), "scaler": scaler}
    torch.save(content, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "official.pth", "w") as old:
        for name in new.namelist():  # scalars are in one module until numpy 1, in the other since
            content, count = re.subn(rb"numpy\._?core\.multiarray", f"{module}.multiarray".encode(), new.read(name))
            assert bool(count) == name.endswith("data.pkl")
            old.writestr(name, content)
    again = m.VideoMAE(**SMALL, clip_size=(4, 32, 32))
    support.weights.load_weights(again, tmp_path / "official.pth")
    assert same(again, model)
    groups = support.weights.read_checkpoint(tmp_path / "official.pth")[1]["optimizer"]["param_groups"]
    assert groups[0]["lr"] == schedule[3] and groups[1]["weight_decay"] == np.float32(0.05)


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
    assert same(model, source)


@pytest.mark.parametrize("naming", ["own", "official", "hub"])
@pytest.mark.parametrize(
    "keys, prefix",
    [
        (["model_state_dict"], "module."),
        (["model_state"], "_orig_mod.module."),
        (["model_ema"], "module._orig_mod."),
        (["state_dict"], "model.module.backbone."),
        ([], "model.backbone."),
        (["model", "state_dict"], "module.model._orig_mod.model."),
    ],
)
def test_wrappers_in_any_order_and_depth(tmp_path, naming, keys, prefix):
    source = randomize(m.VideoClassifier(**TINY, clip_size=(4, 32, 32)))
    state = source.state_dict()
    if naming == "official":
        state = {key.removeprefix("encoder."): value for key, value in state.items()}
    elif naming == "hub":
        state = support.weights.to_hugging_face(state)
    content = {prefix + key: value for key, value in state.items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "file.pth")
    model = m.VideoClassifier(**TINY, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "file.pth")
    assert same(model, source)


def test_a_part_that_was_compiled_and_a_model_without_head(tmp_path):
    """torch.compile(model.encoder) names the wrapper in the middle; transformers' VideoMAEModel has no prefix."""
    source = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    compiled = {key.replace("encoder.blocks", "encoder._orig_mod.blocks"): x for key, x in source.state_dict().items()}
    bare = hugging_face(source).videomae
    bare.load_state_dict(
        {
            key.replace("q_bias", "query.bias").replace("v_bias", "value.bias").removeprefix("videomae."): x
            for key, x in support.weights.to_hugging_face(source.state_dict()).items()
            if key.startswith("videomae.")
        }
    )
    for state in (compiled, bare.state_dict()):
        torch.save(state, tmp_path / "file.pth")
        model = m.VideoClassifier(**{**TINY, "depth": 3}, clip_size=(4, 32, 32))
        support.weights.load_weights(model, tmp_path / "file.pth", fresh=("fc_norm.", "head."))
        assert same(model.encoder.blocks, source.encoder.blocks)


def test_mmaction2_checkpoint(tmp_path):
    source = randomize(m.VideoClassifier(width=48, depth=2, heads=4, classes=5, clip_size=(4, 32, 32)))
    names = {
        "encoder.patch_embed.proj": "backbone.patch_embed.projection",
        "encoder.": "backbone.",
        "fc_norm": "backbone.fc_norm",
        "head": "cls_head.fc_cls",
    }
    state = {"backbone.pos_embed": m.sincos_positions(8, 48)[None]}
    for key, value in source.state_dict().items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = key.replace(ours, theirs, 1)
                break
        state[key.replace("mlp.fc1", "mlp.layers.0.0").replace("mlp.fc2", "mlp.layers.1")] = value
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "mm.pth")
    model = m.VideoClassifier(width=48, depth=2, heads=4, classes=5, clip_size=(4, 32, 32))
    support.weights.load_weights(model, tmp_path / "mm.pth")
    assert same(model, source) and torch.equal(model.encoder.pos_embed, source.encoder.pos_embed)


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
    torch.save(
        m.VideoClassifier(width=48, depth=1, heads=4, classes=5, clip_size=(4, 32, 32)).state_dict(),
        tmp_path / "five.pth",
    )
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
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "evil",
    [
        Evil(print, "code from a file was run"),
        np.array([Evil(print, "code from a file was run")], dtype=object),
        Evil(np.frombuffer, b"12345678"),
    ],
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys, evil):
    torch.save({"model": {"lr": np.float64(0.1)}, "args": evil}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="safely"):
        support.weights.read_checkpoint(tmp_path / "evil.pth")
    assert "code from a file" not in capsys.readouterr().out


def test_build_from_official_checkpoint_reads_the_sizes(tmp_path):
    torch.save(
        official_pretraining(m.VideoMAE(**m.SIZES["S"], decoder_depth=2).state_dict()), tmp_path / "official.pth"
    )
    model = support.weights.build_from_checkpoint(tmp_path / "official.pth", m.VideoMAE)
    assert model.options["heads"] == 6 and model.options["decoder_depth"] == 2 and model.grid == (8, 14, 14)
    classifier = m.VideoClassifier(width=384, depth=1, heads=6, classes=4)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="not a pre-training checkpoint"):
        support.weights.build_from_checkpoint(tmp_path / "classifier.pth", m.VideoMAE)


def test_weights_of_one_clip_size_run_at_another(tmp_path):
    """16 x 224 x 224 to 32 x 320 x 320, in small: the table is that of the weights, interpolated; all else stays."""
    small = randomize(m.VideoClassifier(**TINY, clip_size=(4, 48, 48)))
    torch.save(
        {"module": {key.removeprefix("encoder."): value for key, value in small.state_dict().items()}},
        tmp_path / "official.pth",
    )
    model = m.VideoClassifier(**TINY, clip_size=(4, 48, 48)).eval()
    support.weights.load_weights(model, tmp_path / "official.pth")
    clip = torch.randn(2, 3, 8, 80, 64)
    with torch.no_grad():
        x = small.encoder.patch_embed(clip) + m.interpolate_positions(small.encoder.pos_embed, (2, 3, 3), (4, 5, 4))
        for block in small.encoder.blocks:
            x = block(x)
        assert torch.equal(model(clip), small.head(small.fc_norm(x.mean(dim=1))))

    # built for the larger clips, the model gives the same: what a checkpoint of this project keeps is enough for that
    torch.save(
        {"model": small.state_dict(), "model_options": small.options, "positions": small.encoder.pos_embed},
        tmp_path / "own.pt",
    )
    large = m.VideoClassifier(**TINY, clip_size=(8, 80, 64)).eval()
    support.weights.load_weights(large, tmp_path / "own.pt")
    assert support.weights.read_options(tmp_path / "own.pt")["clip_size"] == [4, 48, 48]
    with torch.no_grad():
        assert relative(large(clip), small(clip)) < 1e-6
        assert torch.equal(
            support.weights.build_from_checkpoint(tmp_path / "own.pt", m.VideoClassifier).eval()(clip), small(clip)
        )


# ---- stored position tables ----


def logits_with(model: m.VideoClassifier, positions: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """Written out: positions (N, D) of the clip's own grid."""
    x = model.encoder.patch_embed(clip) + positions
    for block in model.encoder.blocks:
        x = block(x)
    return model.head(model.fc_norm(x.mean(dim=1)))


@pytest.mark.parametrize(
    "name", ["encoder.pos_embed", "backbone.pos_embed", "pos_embed", "videomae.embeddings.position_embeddings"]
)
@pytest.mark.parametrize("batched", [True, False])
@torch.no_grad()
def test_a_learned_position_table_is_used(tmp_path, name, batched):
    source = randomize(m.VideoClassifier(**TINY, clip_size=(4, 48, 48)))
    learned, clip = torch.randn(2 * 3 * 3, 48), torch.randn(1, 3, 4, 48, 48)
    torch.save({**source.state_dict(), name: learned[None] if batched else learned}, tmp_path / "file.pth")
    model = m.VideoClassifier(**TINY, clip_size=(4, 48, 48)).eval()
    support.weights.load_weights(model, tmp_path / "file.pth")
    assert torch.equal(model(clip), logits_with(source, learned, clip))
    larger = torch.randn(1, 3, 8, 64, 64)
    stretched = m.interpolate_positions(learned, (2, 3, 3), (4, 4, 4))
    assert torch.equal(model(larger), logits_with(source, stretched, larger))


def test_a_position_table_of_other_clips_is_interpolated_or_refused(tmp_path):
    source = m.VideoClassifier(**TINY, clip_size=(8, 48, 48))
    content = {"model": {**source.state_dict(), "encoder.pos_embed": torch.randn(1, 4 * 3 * 3, 48)}}
    torch.save(content, tmp_path / "official.pth")
    model = m.VideoClassifier(**TINY, clip_size=(4, 48, 48))
    sentence = r"model.pretrained_clip or stage\?\): encoder.pos_embed is \(36, 48\), the model's \(18, 48\)"
    with pytest.raises(UserError, match=sentence):
        support.weights.load_weights(model, tmp_path / "official.pth")
    torch.save(content | {"model_options": source.options}, tmp_path / "own.pth")  # its grid is known
    support.weights.load_weights(model, tmp_path / "own.pth")
    expected = m.interpolate_positions(content["model"]["encoder.pos_embed"][0], (4, 3, 3), (2, 3, 3))
    assert torch.equal(model.encoder.pos_embed, expected)


@torch.no_grad()
def test_position_tables_of_encoder_and_decoder_are_told_apart(tmp_path):
    source = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    source.encoder.pos_embed.normal_(), source.pos_embed.normal_()
    tables = {"encoder.pos_embed": source.encoder.pos_embed, "pos_embed": source.pos_embed[None]}
    torch.save({"model": source.state_dict() | tables}, tmp_path / "file.pth")
    model = m.VideoMAE(**SMALL, clip_size=(4, 32, 32)).eval()
    support.weights.load_weights(model, tmp_path / "file.pth")
    _, visible, masked = tokens(model.grid, 1)
    clip = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(model(clip, visible, masked), source(clip, visible, masked))
    classifier = m.VideoClassifier(**{**TINY, "depth": 3}, clip_size=(4, 32, 32))
    support.weights.load_weights(classifier, tmp_path / "file.pth", fresh=("fc_norm.", "head."))
    assert torch.equal(classifier.encoder.pos_embed, source.encoder.pos_embed)


# ---- image models ----


def image_vit(naming: str, side: int = 3) -> dict[str, torch.Tensor]:
    """Random weights of a 2-D ViT of TINY's size, 16 x 16 patches, as timm or facebookresearch/mae name them."""
    generator = torch.Generator().manual_seed(1)

    def sample(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {
        "cls_token": sample(1, 1, 48),
        "pos_embed": sample(1, side * side + 1, 48),
        "patch_embed.proj.weight": sample(48, 3, 16, 16) / 9,
        "patch_embed.proj.bias": sample(48),
    }
    for i in range(2):
        shapes = {
            "norm1.weight": (48,),
            "norm1.bias": (48,),
            "attn.qkv.weight": (144, 48),
            "attn.qkv.bias": (144,),
            "attn.proj.weight": (48, 48),
            "attn.proj.bias": (48,),
            "norm2.weight": (48,),
            "norm2.bias": (48,),
            "mlp.fc1.weight": (192, 48),
            "mlp.fc1.bias": (192,),
            "mlp.fc2.weight": (48, 192),
            "mlp.fc2.bias": (48,),
        }
        state |= {f"blocks.{i}.{name}": sample(*shape) for name, shape in shapes.items()}
    state |= {"norm.weight": sample(48), "norm.bias": sample(48)}
    if naming == "timm":
        state |= {"head.weight": sample(1000, 48), "head.bias": sample(1000)}
    else:
        state |= {
            "mask_token": sample(1, 1, 24),
            "decoder_pos_embed": sample(1, side * side + 1, 24),
            "decoder_embed.weight": sample(24, 48),
            "decoder_embed.bias": sample(24),
        }
        state |= {
            f"decoder_blocks.0.{name}": sample(*shape)
            for name, shape in {"norm1.weight": (24,), "attn.qkv.weight": (72, 24), "attn.qkv.bias": (72,)}.items()
        }
        state |= {
            "decoder_norm.weight": sample(24),
            "decoder_norm.bias": sample(24),
            "decoder_pred.weight": sample(768, 24),
            "decoder_pred.bias": sample(768),
        }
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
    assert (
        "weights of an image model, inflated" in said
        and "start fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in said
    )
    left_over = said.partition("not used: ")[2]
    assert (
        "cls_token" in left_over
        and "encoder.norm" in left_over
        and ("decoder_embed" in left_over and "mask_token" in left_over) == (naming == "mae")
    )
    assert torch.equal(model.head.weight, fresh_head)

    image = torch.randn(2, 3, 48, 48)
    expected = (
        F.conv2d(image, image_state["patch_embed.proj.weight"], image_state["patch_embed.proj.bias"], stride=16)
        .flatten(2)
        .transpose(1, 2)
    )  # (2, 9, 48)
    with torch.no_grad():
        embedded = model.encoder.patch_embed(image[:, :, None].expand(-1, -1, 8, -1, -1)).unflatten(
            1, (8 // cube_frames, 9)
        )
    assert all(relative(embedded[:, slot], expected) < 1e-6 for slot in range(8 // cube_frames))

    # the image's positions in each slice of time, but for what tells slices apart, which is 0 on average and as large
    positions = model.encoder.pos_embed.view(8 // cube_frames, 9, 48)
    assert torch.allclose(positions.mean(dim=0), image_state["pos_embed"][0, 1:], atol=1e-5)
    added = positions - positions.mean(dim=0)
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-6)
    assert float(added.std()) == pytest.approx(float(image_state["pos_embed"][0, 1:].std()), rel=0.05)

    # a bias of the keys changes nothing: timm's own attention, written out, is this project's
    block, x = model.encoder.blocks[1], torch.randn(2, 7, 48)
    q, k, v = (
        part.unflatten(2, (4, 12)).transpose(1, 2)
        for part in F.linear(x, image_state["blocks.1.attn.qkv.weight"], image_state["blocks.1.attn.qkv.bias"]).chunk(
            3, dim=2
        )
    )
    attended = ((q @ k.transpose(2, 3)) / 12**0.5).softmax(dim=3) @ v
    attended = F.linear(
        attended.transpose(1, 2).flatten(2),
        image_state["blocks.1.attn.proj.weight"],
        image_state["blocks.1.attn.proj.bias"],
    )
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
    assert torch.allclose(
        model.encoder.pos_embed, state["pos_embed"][0, 0].expand(20, -1), atol=1e-5
    )  # one slice of time: nothing is added


@pytest.mark.parametrize("kind", ["own", "image", "official"])
def test_weights_of_another_width_are_refused_in_a_sentence(tmp_path, kind):
    source = m.VideoMAE(**SMALL, clip_size=(4, 48, 48))
    content = {
        "own": dict(model=source.state_dict(), model_options=source.options),
        "image": image_vit("timm"),
        "official": {"model": source.state_dict()},
    }
    torch.save(content[kind], tmp_path / "file.pth")
    model = m.VideoClassifier(width=96, depth=3, heads=4, classes=5, clip_size=(4, 48, 48))
    with pytest.raises(UserError, match="does not fit this VideoClassifier"):
        support.weights.load_weights(model, tmp_path / "file.pth", fresh=("fc_norm.", "head."))


# ---- what configurations need of weights ----

FINETUNE = ROOT / "configs/finetune/toy.yaml"


def test_the_configuration_for_weights(tmp_path):
    """A .yaml file on the command line, else the checkpoint's own, else Kinetics' recipe; overrides go over each."""
    model = m.VideoClassifier(**TINY, clip_size=(4, 32, 32))
    own = as_dict(load_config(FINETUNE, ["data.frames=4", "data.stride=3"]))
    torch.save(dict(model=model.state_dict(), model_options=model.options, config=own), tmp_path / "own.pt")
    torch.save(model.state_dict(), tmp_path / "official.pth")

    def stored(name: str, *settings: object) -> SimpleNamespace:
        return support.weights.stored_config(tmp_path / name, FINETUNE, list(map(str, settings)))

    assert as_dict(stored("own.pt")) == own and stored("own.pt", "data.stride=2").data.stride == 2
    recipe = FINETUNE.with_name("k400_base.yaml")
    assert as_dict(stored("official.pth")) == as_dict(load_config(FINETUNE, [str(recipe)]))
    assert stored("official.pth", "data.stride=2").data.stride == 2
    assert as_dict(stored("own.pt", recipe)) == as_dict(load_config(FINETUNE, [str(recipe)]))


def test_the_encoder_is_built_for_the_clips_that_init_was_trained_on(tmp_path):
    model = m.VideoMAE(**SMALL, clip_size=(6, 32, 64))
    torch.save(dict(model=model.state_dict(), model_options=model.options), tmp_path / "own.pt")
    torch.save(model.state_dict(), tmp_path / "official.pth")
    clips = {"scratch": [4, 96, 96], tmp_path / "own.pt": [6, 32, 64], tmp_path / "official.pth": [8, 48, 48]}
    for init, clip_size in clips.items():
        more = ["data.frames=4", "data.size=96", "model.pretrained_clip=[8,48,48]", f"init={init}"]
        options = support.weights.encoder_options(config := load_config(FINETUNE, more), config.init)
        assert options == dict(width=128, depth=4, heads=4, clip_size=clip_size, cube=[2, 16, 16])


def test_init_has_to_be_there(tmp_path):
    (tmp_path / "weights.pt").touch()
    support.weights.check_init(str(tmp_path / "weights.pt"))
    support.weights.check_init("scratch", "scratch")
    sentence = "no weights at init=none.pt: make them with pretrain.py, name another file, or start with init=scratch"
    with pytest.raises(UserError, match=sentence):
        support.weights.check_init("none.pt", "scratch")
    for init in ("scratch", ""):
        with pytest.raises(UserError, match=f"no weights at init={init}: make them with pretrain.py, or name another"):
            support.weights.check_init(init)


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model of other clips and cubes than the paper's, as transformers saves it."""
    sizes = dict(num_frames=6, image_size=40, patch_size=8, tubelet_size=3)
    heads = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192)
    config = transformers.VideoMAEConfig(**sizes, **heads, num_labels=7, layer_norm_eps=1e-6)
    folder = tmp_path_factory.mktemp("hugging_face")
    randomize(transformers.VideoMAEForVideoClassification(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", ["", "model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder_says_which_clips_it_is_for(hugging_face_folder, tmp_path, file):
    """Its folder or its file; what the caller says of clips is for weights that say nothing."""
    shutil.copytree(hugging_face_folder, tmp_path, dirs_exist_ok=True)
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path).eval()
    if file == "pytorch_model.bin":
        torch.save(theirs.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    own = support.weights.build_from_checkpoint(tmp_path / file, m.VideoClassifier, (16, 224, 224)).eval()
    expected = dict(width=48, depth=2, heads=4, classes=7, clip_size=[6, 40, 40], cube=[3, 8, 8], eps=1e-6)
    assert own.options == expected
    clip = torch.randn(2, 3, 6, 40, 40)
    with torch.no_grad():
        assert relative(own(clip), theirs(clip.transpose(1, 2)).logits) < 1e-5
    assert support.weights.read_checkpoint(tmp_path / file)[1]["config.json"]["num_frames"] == 6

    config = support.weights.stored_config(tmp_path / file, FINETUNE, ["data.stride=2"])
    assert (config.data.frames, config.data.size, config.model.cube, config.data.stride) == (6, 40, [3, 8, 8], 2)
    recipe = support.weights.stored_config(tmp_path / file, FINETUNE, [str(FINETUNE.with_name("k400_base.yaml"))])
    assert (recipe.data.frames, recipe.data.size) == (16, 224)
    support.weights.check_init(str(tmp_path / file), "scratch")
    config = load_config(FINETUNE, [f"init={tmp_path / file}", "model.pretrained_clip=[16,224,224]"])
    assert support.weights.encoder_options(config, config.init)["clip_size"] == [6, 40, 40]


def test_weights_of_a_hugging_face_folder_run_at_other_clips(hugging_face_folder):
    model = m.VideoClassifier(**TINY | {"classes": 7}, clip_size=(9, 64, 64), cube=(3, 8, 8))
    support.weights.load_weights(model, hugging_face_folder)
    table = m.interpolate_positions(m.sincos_positions(2 * 5 * 5, 48), (2, 5, 5), (3, 8, 8))
    assert torch.equal(model.encoder.pos_embed, table)


@pytest.mark.parametrize("width, stated, heads", [(384, 6, 6), (384, 16, 6), (384, 12, 12), (128, 8, 8)])
def test_the_number_of_heads_is_that_of_the_config_json(tmp_path, width, stated, heads):
    """But for transformers' conversions of ViT-S: theirs says 16, while the authors trained 6."""
    torch.save(m.VideoClassifier(width=width, depth=1, heads=2, classes=3).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": stated}), encoding="utf-8-sig")
    assert support.weights.read_options(tmp_path)["heads"] == heads


def test_a_run_folder_and_folders_without_weights(tmp_path):
    with pytest.raises(UserError, match="no weights at .*; give the path of a checkpoint file"):
        support.weights.read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no weights at init="):
        support.weights.check_init(str(tmp_path), "scratch")
    torch.save(m.VideoClassifier(**TINY).state_dict(), tmp_path / "checkpoint.pt")
    assert support.weights.weights_file(tmp_path) == tmp_path / "checkpoint.pt"
    support.weights.read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is another kind of file"):
        support.weights.read_checkpoint(tmp_path)


@torch.no_grad()
def logits_of(folder: Path, clip: torch.Tensor) -> torch.Tensor:
    """What transformers makes of a folder and a normalized clip (B, 3, T, H, W)."""
    kind = transformers.VideoMAEForVideoClassification
    theirs, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.config.use_mean_pooling
    return theirs.eval()(clip.transpose(1, 2)).logits


CLASSES = ["brush hair", "Jump_up", "été", "run", "0"]


@pytest.fixture
def fine_tuned(tmp_path: Path) -> Path:
    """A checkpoint as finetune.py writes it."""
    model = randomize(m.VideoClassifier(**TINY, clip_size=(4, 32, 32)))
    config = as_dict(load_config(FINETUNE, ["data.frames=4", "data.size=32"]))
    facts = dict(model_options=model.options, positions=model.encoder.pos_embed, classes=CLASSES)
    torch.save(dict(model=model.state_dict(), **facts, config=config), tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_fine_tuned_classifier_there_and_back(fine_tuned, tmp_path, monkeypatch, file):
    """To transformers with safetensors and without it, back from its folder, and back from one that it has saved."""
    run("support.weights", fine_tuned, tmp_path / "there")
    if file == "pytorch_model.bin":  # what an earlier export left is not read instead
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        (tmp_path / "there" / "model.safetensors").write_text("of another model")
    done = run("support.weights", fine_tuned, tmp_path / "there")
    monkeypatch.undo()
    assert f"{fine_tuned} is a fine-tuned classifier of 5 classes\nwrote {tmp_path / 'there'}: " in done.stdout
    assert f"transformers.VideoMAEForVideoClassification.from_pretrained('{tmp_path / 'there'}')" in done.stdout
    assert [path.name for path in (tmp_path / "there").iterdir() if path.suffix != ".json"] == [file]
    clip = torch.randn(2, 3, 4, 32, 32)
    own = support.weights.build_from_checkpoint(fine_tuned, m.VideoClassifier).eval()
    assert relative(logits_of(tmp_path / "there", clip), own(clip)) < 1e-5

    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "there")
    assert theirs.config.id2label == dict(enumerate(CLASSES)) and theirs.config.label2id["été"] == 2
    theirs.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "there", tmp_path / "saved"):
        back = support.weights.build_from_checkpoint(folder, m.VideoClassifier).eval()
        assert back.options == own.options and torch.equal(back(clip), own(clip))
        labels = support.weights.read_checkpoint(folder)[1]["config.json"]["id2label"]
        assert [labels[str(number)] for number in range(5)] == CLASSES
    run("support.weights", tmp_path / "saved", tmp_path / "again")  # a model of transformers, once more
    assert json.loads((tmp_path / "again/config.json").read_text())["id2label"] == labels
    assert torch.equal(logits_of(tmp_path / "again", clip), logits_of(tmp_path / "there", clip))


@torch.no_grad()
def test_transformers_pipeline_classifies_a_video(fine_tuned, tmp_path):
    """The same frames of a real file through their reader and processor, and through this project's."""
    frames = torch.rand(6, 3, 4, 5).mul(255).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)  # (6, 3, 32, 40)
    support.video.write_mp4(tmp_path / "a.mp4", frames, rate=8)
    run("support.weights", fine_tuned, tmp_path / "exported")
    # With the image processor the pipeline reads by av, with the video processor, made of the same file, by torchcodec.
    image_processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "exported")
    model = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "exported")
    classify = transformers.pipeline("video-classification", model=model, image_processor=image_processor)
    found = {answer["label"]: answer["score"] for answer in classify(str(tmp_path / "a.mp4"), top_k=5)}
    frames = support.video.read_frames(tmp_path / "a.mp4", [0, 1, 2, 3])
    clip = pretrain.data.normalize(pretrain.data.crop_views(frames, 32, 1))  # (1, 3, T, 32, 32)
    logits = support.weights.build_from_checkpoint(fine_tuned, m.VideoClassifier).eval()(clip)
    expected = dict(zip(CLASSES, logits[0].softmax(dim=0).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5) and max(found.values()) - min(found.values()) > 0.05
    assert torch.equal(image_processor(list(frames), return_tensors="pt").pixel_values.transpose(1, 2), clip)


def test_what_transformers_cannot_express_is_refused(fine_tuned, tmp_path):
    content = torch.load(fine_tuned)
    config = content["config"] | {"data": content["config"]["data"] | {"frames": 8}}
    torch.save(content | {"config": config}, tmp_path / "longer.pt")
    torch.save(content | {"positions": torch.randn(8, 48)}, tmp_path / "learned.pt")
    detector = {key: value for key, value in content["model"].items() if not key.startswith("fc_norm.")}
    torch.save(content | {"model": detector}, tmp_path / "detector.pt")
    sentences = {
        "longer": "longer.pt was trained on clips of another size than its position table's",
        "learned": "the computed position table only",
        "detector": "does not fit this VideoClassifier .*fc_norm.bias is missing",
        "none": "no weights at",
    }
    for name, sentence in sentences.items():
        failed = run("support.weights", tmp_path / f"{name}.pt", tmp_path / "exported", ok=False)
        assert failed.returncode != 0 and re.search(sentence, failed.stderr) and "\n" not in failed.stderr.strip()
        assert not (tmp_path / "exported").exists()


def test_the_command_that_exports_a_pretrained_model(tmp_path):
    model = randomize(m.VideoMAE(**SMALL, clip_size=(4, 32, 32)))
    config = {"target": {"normalize": False}}
    torch.save(dict(model=model.state_dict(), model_options=model.options, config=config), tmp_path / "checkpoint.pt")
    done = run("support.weights", tmp_path / "checkpoint.pt", tmp_path / "exported")
    assert f"{tmp_path}/checkpoint.pt is a pre-trained model\nwrote {tmp_path / 'exported'}: " in done.stdout
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "exported").eval()
    assert theirs.config.norm_pix_loss is False and theirs.config.num_attention_heads == 4
    mask, visible, masked = tokens(model.grid, 1)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        expected = theirs(clip.transpose(1, 2), bool_masked_pos=mask).logits
        assert relative(model(clip, visible, masked), expected) < 1e-5
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "exported")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and processor.size["shortest_edge"] == 32
