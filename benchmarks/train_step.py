"""Speed of one training step on synthetic crops: images/s, milliseconds a stage, peak memory, model-FLOPs utilisation.

    python benchmarks/train_step.py --plain                                # beside the published order of work
    python benchmarks/train_step.py --plain loss --json loss.json          # ours with one part in the published order
    python benchmarks/train_step.py --batch_size 128 --device cuda --plain

Each way runs in a process of its own, so that peak memory is its own, and the two take turns, step by step, so that
whatever else the machine does hits both. Warm-up steps (compilation, clocks, caches) are not timed. Utilisation is
model FLOPs (multiply and add counted as two, nothing for what is computed twice) over the rate of a large matrix
product measured in the same run, by the same process.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine
import main_selfpatch as job
import utils
from losses import DINOLoss, Losses
from options import get_args_parser as pretraining_options
from selfpatch_head import SelfPatchHead
from vision_transformer import VisionTransformer

PARTS = ("backbone", "head", "loss", "update")
GLOBAL, LOCAL = 224, 96


# ---------------------------------------------------------------- the published order of work, part by part

class PlainBackbone(VisionTransformer):
    """Stochastic depth by multiplication with 0."""

    def _run(self, block, tokens):
        return block(tokens)


class PlainHead(SelfPatchHead):
    """Neighbours gathered before they are compared, keys and values projected after the gather."""

    def forward(self, x, loc=False, grid=None, patches=True):
        B, N, D = x.shape
        c = self.summarise(x)
        if not loc:
            return self.norm(torch.cat([c, x], dim=1))
        rows = torch.arange(N, device=x.device).view(grid)
        around = [rows.roll((-dy, -dx), (0, 1)).flatten() for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        neighbours = x[:, torch.stack(around, dim=1)]  # [B, N, 8, D]
        unit, others = F.normalize(x.float(), dim=-1), F.normalize(neighbours.float(), dim=-1)
        best = (others @ unit[..., None])[..., 0].topk(self.k_num, dim=-1).indices
        positives = neighbours.gather(2, best[..., None].expand(-1, -1, -1, D)).flatten(0, 1)
        return self.norm(torch.cat([c, self.summarise(positives).view(B, N, D)], dim=1))

    def summarise(self, x):
        """x [B, M, D] -> what the class token gathers from it, [B, 1, D]."""
        c = self.cls_token.expand(len(x), -1, -1)
        for block in self.cls_blocks:
            u, heads = block.norm1(torch.cat([c, x], dim=1)), block.attn.num_heads
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2)
                       for t in (block.attn.q(u[:, :1]), block.attn.k(u), block.attn.v(u)))
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            c = c + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            c = c + block.mlp(block.norm2(c))
        return c


class PlainLoss(DINOLoss):
    """All logits formed, the teacher's of local images too, and compared pair by pair and view by view."""

    def forward(self, student, teacher, epoch, last=True):
        temp = float(self.teacher_temp_schedule[epoch])
        (s_image, s_patch), (t_image, t_patch) = ((image.dense().float(), [p.dense().float() for p in patches])
                                                  for image, patches in (student, teacher))
        targets = ((t_image - self.center[0]) / temp).softmax(-1).chunk(self.ncrops)[:2]
        views = (s_image / self.student_temp).chunk(self.ncrops)
        pairs = [torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
                 for a, q in enumerate(targets) for v, s in enumerate(views) if v != a]
        patches, count = [], 0
        for s, t in zip(s_patch, t_patch, strict=True):
            q = ((t - self.patch_center) / temp).softmax(-1)
            patches += [torch.sum(-one_q * F.log_softmax(one_s / self.student_temp, dim=-1), dim=-1).mean()
                        for one_s, one_q in zip(s.chunk(count or 2), q.chunk(count or 2), strict=True)]
            count = self.ncrops - 2
        self.center.mul_(0.9).add_(t_image.mean(0), alpha=0.1)
        self.patch_center.mul_(0.9).add_(torch.cat([t.flatten(0, 1) for t in t_patch]).mean(0), alpha=0.1)
        image, patch = sum(pairs) / len(pairs), sum(patches) / len(patches)
        return Losses(image + 0.1 * patch, image, patch, image.new_zeros(()), image.new_zeros(()))


def plain_clip(model, clip):
    for p in model.parameters():
        if p.grad is not None:
            factor = clip / (p.grad.norm().item() + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)


@torch.no_grad()
def plain_ema(student, teacher, momentum):
    for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
        q.mul_(momentum).add_((1 - momentum) * p)


# ---------------------------------------------------------------- a way to step

