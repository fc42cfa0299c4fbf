"""Weights of every source, against transformers and image models; what configurations need of them; the export."""

import argparse
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, run
from test_model import SMALL, TINY, randomize, relative, tokens

import model as m
import pretrain
import support.weights as w
from detect_ava import ActionDetector
from support.config import UserError, as_dict, load_config
from support.weight_files import describes, read_checkpoint, weights_file
from support.weights import build_from_checkpoint, load_weights
from tools.export_hugging_face import describe, to_hugging_face

CLIP = dict(clip_size=(4, 32, 32))
NEW = ("fc_norm.", "head.")
EXPORT = "tools.export_hugging_face"
FINETUNE = ROOT / "configs/finetune/toy.yaml"
HUB = dict(num_frames=8, image_size=64, hidden_size=384, num_hidden_layers=1, patch_size=16, tubelet_size=2)


def classifier(**options: object) -> m.VideoClassifier:
    return randomize(m.VideoClassifier(**TINY | CLIP | options))


def autoencoder(**options: object) -> m.VideoMAE:
    return randomize(m.VideoMAE(**SMALL | CLIP | options))


def save(model: torch.nn.Module, path: Path, **more: object) -> Path:
    """Write a checkpoint as the stages do."""
    torch.save(dict(model=model.state_dict(), model_options=model.options) | more, path)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def named(state: dict, *pairs: tuple[str, str]) -> dict:
    """A state dict in which names are replaced, by regular expressions."""
    for old, new in pairs:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def namings(model: m.VideoMAE | m.VideoClassifier) -> dict[str, dict]:
    """A model's state dict under the names of every source."""
    state, hub = model.state_dict(), to_hugging_face(model.state_dict())
    names = {
        "own": state,
        "compiled encoder": named(state, (r"encoder\.blocks", "encoder._orig_mod.blocks")),
        "hub": hub,
        "transformers 5": named(hub, (r"\.q_bias", ".query.bias"), (r"\.v_bias", ".value.bias")),
        "transformers' VideoMAEModel": named(hub, ("^videomae.", "")),
    }
    if isinstance(model, m.VideoClassifier):
        official = named(state, (r"^encoder\.", ""))
        mmaction2 = named(official, (r"^(?!head)", "backbone."), ("^head", "cls_head.fc_cls"))
        layers = ("embed.proj", "embed.projection"), (r"mlp\.fc1", "mlp.layers.0.0"), (r"mlp\.fc2", "mlp.layers.1")
        names |= {"official": official, "mmaction2": named(mmaction2, *layers)}
        names["official detection"] = named(official, ("^head", "roi_heads.action.predictor.cls_score"))
        names["all under the encoder"] = named(official, ("^", "encoder."))
    return names


# keys under which the tensors are, and what stands before their names
LAYOUTS = [("", ""), ("module", "backbone."), ("model_state_dict", "module."), ("model_ema", "module._orig_mod.")]
LAYOUTS += [("model state_dict", "model.module.backbone._orig_mod.model.")]


@pytest.mark.parametrize("build", [autoencoder, classifier])
@pytest.mark.parametrize("keys, prefix", LAYOUTS)
def test_names_of_every_source_in_every_layout(tmp_path, build, keys, prefix):
    source = build()
    for name, state in namings(source).items():
        content = named(state, ("^", prefix))
        for key in reversed(keys.split()):
            content = {key: content, "epoch": 3}
        torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=bool(keys))  # or as before torch 1.6
        model = type(source)(**source.options)
        load_weights(model, tmp_path / "file.pth")
        assert same(model, source), name


def hugging_face(model: m.VideoMAE | m.VideoClassifier, **options: object) -> transformers.PreTrainedModel:
    """Transformers' model of the same sizes, with other weights."""
    classes = [f"class {i}" for i in range(model.options.get("classes", 0))]
    config = transformers.VideoMAEConfig(**describe(model, True, classes) | options)
    return randomize(getattr(transformers, config.architectures[0])(config))


