"""Starting from a checkpoint's weights: what each kind of file gives, freezing the backbone, and layer-wise rates."""
import re
import shutil

import pytest
import timm
import torch
from golden_rules import set_weights
from layout_files import under
from networks import assert_same, constant_run, shrink_job, small_wrapper
from small_job import load, options

import main_selfpatch
from main_selfpatch import train_dino
from selfpatch.errors import ConfigError
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.optim import build_optimizer, get_params_groups
from selfpatch.method.training_run import build_networks
from selfpatch.method.vision_transformer import ARCHS, VisionTransformer
from selfpatch.pretraining import engine
from selfpatch.pretraining.engine import train_step
from selfpatch.pretraining.initial_weights import read_initial_weights, set_initial_weights

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
SAYS = "student and teacher start with "


def shallow(patch_size=16, num_heads=3, **kwargs):
    return VisionTransformer(patch_size=patch_size, embed_dim=192, depth=2, num_heads=num_heads, **kwargs)


@pytest.fixture(autouse=True)
def shallow_job(monkeypatch):
    """The job with a vit_tiny of 2 blocks: of the width that tells a file's architecture."""
    shrink_job(monkeypatch)
    monkeypatch.setitem(ARCHS, "vit_tiny", shallow)


@pytest.fixture
def words(image_folder, tmp_path):
    return ["--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path / "out"]


@pytest.fixture
def earlier(image_folder, tmp_path):
    """A run of the job that has been trained for a step of each of two epochs."""
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path / "earlier",
                       "--batch_size_per_gpu", 12))
    return tmp_path / "earlier"


def dino_file(path, img_size=224, **kwargs):
    """A DINO run of another student, and the network that is its teacher."""
    teacher = set_weights(shallow(img_size=img_size, class_token=True, final_norm=True, **kwargs), 1).eval()
    student = set_weights(shallow(img_size=img_size, class_token=True, final_norm=True, **kwargs), 2)
    torch.save({name: under("backbone.", net.state_dict()) | {"head.mlp.0.weight": torch.zeros(4, 192)}
                for name, net in (("student", student), ("teacher", teacher))}, path)
    return teacher


def started(path, **kwargs):
    """Student and teacher with the weights of a file, and the line about it."""
    student, teacher = build_networks("vit_tiny", out_dim=64, out_dim_selfpatch=32, **kwargs)
    line = set_initial_weights(student, teacher, *read_initial_weights(str(path), "vit_tiny", 16))
    return student, teacher, line


@pytest.mark.parametrize("img_size, resized", [(224, ""), (96, "; position embedding resized from 6×6 to 14×14")])
def test_class_token_network(tmp_path, capsys, img_size, resized):
    source = dino_file(tmp_path / "dino.pth", img_size)
    student, teacher, line = started(tmp_path / "dino.pth")
    assert "loaded" in (out := capsys.readouterr().out) and "DINO run, key teacher" in out
    assert line == (f"{SAYS}backbone (without its class token and final norm{resized}) from {tmp_path / 'dino.pth'}; "
                    "fresh: ca_head, c_head, p_head")
    assert_same(dict(student.state_dict()), dict(teacher.state_dict()))
    for name, tensor in student.backbone.blocks.state_dict().items():
        assert torch.equal(tensor, source.blocks.state_dict()[name])
    with torch.no_grad():  # what the blocks get, as from them on the class token takes part
        torch.testing.assert_close(teacher.backbone.prepare_tokens(IMAGES), source.prepare_tokens(IMAGES)[:, 1:])


def test_dinos_head_is_the_image_head(tmp_path):
    dino_file(tmp_path / "dino.pth")
    state, head = load(tmp_path / "dino.pth"), set_weights(build_networks("vit_tiny", out_dim=64)[1].c_head, 3)
    for network in state.values():
        network.update(under("head.", head.state_dict()))
    torch.save(state, tmp_path / "dino.pth")
    student, teacher, line = started(tmp_path / "dino.pth")
    assert line.endswith("dino.pth; fresh: ca_head, p_head") and "c_head from" in line
    assert_same(dict(teacher.c_head.state_dict()), dict(head.state_dict()))


