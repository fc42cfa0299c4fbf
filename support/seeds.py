"""Random numbers: each is a function of the seed and of what it is for."""

import hashlib

import torch


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The source of randomness of one sample: independent for every (seed, epoch, index).

    Numbers below 0 are for what is no sample: index -1 is an epoch's shuffle, index -2 - rank what a process draws on
    its device, epoch -1 the masks of pictures.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_below(count: int, generator: torch.Generator) -> int:
    """A uniform integer in [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def seed_device(seed: int, micro_step: int, rank: int) -> None:
    """Seed what is drawn on the device: drop path, dropout and mixup of the run's `micro_step`-th micro-batch."""
    torch.manual_seed(random_below(2**62, sample_generator(seed, micro_step, -2 - rank)))
