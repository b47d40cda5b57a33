"""The training step against the published one: losses, logits, centres, gradients and every tensor after the step."""
import argparse
import shutil

import pytest
import torch
from golden_rules import assert_close, load, rand, set_weights

import utils
from engine import train_step
from losses import DINOLoss
from main_selfpatch import MultiCropWrapper, build_optimizer
from selfpatch_head import SelfPatchHead
from vision_transformer import DINOHead, vit_tiny


def golden_wrapper(salt, tag):
    wrapper = MultiCropWrapper(vit_tiny(), SelfPatchHead(192, 3, 4), DINOHead(192, 256), DINOHead(192, 128))
    return set_weights(wrapper, salt, tag)


def logits_recorder(wrapper):
    """The wrapper's last outputs, dense, in a list of one."""
    seen = [None]
    wrapper.register_forward_hook(lambda _, inputs, output: seen.__setitem__(
        0, (output[0].dense(), [patches.dense() for patches in output[1]])))
    return seen


def gradient_norms(model):
    """Norms before clipping, by name, filled in during backward.

    In float32, as the figures were taken and the published clipping has it: over 4 million elements it is off by 3e-4.
    """
    norms = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda grad, name=name: norms.__setitem__(name, grad.norm().item()))
    return norms


def local_patches(patch_logits):
    """Patch logits of the local crops, every 4th patch."""
    return patch_logits[1][:, ::4]


def assert_tensors(model, golden, step, who, tolerance):
    """L2 norm and sum of every tensor of the model after the step."""
    state = dict(model.named_parameters())
    for i, name in enumerate(golden[f"{step}_names"]):
        if who == "student" and "attn.k.bias" in name:
            continue  # its gradient is rounding alone, which Adam blows up
        p = state[str(name)].detach().double()
        l2, total = golden[f"{step}_{who}_l2"][i], golden[f"{step}_{who}_sum"][i]
        assert p.norm().item() == pytest.approx(l2, rel=tolerance, abs=1e-12), name
        assert abs(p.sum().item() - total) <= tolerance * l2 * p.numel() ** 0.5 + 1e-12, name


