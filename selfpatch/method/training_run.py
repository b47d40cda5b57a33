"""The state of a pretraining run: networks, loss, optimiser, scaler, schedules and step counter.

    student, teacher = build_networks("vit_small")
    run = TrainingRun(student, teacher, FusedDINOLoss(65536, 4096, ncrops=10), build_optimizer(student),
                      build_schedules(epochs=100, steps_per_epoch=1000))
    losses = train_step(run, [crops])               # pretraining/engine.py
    torch.save(run.state_dict(), "checkpoint.pth")  # the published layout
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selfpatch.errors import ConfigError
from selfpatch.method.losses import DINOLoss
from selfpatch.method.optim import load_optimizer
from selfpatch.method.schedules import Schedule, cosine_schedule
from selfpatch.method.selfpatch_head import MultiCropWrapper, PackedMultiCropWrapper, SelfPatchHead
from selfpatch.method.vision_transformer import ARCHS, DINOHead, VisionTransformer


class Schedules(NamedTuple):
    """Length of a run in epochs and in steps of the optimiser, and the values that change from step to step."""
    epochs: int
    steps_per_epoch: int
    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule  # of the teacher
    warmup_epochs: int = 0  # of lr


def build_schedules(epochs: int, steps_per_epoch: int, lr: float = 0.0005, min_lr: float = 1e-6,
                    warmup_epochs: int = 10, weight_decay: tuple[float, float] = (0.04, 0.4),
                    momentum_teacher: float = 0.996) -> Schedules:
    """The published schedules: cosines over the whole run; that of the learning rate follows a linear warm-up.

    Args:
        lr: the peak; the job's --lr is for 256 images per step.
        weight_decay: at the start and at the end.
    """
    steps = epochs * steps_per_epoch
    return Schedules(epochs, steps_per_epoch, cosine_schedule(lr, min_lr, steps, warmup_epochs * steps_per_epoch),
                     cosine_schedule(*weight_decay, steps), cosine_schedule(momentum_teacher, 1.0, steps),
                     warmup_epochs)


def build_networks(arch: str, patch_size: int = 16, out_dim: int = 65536, out_dim_selfpatch: int = 4096,
                   drop_path_rate: float = 0.1, norm_last_layer: bool = True,
                   **options) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student, and teacher: a copy with neither stochastic depth nor gradients.

    Args:
        arch: a key of vision_transformer.ARCHS.
        out_dim, out_dim_selfpatch: prototypes of the image head and of the patch head.
        drop_path_rate: stochastic depth of the student.
        norm_last_layer: freeze the gain of the student's prototypes; the teacher's is always frozen.
        options: of build_network.
    """
    if arch not in ARCHS:
        raise ConfigError(f"arch is {arch!r}: it must be one of {', '.join(ARCHS)}")
    dims = (out_dim, out_dim_selfpatch)
    student = build_network(ARCHS[arch](patch_size=patch_size, drop_path_rate=drop_path_rate), dims, norm_last_layer,
                            **options)
    teacher = build_network(ARCHS[arch](patch_size=patch_size), dims, **options).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    return student, teacher


def build_network(backbone: VisionTransformer, out_dims: tuple[int, int], norm_last_layer: bool = True,
                  k_num: int = 4, use_patches: bool = True, pack_crops: bool = False, **head) -> MultiCropWrapper:
    """A backbone with its three heads.

    Args:
        out_dims: prototypes of the image head and of the patch head.
        norm_last_layer: freeze the prototypes' gain.
        k_num: positives of a patch.
        use_patches: False for DINO: the patch head is in the state dict, but is neither run nor trained.
        pack_crops: one pass for crops of all sizes, see packed_crops.py.
        head: of both projection heads, see DINOHead: use_bn, hidden_dim.
    """
    c_head, p_head = (DINOHead(backbone.embed_dim, out_dim, norm_last_layer=norm_last_layer, **head)
                      for out_dim in out_dims)
    if not use_patches:
        p_head.requires_grad_(False)
    wrapper_class = PackedMultiCropWrapper if pack_crops else MultiCropWrapper
    return wrapper_class(backbone, SelfPatchHead(backbone.embed_dim, backbone.num_heads, k_num), c_head, p_head,
                         use_patches)