@torch.no_grad()
@pytest.mark.parametrize(
    "clip_size, cube", [((16, 64, 64), (2, 16, 16)), ((6, 32, 32), (2, 8, 8)), ((32, 32, 32), (2, 16, 16))]
)
def test_prediction_loss_and_logits_equal_transformers(tmp_path, clip_size, cube):
    own = m.VideoMAE(**SMALL, clip_size=clip_size, cube=cube)
    theirs = hugging_face(own)
    theirs.save_pretrained(tmp_path)
    load_weights(own, tmp_path)
    frames = torch.randint(0, 256, (2, clip_size[0], 3, *clip_size[1:]), dtype=torch.uint8)
    clip = pretrain.data.normalize(frames)  # (B, 3, T, H, W)
    mask, visible, masked = tokens(own.grid, 2)
    prediction, expected = own(clip, visible, masked), theirs(clip.transpose(1, 2), bool_masked_pos=mask)
    assert relative(prediction, expected.logits) < 1e-5
    more = [f"data.frames={clip_size[0]}", f"data.size={clip_size[1]}", f"model.cube={list(cube)}"]
    more.append("target.normalize=true")
    loss = pretrain.Objective(load_config(pretrain.DEFAULT, more)).loss(prediction, frames, masked)
    assert abs(float(loss - expected.loss)) < 1e-5 * float(expected.loss)

    own = m.VideoClassifier(**TINY, clip_size=clip_size, cube=cube, eps=1e-5, drop_path=0.3, dropout=0.5).eval()
    theirs = hugging_face(own)
    torch.save(theirs.state_dict(), tmp_path / "classifier.bin")
    load_weights(own, tmp_path / "classifier.bin")
    expected = theirs(clip.transpose(1, 2)).logits
    assert relative(own(clip), expected) < 1e-5 and float(expected.std()) > 0.1


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_official_checkpoint_with_its_optimizer_and_command_line(tmp_path, module):
    """As the authors' save_model writes it: their schedule is a numpy array, so learning rates are numpy's scalars."""
    model = autoencoder()
    group = dict(lr=np.float64(0.1), weight_decay=np.float32(0.05), growth=np.int64(3))
    content = dict(model=model.state_dict(), args=argparse.Namespace(mask_type="tube"), optimizer=group)
    torch.save(content, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "official.pth", "w") as old:
        for name in new.namelist():  # scalars are in one module until numpy 1, in the other since
            content, count = re.subn(rb"numpy\._?core\.multiarray", f"{module}.multiarray".encode(), new.read(name))
            assert bool(count) == name.endswith("data.pkl")
            old.writestr(name, content)
    again = m.VideoMAE(**SMALL, **CLIP)
    load_weights(again, tmp_path / "official.pth")
    assert same(again, model) and read_checkpoint(tmp_path / "official.pth")[1]["optimizer"] == group


def test_one_line_says_what_is_loaded_new_and_not_needed(tmp_path, capsys):
    """What is missing, of another shape or fresh keeps its initial values."""
    pretrained, tuned = autoencoder().state_dict(), classifier(depth=3).state_dict()
    new = "encoder loaded; fc_norm, head new; decoder, encoder.norm, encoder_to_decoder, mask_token not needed"
    for content, classes, options, sentence in (
        (pretrained, 5, dict(fresh=NEW), new),
        (pretrained, 5, dict(optional=NEW), new),
        (tuned, 5, dict(optional=NEW), "encoder, fc_norm, head loaded"),
        (tuned, 5, dict(fresh=("head.",)), "encoder, fc_norm loaded; head new"),
        (tuned, 7, dict(optional=NEW), "encoder, fc_norm loaded; head new"),
        ({"model": tuned, "model_ema": tuned}, 5, {}, "encoder, fc_norm, head loaded; model_ema not used"),
    ):
        torch.save(content, tmp_path / "file.pth")
        model = m.VideoClassifier(**TINY | CLIP | dict(depth=3, classes=classes))
        head = model.head.weight.clone()
        load_weights(model, tmp_path / "file.pth", **options)
        assert capsys.readouterr().err == f"{tmp_path / 'file.pth'}: {sentence}\n"
        assert torch.equal(model.head.weight, head) == ("head new" in sentence)
    detector = ActionDetector(**TINY | CLIP | dict(depth=3))
    load_weights(detector, tmp_path / "file.pth", fresh=("head.",), optional=("encoder.norm.",))
    assert "encoder loaded; encoder.norm, head new; fc_norm not needed" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return print, ("code from a file was run",)


