"""The pretraining job with a small network and small crops, in this process."""
import torch

from main_selfpatch import get_args_parser

SMALL = ["--arch", "vit_tiny", "--global_crops_size", "48", "--local_crops_size", "48", "--local_crops_number", "1",
         "--out_dim", "64", "--out_dim_selfpatch", "32", "--batch_size_per_gpu", "4", "--num_workers", "0",
         "--warmup_epochs", "1", "--device", "cpu", "--saveckp_freq", "1"]


def options(*words):
    return get_args_parser().parse_args([*SMALL, *map(str, words)])


def load(path):
    return torch.load(path, weights_only=True)
