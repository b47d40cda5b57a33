"""Which of several networks in a file a key means, and what the line says about it."""
import numpy as np
import pytest
import torch
from layout_files import assert_is, saved, under

from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.layouts import LayoutError
from selfpatch.checkpoints.loading import read_backbone
from selfpatch.checkpoints.networks import collect_tensors, list_networks

PAIRS = [  # how the file is made from teacher t and student s, its kind, the prefixes of t and s
    ("MoCo v3", lambda t, s: {"state_dict": under("module.momentum_encoder.", t) | under("module.base_encoder.", s)},
     "MoCo v3 run", "momentum_encoder.", "base_encoder."),
    ("MoCo v3 in mmpretrain", lambda t, s: {"state_dict": under("backbone.", s) | under("momentum_encoder.0.", t)},
     "MoCo v3 run", "momentum_encoder.0.", "backbone."),
    ("MoCo", lambda t, s: {"state_dict": under("module.encoder_q.", s) | under("module.encoder_k.", t)},
     "MoCo run", "encoder_k.", "encoder_q."),
    ("MSN", lambda t, s: {"encoder": under("module.", s), "target_encoder": under("module.", t), "epoch": 3},
     "MSN run", "target_encoder.", "encoder."),
    ("BYOL", lambda t, s: {"state_dict": under("online_encoder.", s) | under("target_encoder.", t)},
     "BYOL run", "target_encoder.", "online_encoder."),
    ("Lightning", lambda t, s: {"state_dict": under("teacher_backbone.vit.", t) | under("student_backbone.vit.", s)},
     "Lightning run", "teacher_backbone.vit.", "student_backbone.vit."),
    ("Lightly", lambda t, s: {"state_dict": under("backbone.", s) | under("teacher_backbone.", t)},
     "Lightning run", "teacher_backbone.", "backbone."),
    ("solo-learn", lambda t, s: {"state_dict": under("backbone.", s) | under("momentum_backbone.", t)
                                 | {"classifier.weight": torch.zeros(5, 192)}},
     "solo-learn run", "momentum_backbone.", "backbone."),
    ("DINOv2", lambda t, s: {"model": under("student.backbone.", s) | under("teacher.backbone.", t)},
     "run", "teacher.backbone.", "student.backbone."),
    ("timm with EMA", lambda t, s: {"state_dict": s, "state_dict_ema": t}, "timm backbone", "state_dict_ema.", ""),
    ("DeiT with EMA", lambda t, s: {"model": s, "model_ema": t}, "timm backbone", "model_ema.", ""),
    ("ema", lambda t, s: {"model": s, "ema": t, "optimizer": {"exp_avg": s}}, "timm backbone", "ema.", ""),
    ("EMA of a state_dict", lambda t, s: {"state_dict": s, "ema_state_dict": under("module.", t)},
     "timm backbone", "ema_state_dict.", ""),
    ("EMA in Lightning", lambda t, s: {"state_dict": under("model.", s) | under("ema_model.module.", t)},
     "wrapped backbone", "ema_model.module.", "model."),
    ("target network", lambda t, s: {"state_dict": under("online_network.", s) | under("target_network.", t)},
     "wrapped backbone", "target_network.", "online_network."),
    ("EMA by mmengine", lambda t, s: {"state_dict": t, "ema_state_dict": under("module.", s), "message_hub": {}},
     "timm backbone", "", "ema_state_dict."),
    ("EMA by mmengine, published", lambda t, s: {"state_dict": under("backbone.", t), "ema_state_dict": under(
        "module.backbone.", s), "meta": {"mmengine_version": "0.10"}},
     "wrapped backbone", "backbone.", "ema_state_dict.backbone."),
]