@pytest.mark.parametrize("evil", [Evil(), np.array([Evil()], dtype=object)])
def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys, evil):
    torch.save({"model": {"lr": np.float64(0.1)}, "args": evil}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="safely"):
        read_checkpoint(tmp_path / "evil.pth")
    assert "code from a file" not in capsys.readouterr().out


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    five = classifier()
    files = {"pretrained": autoencoder().state_dict(), "five": five.state_dict(), "image": image_vit("timm")}
    files |= {"list": [1], "empty": {"model": {"epoch": 3}}}
    files["strange"] = five.state_dict() | {"norm_pre.bias": torch.zeros(1)}
    files["no positions"] = {key: value for key, value in files["image"].items() if key != "pos_embed"}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text").write_text("not a checkpoint")
    hugging_face(five, use_mean_pooling=False).save_pretrained(tmp_path / "first token")
    wide = m.VideoClassifier(width=96, depth=3, heads=4, classes=5, clip_size=(4, 48, 48))
    for model, name, sentence in (
        (autoencoder(depth=2), "pretrained", "encoder.blocks.2.attn.proj.bias is left over"),
        (autoencoder(depth=4), "pretrained", "encoder.blocks.3.attn.proj.bias is missing"),
        (classifier(classes=3), "five", r"head.bias is \(5,\), the model's \(3,\)"),
        (five, "strange", "norm_pre.bias is left over"),
        (five, "no positions", "does not fit this VideoClassifier"),
        (five, "first token", r"classifies by the first token \(use_mean_pooling=False\)"),
        (five, "text", "safely"),
        (five, "list", "holds no named tensors"),
        (five, "empty", "holds no named tensors"),
        (wide, "image", "does not fit this VideoClassifier"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_weights(model, tmp_path / name)


def test_positions_are_those_of_the_pretraining_clips(tmp_path):
    """16 x 224 x 224 to 32 x 320 x 320, in small: computed and learned ones. An unknown grid is refused."""
    small, learned = classifier(clip_size=(4, 48, 48)), torch.randn(18, 48)
    large, computed = classifier(clip_size=(8, 80, 64)), m.sincos_positions(18, 48)
    state = small.state_dict()
    own = dict(model=state, model_options=small.options)
    for model, content, table in (
        (small, state, computed),
        (small, state | {"backbone.pos_embed": learned[None]}, learned),
        (small, state | {"videomae.embeddings.position_embeddings": learned}, learned),
        (large, own, m.interpolate_positions(computed, (2, 3, 3), (4, 5, 4))),
        (large, own | dict(positions=learned), m.interpolate_positions(learned, (2, 3, 3), (4, 5, 4))),
    ):
        torch.save(content, tmp_path / "file.pth")
        load_weights(model, tmp_path / "file.pth")
        assert torch.equal(model.encoder.pos_embed, table)
    torch.save(state | {"pos_embed": learned}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"pretrained_clip .*: encoder.pos_embed is \(18, 48\), the model's \(80, 48\)"):
        load_weights(large, tmp_path / "file.pth")


def test_a_model_with_another_table_keeps_it_unless_the_file_has_one(tmp_path):
    """Here a separable one: first half of the width for time, second half for space."""
    model, source = classifier(clip_size=(8, 48, 48)), classifier(clip_size=(4, 48, 48))
    time, space = m.sincos_positions(4, 24), m.sincos_positions(9, 24)
    separable = torch.cat([time[:, None].expand(-1, 9, -1), space.expand(4, -1, -1)], dim=2).flatten(0, 1)
    model.encoder.pos_embed.copy_(separable)
    load_weights(model, save(source, tmp_path / "file.pth"))
    assert torch.equal(model.encoder.pos_embed, separable) and same(model, source)
    load_weights(model, save(source, tmp_path / "file.pth", positions=source.encoder.pos_embed))
    table = m.interpolate_positions(source.encoder.pos_embed, (2, 3, 3), (4, 3, 3))
    assert torch.equal(model.encoder.pos_embed, table)


@torch.no_grad()
def test_position_tables_of_encoder_and_decoder_are_told_apart(tmp_path):
    source, tuned = autoencoder(), classifier(depth=3)
    tables = {"encoder.pos_embed": torch.randn(8, 48), "pos_embed": torch.randn(1, 8, 24)}
    torch.save({"model": source.state_dict() | tables}, tmp_path / "file.pth")
    for model in (source, tuned):
        load_weights(model, tmp_path / "file.pth", optional=NEW)
        assert torch.equal(model.encoder.pos_embed, tables["encoder.pos_embed"])
    assert torch.equal(source.pos_embed, tables["pos_embed"][0])


def image_vit(naming: str) -> dict[str, torch.Tensor]:
    """Random weights of a 2-D ViT of TINY's size with 3 x 3 patches, as timm or facebookresearch/mae name them."""
    encoder = autoencoder(depth=2, clip_size=(1, 48, 48), cube=(1, 16, 16)).encoder
    state = encoder.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    for i in range(2):
        q, v = state.pop(f"blocks.{i}.attn.q_bias"), state.pop(f"blocks.{i}.attn.v_bias")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.randn(48), v])
    state |= dict(cls_token=torch.randn(1, 1, 48), pos_embed=0.3 * torch.randn(1, 10, 48))
    if naming == "timm":
        return state | {"head.weight": torch.randn(1000, 48), "head.bias": torch.randn(1000)}
    names = "mask_token decoder_pos_embed decoder_embed.weight decoder_blocks.0.attn.qkv.bias decoder_pred.bias"
    return state | {name: torch.randn(24) for name in names.split()}