def test_fresh_heads_are_those_of_a_run_from_scratch(tmp_path):
    dino_file(tmp_path / "dino.pth")
    torch.manual_seed(3)
    student, _, _ = started(tmp_path / "dino.pth")
    torch.manual_seed(3)
    scratch, _ = build_networks("vit_tiny", out_dim=64, out_dim_selfpatch=32)
    for head in ("ca_head", "c_head", "p_head"):
        assert_same(dict(getattr(student, head).state_dict()), dict(getattr(scratch, head).state_dict()))


@pytest.mark.parametrize("name, kwargs", [("timm.pth", {}), ("timm.safetensors", {"class_token": False})])
def test_timm_file(tmp_path, name, kwargs):
    network = set_weights(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, global_pool="avg",
                                            fc_norm=False, **kwargs), 0).eval()
    if name.endswith(".pth"):
        torch.save(network.state_dict(), tmp_path / name)
    else:
        from safetensors.torch import save_file
        save_file(network.state_dict(), tmp_path / name)
    student, _, line = started(tmp_path / name)
    left_out = "final norm" if kwargs else "class token and final norm"
    assert line.startswith(f"{SAYS}backbone (without its {left_out}) from")
    if kwargs:  # nothing but the last norm is missing
        with torch.no_grad():
            ours = network.norm(student.eval().backbone(IMAGES))
            torch.testing.assert_close(ours, network.forward_features(IMAGES), rtol=1e-4, atol=1e-4)
    assert torch.equal(student.backbone.blocks[1].attn.qkv.weight, network.blocks[1].attn.qkv.weight)


def test_run_of_ours_gives_its_heads(earlier, capsys):
    student, teacher, line = started(earlier)
    assert line == f"{SAYS}backbone, ca_head, c_head, p_head from {earlier / 'checkpoint.pth'}; nothing is fresh"
    assert "SelfPatch run, key teacher" in (out := capsys.readouterr().out) and "ignored" not in out
    saved = load(earlier / "checkpoint.pth")["teacher"]
    assert_same(dict(student.state_dict()), dict(saved))
    assert_same(dict(teacher.state_dict()), dict(saved))
    assert not student.c_head.last_layer.weight_g.requires_grad and student.backbone.pos_embed.requires_grad


def test_heads_that_do_not_fit_are_fresh(earlier):
    source = read_initial_weights(str(earlier), "vit_tiny", 16)
    networks = build_networks("vit_tiny", out_dim=65, out_dim_selfpatch=32)
    before = networks[0].c_head.last_layer.weight_v.clone()
    line = set_initial_weights(*networks, *source)
    assert "start with backbone, ca_head, p_head from" in line
    assert line.endswith("fresh: c_head (another shape, see --out_dim)")
    for network in networks:
        assert torch.equal(network.c_head.last_layer.weight_v, before)


def test_prototypes_keep_the_length_that_is_asked_for(earlier):
    state = load(earlier / "checkpoint.pth")
    state["teacher"]["c_head.last_layer.weight_g"] += 0.5
    torch.save(state, earlier / "checkpoint.pth")
    _, _, line = started(earlier)
    assert line.endswith("fresh: c_head (prototypes of other lengths than 1, see --norm_last_layer)")
    student, _, line = started(earlier, norm_last_layer=False)
    assert line.endswith("nothing is fresh") and (student.c_head.last_layer.weight_g == 1.5).all()


def test_head_with_nan_is_refused(earlier):
    state = load(earlier / "checkpoint.pth")
    state["teacher"]["ca_head.cls_token"][:] = torch.nan
    torch.save(state, earlier / "checkpoint.pth")
    with pytest.raises(ConfigError, match="the ca_head in .* does not fit: NaN or infinite values"):
        started(earlier)


