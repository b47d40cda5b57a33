"""Parameter groups, LARS, gradient clipping and freezing, and the update of the teacher."""
import torch
from torch import nn


def get_params_groups(model: nn.Module, layer_decay: float = 1.0) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and without (biases and one-dimensional parameters).

    Args:
        layer_decay: if below 1, two groups for each layer of model.backbone, see get_layer_groups.
    """
    if layer_decay != 1:
        return get_layer_groups(model, layer_decay)
    decayed, not_decayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if is_decayed(name, p) else not_decayed).append(p)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


def is_decayed(name: str, p: nn.Parameter) -> bool:
    return not name.endswith(".bias") and p.ndim > 1


def get_layer_groups(model: nn.Module, layer_decay: float) -> list[dict]:
    """Two groups for each layer: lr_scale multiplies the learning rate, decayed tells whether weight decay applies.

    lr_scale is layer_decay^(depth + 1 - i), with i = 0 for the embeddings, 1 to depth for the blocks of model.backbone,
    and depth + 1 for everything else.
    """
    depth, groups = len(model.backbone.blocks), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = layer_number(name, depth)
            groups.setdefault((layer, is_decayed(name, p)), []).append(p)
    return [{"params": params, "lr_scale": float(layer_decay) ** (depth + 1 - layer), "decayed": decayed}
            | ({} if decayed else {"weight_decay": 0.0})
            for (layer, decayed), params in sorted(groups.items(), key=lambda item: item[0])]


def layer_number(name: str, depth: int) -> int:
    if not name.startswith("backbone."):
        return depth + 1
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1 if name.startswith("backbone.norm.") else 0


def build_optimizer(model: nn.Module, name: str = "adamw", layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum 0.9, or LARS, over get_params_groups(model); schedules set rate and weight decay.

    Args:
        name: adamw, sgd or lars.
        layer_decay: see get_params_groups.
    """
    groups, device = get_params_groups(model, layer_decay), next(model.parameters()).device
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":
        # not fused: torch 2.15's fails if some momenta begin later than others, like those of frozen last layers
        return torch.optim.SGD(groups, lr=0, momentum=0.9, foreach=True)
    if name == "lars":
        return LARS(groups)
    raise ValueError(f"optimizer {name!r} is not one of adamw, sgd and lars")


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float, norms: torch.Tensor | None = None) -> None:
    """Scale each gradient tensor separately to a norm of at most clip, as DINO does, without a host-device sync.

    Args:
        norms: of the gradients, [number of gradients]; None to compute them.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads)) if norms is None else norms
    factors = (clip / (norms + 1e-6)).clamp(max=1)
    if norms.device.type == "cpu":
        torch._foreach_mul_(grads, list(factors.unbind()))
    else:
        scale_together(grads, factors)


def scale_together(tensors: list[torch.Tensor], factors: torch.Tensor) -> None:
    """Multiply each contiguous tensor in place by its factor, one of factors [number of tensors].

    A grouped product takes pairs of the same shape, so the factors are expanded: one more pass over memory, but about
    200 launches less.
    """
    sizes = [tensor.numel() for tensor in tensors]
    factors = torch.cat([factor.expand(size) for factor, size in zip(factors, sizes, strict=True)])
    torch._foreach_mul_([tensor.view(-1) for tensor in tensors], factors.split(sizes))


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Drop the gradients of the heads' last layers while epoch < freeze_last_layer: no update, decay or moments."""
    if epoch < freeze_last_layer:
        for name, p in model.named_parameters():
            if "last_layer" in name:
                p.grad = None


def cancel_gradients_backbone(epoch: int, model: nn.Module, freeze_backbone_epochs: int) -> None:
    """Drop the gradients of model.backbone while epoch < freeze_backbone_epochs: no update, decay or moments."""
    if epoch < freeze_backbone_epochs:
        for p in model.backbone.parameters():
            p.grad = None


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float,
                   finite: torch.Tensor | None = None) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, for frozen parameters, too (DINO, Sec. 3.1).

    Args:
        finite: a bool on the device; if it is false, the teacher stays as it is.
    """
    weights, towards = list(teacher.parameters()), list(student.parameters())
    if finite is None:
        torch._foreach_lerp_(weights, towards, 1 - momentum)
    else:
        difference = torch._foreach_sub(towards, weights)
        torch._foreach_mul_(difference, (1 - momentum) * finite.float())
        torch._foreach_add_(weights, difference)


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether no weight, and no statistic such as BatchNorm's, is NaN or infinite."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all())


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load state, but keep each group's lr_scale and its implementation (fused, foreach).

    The implementation depends on the device and on torch's version.

    Raises:
        ValueError: the state is of a different kind of optimizer, or has different groups.
    """
    signature = {"betas", "momentum", "eta"}  # tells AdamW, SGD and LARS apart
    own, saved = (signature.intersection(groups[0]) for groups in (optimizer.param_groups, state["param_groups"]))
    if own != saved:
        raise ValueError(f"it is another kind of optimizer, one with {' and '.join(sorted(saved))}")
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise ValueError(f"it has {len(state['param_groups'])} groups of parameters, not {len(optimizer.param_groups)} "
                         "(--layer_decay makes them)")
    own = ("fused", "foreach", "capturable", "lr_scale")
    groups = [group | {name: current[name] for name in own if name in current}
              for group, current in zip(state["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al. 2017), in DINO's form.

    Trust ratio eta · |p| / |g| and weight decay apply to parameters with more than one dimension.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad.clone() for p in params]
            self.adapt([(p, g) for p, g in zip(params, grads, strict=True) if p.ndim > 1], group)
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            momenta = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

    @staticmethod
    def adapt(matrices: list[tuple[torch.Tensor, torch.Tensor]], group: dict) -> None:
        """Add weight decay to gradients, and scale them by the trust ratio, in place; pairs of parameter, gradient."""
        if not matrices:
            return
        params, grads = map(list, zip(*matrices, strict=True))
        torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        ratios = [torch.where((pn > 0) & (gn > 0), group["eta"] * pn / gn, torch.ones_like(pn))
                  for pn, gn in zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True)]
        torch._foreach_mul_(grads, ratios)
