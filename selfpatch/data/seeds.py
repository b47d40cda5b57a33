"""Random draws that depend on numbers such as (seed, epoch, index), not on the process or the order of drawing."""
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """A seed from 0 to 2³² − 1 for a sequence of numbers from 0; sequences hardly ever collide."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed torch's CPU generator with mixed_seed(*numbers) for the body, and restore its state afterwards."""
    # not torch.manual_seed, which seeds every accelerator as well and takes ten times as long
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(mixed_seed(*numbers))
    try:
        yield
    finally:
        generator.set_state(state)