@torch.no_grad()
@pytest.mark.parametrize("naming, cube_frames", [("timm", 2), ("timm", 4), ("mae", 2)])
def test_inflated_image_weights(tmp_path, capsys, naming, cube_frames):
    """A still video gives through the cube embedding what the image gave, in each slice of time."""
    image_state = image_vit(naming)
    torch.save(image_state if naming == "timm" else {"model": image_state}, tmp_path / "image.pth")
    model, slots = m.VideoClassifier(**TINY, clip_size=(8, 48, 48), cube=(cube_frames, 16, 16)).eval(), 8 // cube_frames
    load_weights(model, tmp_path / "image.pth", fresh=NEW)
    said = capsys.readouterr().err
    assert "weights of an image model, inflated" in said and ("decoder_embed" in said) == (naming == "mae")
    assert "encoder loaded; fc_norm" in said and "cls_token" in said

    image = torch.randn(2, 3, 48, 48)
    expected = F.conv2d(image, image_state["patch_embed.proj.weight"], image_state["patch_embed.proj.bias"], stride=16)
    embedded = model.encoder.patch_embed(image[:, :, None].expand(-1, -1, 8, -1, -1)).unflatten(1, (slots, 9))
    assert all(relative(embedded[:, slot], expected.flatten(2).transpose(1, 2)) < 1e-6 for slot in range(slots))

    # the image's positions in each slice of time, but for what tells slices apart, which is 0 on average and as large
    positions = model.encoder.pos_embed.view(slots, 9, 48)
    assert torch.allclose(positions.mean(dim=0), image_state["pos_embed"][0, 1:], atol=1e-5)
    added = positions - positions.mean(dim=0)
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-6)
    assert float(added.std()) == pytest.approx(float(image_state["pos_embed"][0, 1:].std()), rel=0.05)

    bias = image_state["blocks.1.attn.qkv.bias"]  # the part of the keys changes nothing
    attention = model.encoder.blocks[1].attn
    assert torch.equal(attention.q_bias, bias[:48]) and torch.equal(attention.v_bias, bias[96:])
    assert torch.equal(attention.qkv.weight, image_state["blocks.1.attn.qkv.weight"])