@pytest.mark.parametrize("make, kind, teacher, student", [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
def test_two_networks_in_one_file(tmp_path, sd, other, make, kind, teacher, student):
    path = saved(tmp_path, make(sd, other))
    for key, state, prefix in (("teacher", sd, teacher), ("student", other, student)):
        info = assert_is(path, state, key)
        assert (info.kind, info.key, info.prefix) == (kind, key, prefix)
        where = f"key {key}, prefix {prefix}," if prefix not in ("", "backbone.") else f"key {key},"
        assert f"file.pth: {kind}, {where} vit_tiny, patch size 16, 150 tensors, epoch" in str(info)
        assert str(info).endswith(f"also in the file: {student if key == 'teacher' else teacher}"
                                  ) or "" in (teacher, student)
    with pytest.raises(CheckpointError, match=rf"no network 'predictor': it has .*{teacher}"):
        read_backbone(path, "predictor")
    if teacher not in ("", "backbone."):  # the first word of a prefix is a key too, and tells the kind
        assert assert_is(path, sd, teacher.split(".")[0]).kind == kind


def test_the_other_network_is_named_by_its_dictionary(tmp_path, sd, other):
    path = saved(tmp_path, {"state_dict": other, "state_dict_ema": sd})
    assert str(read_backbone(path)[1]).endswith("ignored head, also in the file: state_dict.")
    assert read_backbone(path, "state_dict")[1].key == "state_dict"


def test_a_run_names_its_network_by_the_key_alone(tmp_path, sd, other):
    path = saved(tmp_path, {"student": under("module.backbone.", other), "teacher": under("backbone.", sd), "epoch": 3})
    assert str(assert_is(path, sd)).endswith("run, key teacher, vit_tiny, patch size 16, 150 tensors, epoch 3, "
                                             "ignored head")


def test_average_beside_a_student(tmp_path, sd, other):
    path = saved(tmp_path, {"student": under("backbone.", other), "ema": under("backbone.", sd)})
    assert str(assert_is(path, sd)).endswith("ignored head, also in the file: student.backbone.")
    assert assert_is(path, other, "student").kind == "run"


@pytest.mark.parametrize("content", [lambda sd: sd, lambda sd: {"model": sd}])
def test_single_network_by_the_name_of_its_dictionary(tmp_path, sd, content):
    path = saved(tmp_path, content(sd))
    if path.stat().st_size and "model" in content(sd):
        assert assert_is(path, sd, "model").kind == "timm backbone"
    for key in ("student", "other", ""):
        with pytest.raises(CheckpointError, match=f"no network '{key}': it has (model|a single one without a name)"):
            read_backbone(path, key)


def test_only_a_student(tmp_path, sd):
    path = saved(tmp_path, {"state_dict": under("student_backbone.vit.", sd)})
    with pytest.raises(CheckpointError, match="no network 'teacher': it has student_backbone.vit.$"):
        read_backbone(path)
    assert_is(path, sd, "student")


def test_only_a_teacher(tmp_path, sd):
    path = saved(tmp_path, {"target_encoder": sd})  # of MSN or of BYOL
    assert assert_is(path, sd).kind == "run"
    with pytest.raises(CheckpointError, match="no network 'student': it has target_encoder.$"):
        read_backbone(path, "student")


def test_several_networks_without_a_teacher(tmp_path, sd, other):
    path = saved(tmp_path, {"state_dict": under("left.vit.", sd) | under("right.vit.", other)})
    with pytest.raises(CheckpointError, match="several Vision Transformers, under left.vit., right.vit.: .*_key"):
        read_backbone(path)
    assert_is(path, sd, "left")
    assert_is(path, other, "right.vit.")


def test_detector_with_a_second_network_in_a_head(tmp_path, sd, other):
    path = saved(tmp_path, {"state_dict": under("backbone.", sd) | under("decode_head.encoder.", other)})
    info = assert_is(path, sd)
    assert info.kind == "mmseg segmenter" and str(info).endswith("also in the file: decode_head.encoder.")


def test_dictionaries_of_something_else(tmp_path, sd):
    info = assert_is(saved(tmp_path, {"teacher": {"momentum": 0.99}, "state_dict": under("model.", sd)}), sd)
    assert info.key is None
    resnet = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    assert_is(saved(tmp_path, {"model": sd, "teacher": resnet}), sd)


@pytest.mark.parametrize("head", ["layers.0.weight", "blocks.weight", "pos_embed_2d"])
def test_heads_beside_a_prefix(tmp_path, sd, head):
    info = assert_is(saved(tmp_path, under("encoder.", sd) | {head: torch.zeros(1)}), sd)
    assert head.split(".")[0] in info.ignored


def test_one_dictionary_for_each_module(tmp_path, sd):
    nested = {}
    for name, tensor in sd.items():
        module, _, rest = name.partition(".")
        nested.setdefault(module, {} if rest else tensor)
        if rest:
            nested[module][rest] = tensor
    assert_is(saved(tmp_path, {"params": nested}), sd)


def test_arrays_of_the_other_byte_order_and_of_text():
    content = {"a": np.arange(3, dtype=">f4"), "b": np.array(["text"]), 3: np.float32([1])[::-1],
               "c": {"d": torch.ones(1)}}
    tensors = collect_tensors(content, nested=True)
    assert list(tensors) == ["a", "3", "c.d"] and torch.equal(tensors["a"], torch.arange(3.0))


@pytest.mark.parametrize("name", ["model", "state_dict", "x"])
def test_endless_nesting(tmp_path, sd, name):
    content = {"a": torch.zeros(1)}
    content[name] = content
    assert list(collect_tensors(content, nested=True)) == ["a"] and list_networks(content) == []
    with pytest.raises(CheckpointError, match="holds no Vision Transformer"):
        read_backbone(saved(tmp_path, content))
    content["vit"] = sd
    assert_is(saved(tmp_path, content), sd)


def test_very_many_entries():
    many = {}
    for _ in range(6):
        many = {str(i): many for i in range(1000)}
    with pytest.raises(LayoutError, match="more than 1000000"):
        collect_tensors(many, nested=True)