@pytest.mark.parametrize("change, says", [
    (["--arch", "vit_small"], "--arch vit_small contradicts --init_weights .*, which holds vit_tiny: give --arch vit"),
    (["--patch_size", 8], "--patch_size 8 contradicts --init_weights .*, whose patch size is 16: give --patch")])
def test_another_network_is_refused_before_images_are_listed(tmp_path, words, monkeypatch, change, says):
    dino_file(tmp_path / "dino.pth")
    monkeypatch.setattr(main_selfpatch, "build_loader", lambda *_: pytest.fail("the images were listed"))
    with pytest.raises(ConfigError, match=says):
        train_dino(options(*words, "--init_weights", tmp_path / "dino.pth", *change))


def test_other_attention_heads_are_refused(tmp_path):
    network = shallow(num_heads=4)
    torch.save({"state_dict": network.state_dict(), "meta": {"num_heads": 4}}, tmp_path / "file.pth")
    with pytest.raises(ConfigError, match="trains with 3 attention heads, .* has 4 .recorded.: give another file"):
        started(tmp_path / "file.pth")


def test_first_loss_is_that_of_weights_set_by_hand(tmp_path, words, earlier, monkeypatch):
    """The job with --init_weights, and the job whose networks are replaced: the same first step."""
    losses, real_build = [], main_selfpatch.build_run

    def record(run, batches):
        step = train_step(run, batches)
        losses.append(step.total.item())
        return step

    monkeypatch.setattr(engine, "train_step", record)
    train_dino(options(*words, "--batch_size_per_gpu", 12, "--init_weights", earlier))

    def by_hand(*args):
        run = real_build(*args)
        state = torch.load(earlier / "checkpoint.pth", weights_only=True)["teacher"]
        run.student.load_state_dict(state)
        run.teacher.load_state_dict(state)
        return run

    monkeypatch.setattr(main_selfpatch, "build_run", by_hand)
    words[-1] = tmp_path / "by_hand"
    train_dino(options(*words, "--batch_size_per_gpu", 12))
    monkeypatch.setattr(main_selfpatch, "build_run", real_build)
    words[-1] = tmp_path / "scratch"
    train_dino(options(*words, "--batch_size_per_gpu", 12))
    assert losses[0] == losses[1] != losses[2]


def test_resuming_does_not_use_the_file(tmp_path, words, capsys):
    dino_file(tmp_path / "dino.pth")
    words[1] = 2
    file = ["--init_weights", tmp_path / "dino.pth"]
    train_dino(options(*words, *file))
    out = capsys.readouterr().out
    assert f"{SAYS}backbone (without" in out and f"starting from {tmp_path / 'dino.pth'}" in out
    whole = load(tmp_path / "out" / "checkpoint.pth")
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "out" / "checkpoint0000.pth", resumed / "checkpoint.pth")
    (tmp_path / "dino.pth").unlink()
    words[-1] = resumed
    train_dino(options(*words, *file))
    out = capsys.readouterr().out
    assert f"{file[0]} {file[1]} is not used: continuing from {resumed / 'checkpoint.pth'}\n" in out
    assert "start with" not in out and "changed since" not in out and "resuming after epoch 0" in out
    ours = load(resumed / "checkpoint.pth")
    del ours["args"], whole["args"]
    assert_same(ours, whole)


