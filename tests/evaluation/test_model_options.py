"""Which networks the options of an evaluation stand for, and how results are written."""
import argparse
import json

import pytest
import timm
import torch

from selfpatch.errors import ConfigError
from selfpatch.evaluation.common import add_evaluation_options
from selfpatch.evaluation.model_options import add_device_options, add_model_options, load_candidates, row_names
from selfpatch.evaluation.tables import check_output, format_table, write_json
from selfpatch.method.selfpatch_head import MultiCropWrapper, SelfPatchHead
from selfpatch.method.vision_transformer import DINOHead, vit_small, vit_tiny


def load(*words, **more):
    """load_candidates by the words of a command."""
    parser = argparse.ArgumentParser()
    add_model_options(parser, several=True)
    args = parser.parse_args(list(map(str, words)))
    return load_candidates(args.pretrained_weights, args.arch, args.checkpoint_key, args.patch_size, args.layer,
                           0 if args.random_weights else None, **more)


@pytest.fixture
def files(tmp_path):
    for folder, model in (("a", vit_tiny(8)), ("b", vit_small(class_token=True, final_norm=True))):
        (tmp_path / folder).mkdir()
        torch.save(model.state_dict(), tmp_path / folder / "model.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "timm.pth")
    return tmp_path


def test_several_files_and_a_baseline(files, capsys, monkeypatch):
    found = load("--pretrained_weights", files / "a/model.pth", files / "b/model.pth", "--random_weights")
    assert [(one.name, one.arch, one.model.patch_size) for one in found] == [
        ("a/model.pth", "vit_tiny", 8), ("b/model.pth", "vit_small", 16), ("random", "vit_tiny", 8)]
    assert capsys.readouterr().out.count("\n") == 3
    monkeypatch.setattr("selfpatch.evaluation.model_options.is_main_process", lambda: False)
    again = load("--pretrained_weights", files / "a/model.pth", "--random_weights")
    assert capsys.readouterr().out == ""
    assert torch.equal(again[1].model.pos_embed, found[2].model.pos_embed)  # the same untrained network every time
    same, = load("--pretrained_weights", files / "b/model.pth", "--random_weights")[1:]
    assert same.model.has_class_token and isinstance(same.model.norm, torch.nn.LayerNorm)


def test_the_baseline_of_a_selfpatch_run_has_a_head_too(files):
    """Wherever the run stands among the files; with the run's heads, positives and grid of positions."""
    backbone = vit_tiny(num_heads=6, img_size=64)
    wrapper = MultiCropWrapper(backbone, SelfPatchHead(192, 6, 2), DINOHead(192, 8), DINOHead(192, 8))
    torch.save({"teacher": wrapper.state_dict(), "args": argparse.Namespace(k_num=2), "meta": {"num_heads": 6}},
               files / "run.pth")
    words = ("--pretrained_weights", files / "b/model.pth", files / "run.pth", "--random_weights")
    plain, run, random = load(*words, with_heads=True)
    assert plain.head is None and run.head.k_num == random.head.k_num == 2
    assert torch.equal(run.head.norm.weight, wrapper.ca_head.norm.weight)
    assert random.arch == "vit_tiny" and not random.model.has_class_token
    assert run.model.num_heads == random.model.num_heads == random.head.cls_blocks[0].attn.num_heads == 6
    assert run.model.pos_embed.shape == random.model.pos_embed.shape == (1, 16, 192)
    shapes = [{name: value.shape for name, value in one.head.state_dict().items()} for one in (run, random)]
    assert shapes[0] == shapes[1] and not random.head.training
    assert [one.head for one in load(*words)] == [None] * 3  # the dense jobs have no use for heads


def test_an_arch_for_each_file(files):
    words = ["--pretrained_weights", files / "a/model.pth", files / "timm.pth", "--arch", "vit_tiny"]
    found = load(*words, "timm:vit_tiny_patch16_224")
    assert [one.summary()["arch"] for one in found] == ["vit_tiny", "timm:vit_tiny_patch16_224"]
    assert found[0].info is not None and found[1].info is None
    alone, = load("--random_weights", "--arch", "timm:vit_tiny_patch16_224")
    assert alone.name == "random" and alone.model.num_prefix_tokens == 1


@pytest.mark.parametrize("words, says", [
    ([], "--pretrained_weights is empty"),
    (["--random_weights", "--arch", "vit_tiny", "vit_small"], "--arch has 2 names for 0 files"),
    (["--random_weights", "--arch", "vit_tiny", "--layer", "-13"], "--layer -13: the network has 12 blocks"),
    (["--pretrained_weights", "none.pth"], "none.pth cannot be read"),
])
def test_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        load(*words)


def test_unknown_arch_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        load("--random_weights", "--arch", "resnet50")
    assert "'resnet50' is neither vit_pico, " in capsys.readouterr().err


def test_row_names_tell_files_apart():
    assert row_names(["runs/a/checkpoint.pth", "runs/b/checkpoint.pth"]) == ["a/checkpoint.pth", "b/checkpoint.pth"]
    assert row_names(["x/a.pth", "x/b.pth/"]) == ["a.pth", "b.pth"]
    assert row_names(["a.pth", "a.pth"]) == ["a.pth", "a.pth (2)"] and row_names([]) == []


def test_results_are_written_whole_and_never_replaced_silently(tmp_path, capsys):
    path = tmp_path / "results.json"
    check_output(path, False)
    write_json({"top1": 1.5}, path)
    assert json.loads(path.read_text()) == {"top1": 1.5} and "wrote" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists: give another name, or --overwrite"):
        check_output(path, False)
    check_output(path, True)
    check_output(None, False)
    with pytest.raises(ConfigError, match="is not a folder, create it first"):
        check_output(tmp_path / "no" / "x.json", True)
    with pytest.raises(TypeError):
        write_json({"x": object()}, path)
    assert json.loads(path.read_text()) == {"top1": 1.5} and list(tmp_path.iterdir()) == [path]


def test_tables():
    assert format_table(["", "top-1"], [["a", "1.00"], ["longer", "100.00"]]).splitlines() == [
        "         top-1", "a         1.00", "longer  100.00"]


@pytest.mark.parametrize("add", [add_evaluation_options, add_device_options])
def test_evaluations_are_in_float32_by_default(add):
    parser = argparse.ArgumentParser()
    add(parser)
    assert parser.parse_args([]).precision == "fp32"