class Way:
    """Networks, loss and optimiser of the job, with the parts named in plain in the published order."""

    def __init__(self, args: argparse.Namespace, plain: list[str] | None):
        self.plain = PARTS if plain == [] else plain or ()
        self.options = pretraining_options().parse_args([
            "--arch", args.arch, "--patch_size", str(args.patch_size), "--batch_size_per_gpu", str(args.batch_size),
            "--local_crops_number", str(args.local_crops_number), "--precision", args.precision,
            "--compile", args.compile, "--device", args.device])
        options = self.options
        if not self.plain and args.device != "cuda":
            utils.keep_freed_memory()
        options.checkpoint_activations = args.checkpoint_activations and not self.plain
        utils.init_distributed_mode(options)
        if plain == []:
            options.compile = "off"
            if options.device.type == "cuda" and args.precision == "auto":
                options.precision = "fp16"
            if options.device.type == "cpu":
                options.precision = "fp32"
        self.device, self.dtype = options.device, job.autocast_dtype(options)
        torch.manual_seed(0)
        self.student, self.teacher = job.build_models(options)
        self.teacher.load_state_dict(self.student.state_dict())
        self.student.backbone.checkpoint_activations = options.checkpoint_activations
        for model in (self.student, self.teacher):
            if "backbone" in self.plain:  # attention weights formed whole, dropped samples computed
                for block in model.backbone.blocks:
                    block.attn.fused_attn = False
                model.backbone.__class__ = PlainBackbone
            if "head" in self.plain:
                model.ca_head.__class__ = PlainHead
        crops = 2 + options.local_crops_number
        kind = PlainLoss if "loss" in self.plain else DINOLoss
        self.loss = kind(options.out_dim, options.out_dim_selfpatch, crops, 0.04, 0.04, 0, 1).to(self.device)
        self.compiled = job.compiles(options)
        if self.compiled:
            job.compile_parts(options, self.student, self.teacher, self.loss)
        plain_update = "update" in self.plain
        self.optimizer = (torch.optim.AdamW(utils.get_params_groups(self.student)) if plain_update
                          else job.build_optimizer(options, self.student))
        self.clip, self.ema = (plain_clip, plain_ema) if plain_update else (utils.clip_gradients, utils.update_teacher)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        torch.manual_seed(1)
        self.crops = [torch.randn(args.batch_size, 3, size, size, device=self.device)
                      for size in [GLOBAL] * 2 + [LOCAL] * (crops - 2)]

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self) -> float:
        """Seconds of a whole step: the job's own, unless a part is as published. On a GPU the mean of five steps, as
        training does not wait between them either."""
        steps = 5 if self.device.type == "cuda" else 1
        start = self.wait()
        for _ in range(steps):
            if self.plain:
                self.staged(lambda _: None)
            else:
                engine.train_step(self.student, self.teacher, self.loss, self.optimizer, [self.crops], 0, 0.996, 3.0,
                                  0, self.dtype, self.scaler)
        return (self.wait() - start) / steps

    def forget_peak(self) -> None:
        """Begin peak memory anew, where that can be: on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def staged(self, mark) -> float:
        """The step in pieces, mark(name) being called after each; the loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                targets = self.teacher(self.crops, loc=True)
            mark("teacher")
            output = self.student(self.crops)
            mark("student")
            loss = self.loss(output, targets, 0).total
            mark("loss")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        mark("backward")
        self.scaler.unscale_(self.optimizer)
        self.clip(self.student, 3.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mark("clip, step")
        self.ema(self.student, self.teacher, 0.996)
        mark("teacher's move")
        return loss

    def first_loss(self) -> float:
        """Of a step that all ways begin with, on the same crops and draws."""
        torch.manual_seed(1)
        return self.staged(lambda _: None).item()

    def stages(self) -> dict[str, float]:
        """Seconds by stage, the device's queue emptied after each."""
        seconds, last = {}, self.wait()

        def mark(name):
            nonlocal last
            now = self.wait()
            seconds[name], last = now - last, now
        self.staged(mark)
        return seconds

    def matrix_rate(self) -> float:
        """FLOP/s of a large product in this way's precision: the best of several."""
        n = 8192 if self.device.type == "cuda" else 2048
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        best = float("inf")
        for _ in range(6):
            start = self.wait()
            for _ in range(10 if self.device.type == "cuda" else 1):
                a @ b
            best = min(best, (self.wait() - start) / (10 if self.device.type == "cuda" else 1))
        return 2 * n ** 3 / best

    def peak_memory(self) -> float:
        return utils.peak_memory_gb(self.device)

    def describe(self) -> str:
        return (f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}"
                f"{', compiled' if self.compiled else ''}"
                f"{', as published: ' + ', '.join(self.plain) if self.plain else ''}")


