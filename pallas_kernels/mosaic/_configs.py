"""How the Mosaic kernels tile their work: configs, the heuristics that choose one, and the space a tuner searches."""

import dataclasses
import math
from typing import Literal

from pallas_kernels._backend import Problem
from pallas_kernels._window import Window
from pallas_kernels.gpu._layout import WORD

BLOCK_K = 64  # slots of the shortest step: what one row of a swizzled tile holds along K
GRAD_TOKENS = 64  # tokens of a step for dValues: what one row of a swizzled tile holds
GROUP_SIZES = (64, 128, 256)
SHARED_MEMORY = 227 * 1024 - 2048  # bytes for the stages and the ring of ids; barriers and alignment take the rest
NARROW = 0.6  # what a convolution's tile of 128 tokens takes, of the time of one of 256
FEW_PACKED_TOKENS = 64  # up to so many a packed product is bound by reading the weights: one tile takes all tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a program and how tiles are dealt to programs.

    Attributes:
        block_tokens: tokens of a tile.
        stages: depth of the ring of operand tiles, in steps.
        ahead: how many steps earlier than its operands a step's column ids are fetched.
        split: what the two consumers divide a tile by, "rows" or "tokens". By rows both read all tokens, in the widest
            instructions; by tokens both read all rows.
        band: token tiles that programs side by side share: the tiles of `band` token tiles are dealt out group by
            group before the next band begins. Ragged groups are dealt heaviest first, whatever the band.
        registers: of a thread of the consumers and of the producer; (2 a + b) <= 512 - 8 in multiples of 8.
        block_k: slots of a step, a multiple of `BLOCK_K`.
    """

    block_tokens: int = 256
    stages: int = 4
    ahead: int = 4
    split: Literal["rows", "tokens"] = "tokens"
    band: int = 1
    registers: tuple[int, int] = (216, 72)
    block_k: int = BLOCK_K

    def shared_memory(self, group_size: int, packed: bool = False, id_words: int = 1) -> int:
        """Bytes of the stages and the ring of column ids, `id_words` 32-bit words each.

        A packed step has half the values, and their pairs.
        """
        weights = group_size + 2 * group_size // WORD if packed else 2 * group_size
        slot = self.stages * (weights + 2 * self.block_tokens) + 4 * id_words * (self.stages + self.ahead)
        return slot * self.block_k


@dataclasses.dataclass(frozen=True)
class GradConfig:
    """The shape of a program for dValues.

    Attributes:
        block_slots: slots of a tile.
        stages: depth of the ring of operand tiles, in steps.
        registers: of a thread of the consumers and of the producer.
    """

    block_slots: int = 256
    stages: int = 4
    registers: tuple[int, int] = (208, 88)

    def shared_memory(self, group_size: int) -> int:
        """Bytes of the stages."""
        return self.stages * GRAD_TOKENS * (group_size + self.block_slots) * 2


def heuristic(problem: Problem, multiprocessors: int) -> Config | GradConfig:
    """The config for a problem that the kernels support."""
    v, n = problem.group_size, problem.n
    if problem.op == "grad_values":
        return _grad_configs(problem, multiprocessors)[0]
    if problem.packed:
        return _packed(problem, multiprocessors)
    if problem.window is not None and v < 256:
        return _convolution(problem, problem.window, multiprocessors)
    if v == 256:
        return Config(block_tokens=128, split="rows", band=4)
    if v == 128:
        return Config(block_tokens=256, split="rows", band=4)
    if n % 512 == 0:
        return Config(block_tokens=512, stages=3, split="tokens")
    return Config(block_tokens=256, stages=5, split="tokens")


def search_space(problem: Problem, multiprocessors: int) -> tuple[Config | GradConfig, ...]:
    """The configs a tuner measures for a problem, the heuristic's first."""
    if problem.op == "grad_values":
        return _grad_configs(problem, multiprocessors)
    found = [heuristic(problem, multiprocessors)]
    if problem.window is None and not problem.packed:
        shapes: dict[int, list[tuple[int, int, Literal["rows", "tokens"], int]]] = {
            64: [(512, 3, "tokens", 1), (512, 3, "tokens", 4), (256, 5, "tokens", 4)],
            128: [(256, 4, "rows", 1), (256, 4, "rows", 4), (128, 6, "rows", 4)],
            256: [(128, 4, "rows", 1), (128, 4, "rows", 4)],
        }
        found += [
            Config(block_tokens=tokens, stages=stages, split=split, band=band)
            for tokens, stages, split, band in shapes[problem.group_size]
        ]
    return tuple(dict.fromkeys(found))


def tiles(problem: Problem, config: Config | GradConfig) -> int:
    """How many tiles a problem has."""
    if isinstance(config, GradConfig):
        return problem.groups * -(-problem.slots // problem.groups // config.block_slots)
    return problem.groups * -(-problem.n // config.block_tokens)


def _grad_configs(problem: Problem, multiprocessors: int) -> tuple[GradConfig, ...]:
    shapes = {64: [(512, 3), (256, 5), (128, 8)], 128: [(256, 4), (128, 6)], 256: [(128, 4)]}[problem.group_size]
    found = [GradConfig(block_slots=slots, stages=stages) for slots, stages in shapes]
    found.sort(key=lambda c: tiles(problem, c) < multiprocessors)  # large tiles, if there are enough of them
    return tuple(found)


def _convolution(problem: Problem, window: Window, multiprocessors: int) -> Config:
    # How many tiles a program gets; one that is cut off by the last token counts for as much as it has.
    narrow, wide = (-(-problem.groups * problem.n // (tokens * multiprocessors)) for tokens in (128, 256))
    small = NARROW * narrow < wide
    if problem.group_size == 128:
        return Config(block_tokens=128 if small else 256, stages=6 if small else 4, ahead=2, split="rows")
    if small:
        return Config(block_tokens=128, stages=8, ahead=2)
    return Config(block_tokens=256, stages=5, ahead=2)


def _packed(problem: Problem, multiprocessors: int) -> Config:
    n, v = problem.n, problem.group_size
    if n <= FEW_PACKED_TOKENS and v > 64:
        # Few tokens: what a step costs beside its bytes is shared by as many slots as segments allow.
        width = max(16, 1 << (n - 1).bit_length())
        return _deepest(problem, Config(block_tokens=width, split="rows", block_k=128 if width == 64 else 256))
    if v == 64:
        return Config(block_tokens=512, stages=3, split="tokens")
    narrow = Config(block_tokens=128, stages=6, split="rows")
    if v == 256:
        return narrow
    # Half a tile takes more than half of the time: worth it only where whole ones leave multiprocessors idle.
    whole, half = (-(-problem.groups * -(-n // width) // multiprocessors) for width in (256, 128))
    return narrow if half < 1.6 * whole else Config(block_tokens=256, stages=5, split="rows", registers=(208, 88))


def _deepest(problem: Problem, config: Config) -> Config:
    """The config with steps that divide the segments, and as deep a ring as fits."""
    config = dataclasses.replace(config, block_k=math.gcd(config.block_k, problem.multiple))
    rings = (dataclasses.replace(config, stages=stages) for stages in range(12, 1, -1))
    return next(c for c in rings if c.shared_memory(problem.group_size, packed=True) <= SHARED_MEMORY)
