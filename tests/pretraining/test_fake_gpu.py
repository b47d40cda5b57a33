"""A training step on tensors that have a GPU's device, shapes and dtypes but no elements; and the ranks' exchanges."""
import pytest
import torch
import torch.distributed as dist
from networks import constant_run, small_wrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.method.selfpatch_head import MultiCropWrapper, PackedMultiCropWrapper
from selfpatch.pretraining.engine import train_step


def without_elements(model: nn.Module) -> nn.Module:
    """The model on a GPU that need not be there: within FakeTensorMode."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, device="cuda"), p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device="cuda"))
    return model


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 asks the driver how to convolve")
@pytest.mark.parametrize("loss_class, wrapper_class", [
    (FusedDINOLoss, PackedMultiCropWrapper), (FusedDINOLoss, MultiCropWrapper), (DINOLoss, MultiCropWrapper)])
def test_every_tensor_of_a_step_is_on_the_gpu(loss_class, wrapper_class, monkeypatch):
    """In bfloat16. An operation on tensors of two devices, or one whose result is read, raises."""
    models = [small_wrapper(drop_path_rate=0.1), small_wrapper().requires_grad_(False), loss_class(12, 10, 4)]
    with FakeTensorMode():
        student, teacher, dino_loss = map(without_elements, models)
        student.__class__ = teacher.__class__ = wrapper_class

        def backward(_):  # autograd itself wants the device to be there
            for p in student.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
        products = set()
        for layer in student.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda layer, inputs, output: products.add(output.dtype))
        run = constant_run(student, teacher, dino_loss, "adamw", dtype=torch.bfloat16)
        losses = train_step(run, [[torch.empty(2, 3, size, size, device="cuda") for size in (64, 64, 32, 32)]])
        assert {loss.device.type for loss in losses} == {"cuda"} and {loss.dtype for loss in losses} == {torch.float32}
        assert products == {torch.bfloat16}
        for model in (student, teacher, dino_loss):
            assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}


@pytest.fixture
def eight_ranks():
    """This process as the first of 8, the others being pretended; what it has given them to sum."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_eight_ranks_exchange_the_centres_beside_the_last_backward_pass(eight_ranks, monkeypatch):
    """A step of four small batches sums every centre once, all in one message."""
    summed, all_reduce = [], dist.all_reduce

    def record(x, *args, **kwargs):
        summed.append(x.shape)
        return all_reduce(x, *args, **kwargs)

    def backward(loss, **kwargs):
        summed.append("backward")
        return start(loss, **kwargs)

    start = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(dist, "all_reduce", record)
    run = constant_run(small_wrapper(), small_wrapper().requires_grad_(False), FusedDINOLoss(12, 10, 4), accum_steps=4)
    train_step(run, [[torch.rand(2, 3, size, size) for size in (64, 64, 32, 32)] for _ in range(4)])
    assert summed == ["backward"] * 3 + [(12 + 10,), "backward"]  # begun before the last
    assert run.dino_loss.center.any()