def test_another_file_than_the_run_began_from_is_said(tmp_path, words, earlier, capsys):
    words[1], words[-1] = 3, earlier
    train_dino(options(*words, "--batch_size_per_gpu", 12, "--init_weights", tmp_path / "other.pth"))
    assert re.search(r"--init_weights .*other.pth is not used: continuing from .*checkpoint.pth, of a run that began "
                     r"from random weights: for a new run choose another --output_dir\n", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------------------
# Freezing and layer-wise rates

CROPS = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def small_run(**kwargs):
    student, teacher = small_wrapper(), small_wrapper().requires_grad_(False)
    return constant_run(student, teacher, FusedDINOLoss(12, 10, 3), **kwargs)


def test_frozen_backbone_gets_no_update_decay_or_moments():
    run = small_run(optimizer="adamw", weight_decay=0.5, freeze_backbone_epochs=1)
    before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    teacher = run.teacher.backbone.pos_embed.clone()
    train_step(run, [CROPS])
    for name, p in run.student.named_parameters():
        if p.requires_grad and "attn.k.bias" not in name:
            assert torch.equal(p, before[name]) == name.startswith("backbone."), name
    assert not any(p in run.optimizer.state for p in run.student.backbone.parameters())
    expected = 0.9 * teacher + 0.1 * before["backbone.pos_embed"]  # towards the student, as ever
    torch.testing.assert_close(run.teacher.backbone.pos_embed, expected)
    train_step(run, [CROPS])  # the second epoch, of one step
    assert not torch.equal(run.student.backbone.pos_embed, before["backbone.pos_embed"])


def test_no_layer_decay_leaves_the_groups_as_they_are():
    wrapper = small_wrapper()
    plain, explicit = get_params_groups(wrapper), get_params_groups(wrapper, 1.0)
    assert [group.keys() for group in explicit] == [{"params"}, {"params", "weight_decay"}]
    assert [[id(p) for p in group["params"]] for group in plain] == [
        [id(p) for p in group["params"]] for group in explicit]


def test_layer_decay_sets_each_layers_rate():
    run = small_run(optimizer="adamw", lr=0.1, weight_decay=0.5)
    run.optimizer = build_optimizer(run.student, "adamw", layer_decay=0.5)
    run.set_rates()
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups
             for p in group["params"]}
    trained = {name: p for name, p in run.student.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, p in trained.items():
        layer = (0 if name.startswith(("backbone.pos_embed", "backbone.patch_embed")) else
                 int(name.split(".")[2]) + 1 if name.startswith("backbone.") else 3)
        decay = 0.0 if name.endswith(".bias") or p.ndim == 1 else 0.5
        assert rates[id(p)] == (0.1 * 0.5 ** (3 - layer), decay), name


def test_optimisers_move_by_each_layers_rate():
    """SGD's first step is proportional to the rate."""
    steps = []
    for layer_decay in (1.0, 0.5):
        torch.manual_seed(0)
        run = small_run()
        run.optimizer = build_optimizer(run.student, "sgd", layer_decay)
        before = run.student.backbone.blocks[0].attn.qkv.weight.detach().clone()
        train_step(run, [CROPS])
        steps.append(run.student.backbone.blocks[0].attn.qkv.weight.detach() - before)
    torch.testing.assert_close(steps[1], steps[0] / 4, rtol=1e-3, atol=1e-7)


def test_layer_decay_is_resumed(image_folder, tmp_path, capsys):
    words = ["--epochs", 2, "--data_path", image_folder, "--layer_decay", 0.75, "--freeze_backbone_epochs", 1]
    train_dino(options(*words, "--output_dir", tmp_path / "whole"))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint0000.pth", resumed / "checkpoint.pth")
    train_dino(options(*words, "--output_dir", resumed))
    ours, other = load(resumed / "checkpoint.pth"), load(tmp_path / "whole" / "checkpoint.pth")
    del ours["args"], other["args"]
    assert_same(ours, other)
    factors = [group["lr_scale"] for group in ours["optimizer"]["param_groups"]]
    assert factors == [0.75**3] * 2 + [0.75**2] * 2 + [0.75] * 2 + [1.0] * 2


def test_changed_layer_decay_is_said_and_taken(image_folder, tmp_path, capsys):
    words = ["--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--layer_decay"]
    train_dino(options(*words, 0.75))
    shutil.copy(tmp_path / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    train_dino(options(*words, 0.5))
    assert "changed since the checkpoint: --layer_decay 0.5 (was 0.75)" in capsys.readouterr().out
    groups = load(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
    assert groups[0]["lr_scale"] == 0.5**3
    shutil.copy(tmp_path / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    with pytest.raises(ConfigError, match="8 groups of parameters, not 2 .*, here --layer_decay 1.0 and there 0.75"):
        train_dino(options(*words, 1.0))