@dataclass(eq=False)
class TrainingRun:
    """Everything that a run carries from one step to the next.

    Args:
        student: a MultiCropWrapper, or DistributedDataParallel around one.
        teacher: a MultiCropWrapper without gradients.
        dino_loss: a DINOLoss, or an object with the same methods.
        optimizer: over optim.get_params_groups(student).
        schedules: from build_schedules.
        dtype: of autocast; float32 for none. float16 brings a GradScaler.
        clip_grad: largest norm of each gradient tensor; 0 for no clipping.
        freeze_last_layer: epochs during which the heads' last layers do not change.
        accum_steps: small batches per step.
        freeze_backbone_epochs: epochs during which the student's backbone does not change.
        cuda_graphs: whether networks and loss are compiled in a mode with CUDA graphs.

    Attributes:
        step: steps done since the run began.
        epoch: whole epochs done.
    """
    student: nn.Module
    teacher: MultiCropWrapper
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    dtype: torch.dtype = torch.float32
    clip_grad: float = 3.0
    freeze_last_layer: int = 1
    accum_steps: int = 1
    freeze_backbone_epochs: int = 0
    cuda_graphs: bool = False

    def __post_init__(self):
        self.step, self.device = 0, next(self.student.parameters()).device
        self.reads_are_free = self.device.type == "cpu"  # reading from a GPU means waiting for it
        self.skipped_steps, self.bad_norms = torch.zeros((), device=self.device), None  # see engine.check_step
        self.gradient_norms = None  # of each tensor at the last step, before clipping, on the device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    @property
    def steps_per_epoch(self) -> int:
        return self.schedules.steps_per_epoch

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def student_module(self) -> MultiCropWrapper:
        """The student without DistributedDataParallel around it."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def begin_step(self) -> None:
        """Drop the last step's gradients, and set this step's rates."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.cuda_graphs:
            # from here on, but not within the step, graphs may overwrite their earlier outputs
            torch.compiler.cudagraph_mark_step_begin()
        self.set_rates()

    def set_rates(self) -> None:
        """Give the optimiser this step's learning rate and weight decay."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.schedules.lr(self.step) * group.get("lr_scale", 1.0)
            # biases and norms, the second of two groups, have no weight decay
            if group.get("decayed", i == 0):
                group["weight_decay"] = self.schedules.weight_decay(self.step)

    def state_dict(self) -> dict:
        """The published layout; under DistributedDataParallel the student's keys begin with "module.".

        Within an epoch there is also step_of_epoch, the number of its steps that are done.
        """
        state = {"student": self.student.state_dict(), "teacher": self.teacher.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "epoch": self.epoch,
                 "dino_loss": self.dino_loss.state_dict(), "fp16_scaler": self.scaler.state_dict()}
        step_of_epoch = self.step % self.steps_per_epoch
        return state | ({"step_of_epoch": step_of_epoch} if step_of_epoch else {})

    def load_state_dict(self, state: dict) -> None:
        """Continue from state, strictly; with or without DistributedDataParallel, and with or without a scaler.

        Raises:
            ConfigError: an entry is missing or does not fit.
        """
        parts = {"student": self.student_module, "teacher": self.teacher, "optimizer": self.optimizer,
                 "dino_loss": self.dino_loss}
        if missing := [name for name in (*parts, "epoch") if name not in state]:
            raise ConfigError(f"has no {missing[0]!r}, only {', '.join(map(str, state))}")
        if wrong := [name for name in parts if not isinstance(state[name], dict)]:
            raise ConfigError(f"its {wrong[0]} is a {type(state[wrong[0]]).__name__}, not a state dict")
        for name in ("epoch", "step_of_epoch"):
            if not isinstance(number := state.get(name, 0), int) or number < 0:
                raise ConfigError(f"its {name} is {number!r}, not a number from 0")
        if state.get("fp16_scaler") and self.scaler.is_enabled():  # empty unless that run was in float16
            parts["fp16_scaler"] = self.scaler
        for name, part in parts.items():
            try:
                if name == "optimizer":
                    load_optimizer(part, state[name])
                else:
                    part.load_state_dict({key.removeprefix("module."): value for key, value in state[name].items()})
            except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
                lines = [line.strip() for line in str(error).splitlines()[:4]]
                raise ConfigError(f"its {name} does not fit this run's options: {'; '.join(lines)}") from None
        self.step = state["epoch"] * self.steps_per_epoch + state.get("step_of_epoch", 0)