def test_image_positions_of_another_size_are_interpolated(tmp_path):
    state = image_vit("timm")
    state["pos_embed"] = state["pos_embed"][:, :1].expand(-1, 10, -1)  # the same everywhere
    torch.save(state, tmp_path / "image.pth")
    model = classifier(clip_size=(2, 80, 64))  # one slice of time: nothing is added
    load_weights(model, tmp_path / "image.pth", fresh=NEW)
    assert torch.allclose(model.encoder.pos_embed, state["pos_embed"][0, 0].expand(20, -1), atol=1e-5)


def test_the_configuration_for_weights(tmp_path):
    """A .yaml file on the command line, else the checkpoint's own, else Kinetics' recipe; overrides go over each."""
    own = as_dict(load_config(FINETUNE, ["data.frames=4", "data.stride=3"]))
    torch.save(dict(model=classifier().state_dict(), config=own), tmp_path / "own.pt")
    torch.save(classifier().state_dict(), tmp_path / "official.pth")
    recipe = str(FINETUNE.with_name("k400_base.yaml"))
    kinetics = as_dict(load_config(FINETUNE, [recipe]))
    cases = [("own.pt", [], own), ("own.pt", [recipe], kinetics), ("official.pth", [], kinetics)]
    for name, settings, expected in cases:
        assert as_dict(w.stored_config(tmp_path / name, FINETUNE, settings)) == expected
        changed = expected | dict(data=expected["data"] | dict(stride=2))
        assert as_dict(w.stored_config(tmp_path / name, FINETUNE, [*settings, "data.stride=2"])) == changed


def test_the_encoder_is_built_for_the_clips_of_the_pretraining(tmp_path):
    model = autoencoder(clip_size=(6, 32, 64))
    save(model, tmp_path / "own.pt")
    torch.save(model.state_dict(), tmp_path / "official.pth")
    settings = ["data.frames=4", "data.size=96", "model.pretrained_clip=[8,48,48]", "model.cube=[2,16,16]"]
    config = load_config(FINETUNE, settings)
    clips = {"scratch": [4, 96, 96], tmp_path / "own.pt": [6, 32, 64], tmp_path / "official.pth": [8, 48, 48]}
    for init, clip_size in clips.items():
        expected = dict(width=128, depth=4, heads=4, clip_size=clip_size, cube=[2, 16, 16])
        assert w.encoder_options(config, str(init)) == expected


