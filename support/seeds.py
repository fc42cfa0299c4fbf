"""Random numbers: each is a function of the seed and of what it is for, so a resumed run repeats an uninterrupted one.

What a sample holds depends on (seed, epoch, index): not on the number of processes, loader workers or micro-batches.
What a training step samples (drop path, dropout, mixup) depends on (seed, micro-batch of the run, rank).
"""

import hashlib

import torch


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return the source of randomness of one sample: independent for every (seed, epoch, index).

    Negative numbers are reserved: index -1 for an epoch's shuffle, index -2 - rank for what a process samples in a
    training step, epoch -1 for the masks of pictures.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_below(count: int, generator: torch.Generator) -> int:
    """Return a uniform integer in [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def seed_device(seed: int, micro_step: int, rank: int) -> None:
    """Seed what the run's `micro_step`-th micro-batch samples after loading: drop path, dropout and mixup."""
    torch.manual_seed(random_below(2**62, sample_generator(seed, micro_step, -2 - rank)))