def flops_per_image(backbone: torch.nn.Module, local_crops: int) -> float:
    """Model FLOPs of one image: the student's forward three times (backward is twice as much), the teacher's once."""
    D, depth, patch = backbone.embed_dim, len(backbone.blocks), backbone.patch_size
    tokens = [(size // patch) ** 2 for size in [GLOBAL] * 2 + [LOCAL] * local_crops]
    rows = sum(tokens)
    blocks = sum(depth * (24 * n * D * D + 4 * n * n * D) + 2 * n * 3 * patch * patch * D for n in tokens)
    projection = 2 * (D * 2048 + 2048 * 2048 + 2048 * 256)
    both = blocks + rows * (8 * D * D + projection + 2 * 256 * 4096) + len(tokens) * (projection + 48 * D * D)
    student = both + len(tokens) * 2 * 256 * 65536
    teacher = both + 2 * 2 * 256 * 65536 + rows * 48 * D * D  # targets: query, projection and MLP, twice a patch
    return 3 * student + teacher


# ---------------------------------------------------------------- processes that take turns

def serve(pipe, args: argparse.Namespace, plain: list[str] | None) -> None:
    """A way in a process of its own, which does what it is told by the method's name."""
    way = Way(args, plain)
    while order := pipe.recv():
        pipe.send(getattr(way, order)())


def start(args: argparse.Namespace, plain: list[str] | None):
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=serve, args=(other, args, plain), daemon=True)
    process.start()
    other.close()

    def ask(order):
        """What the way's method of that name returns; an empty order ends the process."""
        pipe.send(order)
        try:
            return pipe.recv() if order else process.join()
        except EOFError:
            sys.exit("a way's process has ended; its error stands above")
    return ask


def measure(args: argparse.Namespace) -> dict[str, dict]:
    ways = {"ours": start(args, None)}
    if args.plain is not None:
        ways["plain"] = start(args, args.plain)
    seconds, results = {name: [] for name in ways}, {}
    for name, ask in ways.items():
        results[name] = {"way": ask("describe"), "first_loss": ask("first_loss")}
        print(f"{name}: {results[name]['way']}; loss of the first step {results[name]['first_loss']:.5f}", flush=True)
        for _ in range(args.warmup):
            ask("step")
        ask("forget_peak")
    for _ in range(args.steps):
        for name, ask in ways.items():
            time.sleep(0.3)  # the other way's threads spin for a while after their work
            seconds[name].append(ask("step"))
    backbone = job.ARCHS[args.arch](args.patch_size)
    flops = flops_per_image(backbone, args.local_crops_number)
    for name, ask in ways.items():
        memory, median = ask("peak_memory"), statistics.median(seconds[name])
        rate = ask("matrix_rate")
        results[name] |= {
            "images_per_second": args.batch_size / median, "seconds": median,
            "spread": statistics.pstdev(seconds[name]), "peak_gib": memory, "matrix_tflops": rate / 1e12,
            "gflop_per_image": flops / 1e9, "utilisation": flops * args.batch_size / median / rate,
            "stages": {stage: 1000 * s for stage, s in ask("stages").items()}}
        ask("")
    return results


def show(results: dict[str, dict]) -> None:
    print(f"{'':<22}" + "".join(f"{name:>12}" for name in results))
    for label, key, form in (("images/s", "images_per_second", ".2f"), ("seconds a step", "seconds", ".3f"),
                             ("  spread", "spread", ".3f"), ("peak memory, GiB", "peak_gib", ".2f"),
                             ("matrix rate, TFLOP/s", "matrix_tflops", ".2f"), ("utilisation", "utilisation", ".1%")):
        print(f"{label:<22}" + "".join(f"{format(result[key], form):>12}" for result in results.values()))
    for stage in results["ours"]["stages"]:
        print(f"{'ms, ' + stage:<22}" + "".join(f"{result['stages'][stage]:12.0f}" for result in results.values()))
    if "plain" in results:
        ours, plain = results["ours"], results["plain"]
        print(f"ours is {plain['seconds'] / ours['seconds']:.2f} times as fast, "
              f"with {ours['peak_gib'] / plain['peak_gib']:.0%} of the peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="vit_small", choices=list(job.ARCHS))
    parser.add_argument("--patch_size", default=16, type=int)
    parser.add_argument("--batch_size", default=4, type=int)
    parser.add_argument("--local_crops_number", default=8, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--plain", nargs="*", choices=PARTS,
                        help="also the published order of work: all of it (in float16 on a GPU, not compiled), or the "
                             "parts that are named")
    parser.add_argument("--warmup", default=2, type=int, help="steps before the first timed one")
    parser.add_argument("--steps", default=8, type=int)
    parser.add_argument("--json", help="write the figures there as well")
    args = parser.parse_args()
    print(f"{args.arch}/{args.patch_size}, {args.batch_size} images, 2×{GLOBAL} + {args.local_crops_number}×{LOCAL}, "
          f"heads 65536/4096, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"load {os.getloadavg()[0]:.1f}")
    results = measure(args)
    show(results)
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "torch": torch.__version__, **results}, indent=1))


if __name__ == "__main__":
    main()