@torch.no_grad()
@pytest.mark.parametrize("file", ["", "model.safetensors", "pytorch_model.bin"])
def test_a_hugging_face_folder_says_which_clips_it_is_for(tmp_path, capsys, file):
    """Its folder or its file; what the caller says of clips is for weights that say nothing."""
    source = classifier(clip_size=(6, 40, 40), cube=(3, 8, 8), classes=7, eps=1e-6)
    theirs = hugging_face(source)
    theirs.save_pretrained(tmp_path)
    if file == "pytorch_model.bin":
        torch.save(theirs.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    path, clip = tmp_path / file, torch.randn(2, 3, 6, 40, 40)
    own = build_from_checkpoint(path, m.VideoClassifier, (16, 224, 224)).eval()
    assert own.options == source.options and relative(own(clip), theirs(clip.transpose(1, 2)).logits) < 1e-5
    large = classifier(clip_size=(9, 64, 64), cube=(3, 8, 8), classes=7)
    load_weights(large, path)
    table = m.interpolate_positions(m.sincos_positions(2 * 5 * 5, 48), (2, 5, 5), (3, 8, 8))
    assert torch.equal(large.encoder.pos_embed, table)
    config = w.stored_config(path, FINETUNE, ["data.stride=2"])
    assert (config.data.frames, config.data.size, config.model.cube, config.data.stride) == (6, 40, [3, 8, 8], 2)
    recipe = w.stored_config(path, FINETUNE, [str(FINETUNE.with_name("k400_base.yaml"))])
    assert (recipe.data.frames, recipe.data.size) == (16, 224)
    assert w.encoder_options(config, str(path))["clip_size"] == [6, 40, 40]
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    load_weights(classifier(classes=7, cube=(3, 8, 8), clip_size=(6, 40, 40)), path)
    assert "head loaded; config.json, which does not describe these weights, not used" in capsys.readouterr().err


@pytest.mark.parametrize("width, stated, heads", [(384, 6, 6), (384, 16, 6), (384, 12, 12), (128, 8, 8), (768, 0, 12)])
def test_the_number_of_heads_is_that_of_the_config_json_or_of_the_width(tmp_path, width, stated, heads):
    """But for transformers' conversions of ViT-S: theirs says 16, while the authors trained 6."""
    torch.save(m.VideoClassifier(width=width, depth=1, heads=2, classes=3).state_dict(), tmp_path / "pytorch_model.bin")
    if stated:
        hub = HUB | dict(hidden_size=width, num_attention_heads=stated)
        (tmp_path / "config.json").write_text(json.dumps(hub), encoding="utf-8-sig")
    assert w.read_options(tmp_path)["heads"] == heads


@pytest.mark.parametrize("other", [{}, *({key: 32} for key in HUB), dict(id2label={"0": "a", "1": "b"})])
def test_a_config_json_counts_only_if_it_is_that_of_the_weights(other):
    state = m.VideoClassifier(width=384, depth=1, heads=6, classes=3).state_dict()
    counts = other in ({}, {"num_frames": 32}, {"image_size": 32})  # which the weights do not tell
    assert describes(HUB | other, state) == counts


def test_weights_in_several_files(tmp_path):
    """By transformers, found by their folder, their index or any of them; by DeepSpeed, in the folder of a step."""
    theirs = hugging_face(classifier(eps=1e-6))
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    first, *others = sorted(tmp_path.glob("*.safetensors"))
    assert len(others) > 1
    theirs.save_pretrained(tmp_path / "one")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", first):
        model = build_from_checkpoint(path, m.VideoClassifier)
        assert same(model, build_from_checkpoint(tmp_path / "one", m.VideoClassifier))
    w.check_init(str(tmp_path))
    first.unlink()
    with pytest.raises(UserError, match=f"no weights at .*{first.name}"):
        read_checkpoint(tmp_path)
    step = tmp_path / "output/checkpoint-49"
    step.mkdir(parents=True)
    torch.save({"module": model.state_dict()}, step / "mp_rank_00_model_states.pt")
    (tmp_path / "output/latest").write_text("checkpoint-49\n")
    assert weights_file(tmp_path / "output") == weights_file(step) == step / "mp_rank_00_model_states.pt"


CLASSES = ["brush hair", "Jump_up", "été", "run", "0"]


@pytest.fixture
def fine_tuned(tmp_path: Path) -> Path:
    """A checkpoint as finetune.py writes it."""
    model = classifier()
    config = as_dict(load_config(FINETUNE, ["data.frames=4", "data.size=32", "model.cube=[2,16,16]"]))
    more = dict(classes=CLASSES, config=config, positions=model.encoder.pos_embed)
    return save(model, tmp_path / "checkpoint.pt", **more)


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_fine_tuned_classifier_there_and_back(fine_tuned, tmp_path, monkeypatch, file):
    """To transformers with safetensors and without it, back from its folder, and back from one that it has saved."""
    there, clip = tmp_path / "there", torch.randn(2, 3, 4, 32, 32)
    if file == "pytorch_model.bin":  # what an earlier export left is not read instead
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        there.mkdir()
        (there / "model.safetensors").write_text("of another model")
    done = run(EXPORT, fine_tuned, there)
    monkeypatch.undo()
    assert f"{fine_tuned} is a fine-tuned classifier of 5 classes\nwrote {there}: " in done.stdout
    assert [path.name for path in there.iterdir() if path.suffix != ".json"] == [file]

    kind = transformers.VideoMAEForVideoClassification
    theirs, report = kind.from_pretrained(there, output_loading_info=True)
    own = build_from_checkpoint(fine_tuned, m.VideoClassifier).eval()
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert relative(theirs.eval()(clip.transpose(1, 2)).logits, own(clip)) < 1e-5
    processor = transformers.VideoMAEImageProcessor.from_pretrained(there)
    frames = torch.randint(0, 256, (4, 3, 40, 32), dtype=torch.uint8)
    expected = pretrain.data.normalize(pretrain.data.crop_views(frames, 32, 1))  # (1, 3, T, 32, 32)
    assert torch.equal(processor(list(frames), return_tensors="pt").pixel_values.transpose(1, 2), expected)
    assert theirs.config.id2label == dict(enumerate(CLASSES)) and theirs.config.label2id["été"] == 2
    theirs.save_pretrained(tmp_path / "saved")
    run(EXPORT, tmp_path / "saved", tmp_path / "again")  # a model of transformers, once more
    for folder in (there, tmp_path / "saved", tmp_path / "again"):
        back = build_from_checkpoint(folder, m.VideoClassifier)
        assert back.options == own.options and same(back, own)
        labels = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
        assert [labels[str(number)] for number in range(5)] == CLASSES


def test_a_pretrained_model_there_and_back(tmp_path):
    model = autoencoder()
    save(model, tmp_path / "checkpoint.pt", config={"target": {"normalize": False}})
    done = run(EXPORT, tmp_path / "checkpoint.pt", tmp_path / "there")
    assert f"{tmp_path}/checkpoint.pt is a pre-trained model\nwrote {tmp_path}/there: " in done.stdout
    kind = transformers.VideoMAEForPreTraining
    theirs, report = kind.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.norm_pix_loss is False and theirs.config.num_attention_heads == 4
    assert theirs.config.layer_norm_eps == model.options["eps"] == 1e-5
    assert same(build_from_checkpoint(tmp_path / "there", m.VideoMAE), model)


def test_what_transformers_cannot_express_is_refused(fine_tuned, tmp_path):
    content = torch.load(fine_tuned)
    config = content["config"] | {"data": content["config"]["data"] | {"frames": 8}}
    torch.save(content | {"config": config}, tmp_path / "longer.pt")
    torch.save(content | {"positions": torch.randn(8, 48)}, tmp_path / "learned.pt")
    save(autoencoder(clip_size=(4, 32, 48)), tmp_path / "wide.pt")
    save(autoencoder(cube=(2, 16, 8)), tmp_path / "cube.pt")
    save(autoencoder(frames_per_token=1), tmp_path / "center.pt")
    general = "only square frames and cubes, the default target and computed positions"
    longer = {"longer": "longer.pt was trained on clips of another size than its position table's"}
    for name, sentence in (dict.fromkeys(["learned", "wide", "cube", "center"], general) | longer).items():
        failed = run(EXPORT, tmp_path / f"{name}.pt", tmp_path / "exported", ok=False)
        assert failed.returncode != 0 and sentence in failed.stderr.splitlines()[-1]
        assert not (tmp_path / "exported").exists()