@pytest.mark.parametrize("file, compiled", [
    ("train_step.npz", False), ("train_step_sgd.npz", False),
    pytest.param("train_step.npz", True, marks=[pytest.mark.slow, pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU")])])
def test_golden_train_step(file, compiled):
    golden = load(file)
    salt = golden["salt"]
    student, teacher = golden_wrapper(salt, "student."), golden_wrapper(salt, "teacher.").requires_grad_(False)
    dino_loss = DINOLoss(256, 128, 4, 0.04, 0.07, 3, 10)
    name, lr, weight_decay, clip = ("adamw", 1e-3, 0.1, 3.0) if file == "train_step.npz" else ("sgd", 0.1, 1e-4, 0.3)
    optimizer = build_optimizer(argparse.Namespace(optimizer=name, device=torch.device("cpu")), student)
    optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
    optimizer.param_groups[1].update(lr=lr)
    if compiled:
        for part in (student, teacher, dino_loss):
            part.compile(dynamic=False)
    student_logits, teacher_logits, norms = logits_recorder(student), logits_recorder(teacher), gradient_norms(student)

    for step in (0, 1):
        crops = [rand(100 * step + i, 2, 3, size, size, salt=salt) for i, size in enumerate((224, 224, 96, 96))]
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        losses = train_step(student, teacher, dino_loss, optimizer, [crops], epoch=step, momentum=0.99,
                            clip_grad=clip, freeze_last_layer=1)
        key = f"step{step}"
        assert [losses.total.item(), losses.image.item(), losses.patch.item()] == pytest.approx(
            golden[f"{key}_loss"].tolist(), rel=1e-5)
        assert_close(dino_loss.center, golden[f"{key}_center"])
        assert_close(dino_loss.patch_center, golden[f"{key}_patch_center"])
        if f"{key}_student_cls" in golden:
            (s_image, s_patch), (t_image, t_patch) = student_logits[0], teacher_logits[0]
            for ours, name in ((s_image[:4, None], "student_cls"), (t_image[:4, None], "teacher_cls"),
                               (local_patches(s_patch), "student_patch"), (local_patches(t_patch), "teacher_patch")):
                assert_close(ours, golden[f"{key}_{name}"], tolerance=1e-4)

        assert set(norms) == set(map(str, golden[f"{key}_grad_names"]))
        assert list(before) == list(map(str, golden[f"{key}_names"]))  # optimizer state goes by this order
        for name, norm in zip(golden[f"{key}_grad_names"], golden[f"{key}_grad_norms"], strict=True):
            assert norms[str(name)] == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        assert_tensors(student, golden, key, "student", 1e-4)
        assert_tensors(teacher, golden, key, "teacher", 1e-5)
        after = dict(student.named_parameters())
        for name, update in zip(map(str, golden[f"{key}_names"]), golden[f"{key}_update_l2"], strict=True):
            if "attn.k.bias" not in name:
                change = (after[name].detach().double() - before[name].double()).norm().item()
                assert change == pytest.approx(update, rel=1e-4, abs=1e-9), name
        if step == 0:
            for head in ("c_head", "p_head"):
                assert torch.equal(after[f"{head}.last_layer.weight_v"], before[f"{head}.last_layer.weight_v"])


def test_golden_train_step_in_bfloat16():
    """Half precision, by how much it may stray from float32: losses 0.5 %, centres 3 %, gradient norms 5 %."""
    golden = load("train_step.npz")
    salt = golden["salt"]
    student, teacher = golden_wrapper(salt, "student."), golden_wrapper(salt, "teacher.").requires_grad_(False)
    dino_loss, norms = DINOLoss(256, 128, 4, 0.04, 0.07, 3, 10), gradient_norms(student)
    crops = [rand(i, 2, 3, size, size, salt=salt) for i, size in enumerate((224, 224, 96, 96))]
    optimizer = torch.optim.SGD(utils.get_params_groups(student), lr=0.1)
    losses = train_step(student, teacher, dino_loss, optimizer, [crops], epoch=0, momentum=0.99, clip_grad=3.0,
                        freeze_last_layer=1, dtype=torch.bfloat16)
    errors = {"loss": abs(torch.stack(losses[:3]).numpy() / golden["step0_loss"] - 1).max()}
    for name in ("center", "patch_center"):
        expected = torch.from_numpy(golden[f"step0_{name}"])
        errors[name] = ((getattr(dino_loss, name) - expected).norm() / expected.norm()).item()
    relative = {str(name): abs(norms[str(name)] / norm - 1)
                for name, norm in zip(golden["step0_grad_names"], golden["step0_grad_norms"], strict=True)
                if "attn.k.bias" not in str(name)}
    errors["gradient"] = max(relative.values())
    assert errors["loss"] < 0.005 and max(errors["center"], errors["patch_center"]) < 0.03
    assert errors["gradient"] < 0.05


def test_golden_param_groups():
    golden = load("param_groups.npz")
    wrapper = golden_wrapper(golden["salt"], "")
    names = {id(p): name for name, p in wrapper.named_parameters()}
    decayed, not_decayed = utils.get_params_groups(wrapper)
    assert sorted(names[id(p)] for p in decayed["params"]) == sorted(map(str, golden["decayed"]))
    assert sorted(names[id(p)] for p in not_decayed["params"]) == sorted(map(str, golden["not_decayed"]))
    assert "weight_decay" not in decayed and not_decayed["weight_decay"] == 0


def test_trainable_gain_is_decayed():
    head = DINOHead(8, 4, norm_last_layer=False, hidden_dim=8, bottleneck_dim=4)
    assert any(p is head.last_layer.weight_g for p in utils.get_params_groups(head)[0]["params"])
