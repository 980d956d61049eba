"""How the Triton kernels tile their work: configs, the heuristic that chooses one, and the space a tuner searches."""

import dataclasses

from pallas_kernels import _tables as tables
from pallas_kernels._backend import Problem

SHARED_MEMORY = 227 * 1024  # bytes a program may use on the largest GPU the search space is made for


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of one program and how it is scheduled.

    Attributes:
        block_rows: rows of the output tile: of W (forward), slots (grad_values) or inputs (grad_input).
        block_tokens: tokens of the tile (forward, grad_input) or of a step (grad_values).
        block_k: contraction length of a step (forward, grad_input).
        num_warps: warps of a program.
        num_stages: depth of the software pipeline, in steps. With column ids inside it the ids take part of it.
        prefetch: carry the next step's column ids in registers instead of pipelining them with the tiles.
        tokens_first: consecutive programs take consecutive token tiles of one row group, not one tile of all groups.
        flip: compute the transposed tile, which makes tokens the rows of the matrix unit.
        split: number of pieces the contraction is cut into; each yields float32 partials.
        early_rows: load where the output goes before the loop over the steps; takes registers, saves a wait.
    """

    block_rows: int = 128
    block_tokens: int = 128
    block_k: int = 32
    num_warps: int = 4
    num_stages: int = 7
    prefetch: bool = False
    tokens_first: bool = False
    flip: bool = False
    split: int = 1
    early_rows: bool = False


def config(problem: Problem, device: str | None = None) -> Config:
    """The config to use: the nearest measured one of the device, else the heuristic's.

    Args:
        problem: the product.
        device: a device kind, as `jax.Device.device_kind`; None or one without a table uses the heuristic.
    """
    # No table holds packed products.
    entry = None if _is_packed(problem) else tables.nearest_product(device, "triton", problem)
    return heuristic(problem) if entry is None else Config(**entry["config"])


def heuristic(problem: Problem) -> Config:
    """A config that is legal for the problem and reasonable on any GPU since the A100."""
    if _is_packed(problem):
        return _packed_heuristic(problem)
    rows = min(problem.group_size, 128)
    wide = problem.itemsize // 2
    if problem.op == "grad_values":
        rows_of_tile = min(128, _power_of_two(problem.slots * problem.group_size // max(problem.m, 1)))
        tiles = problem.slots // rows_of_tile
        split = _power_of_two(max(1, min(264 // max(tiles, 1), problem.n // 512)))
        return Config(max(rows_of_tile, 16), 64 // wide, num_stages=3, split=split)
    if problem.op == "grad_input":
        tokens = _token_tile(problem.n, 128)
        if problem.n <= 64:
            return Config(64, tokens, min(rows, 128 // wide), num_stages=3, prefetch=True, split=4)
        # Large tiles read W and dY less often, and partial sums of many tokens cost more than idle multiprocessors.
        tiles = -(-problem.k // 128) * -(-problem.n // tokens)
        split = _power_of_two(min(8, 132 // tiles))
        return Config(128, tokens, min(rows, 64 // wide), prefetch=True, num_stages=4, split=split)
    if not problem.few_tokens:
        if rows == 128 and problem.n % 256 == 0:
            return Config(128, 256, 64 // wide, num_warps=8, num_stages=5, early_rows=True)
        if rows == 128:
            return Config(128, 128, 64 // wide, num_stages=5)
        if rows == 64:
            return Config(64, 256 // wide, 32 // wide)
        return Config(rows, 128, 32 // wide, flip=True)
    return Config(
        min(rows, 64) if problem.n <= 64 else rows,
        _token_tile(problem.n, 128),
        (128 if problem.n > 64 or problem.itemsize == 4 else 256) // wide,
        num_stages=3,
        prefetch=True,
        flip=rows < 64,
    )


def search_space(problem: Problem) -> tuple[Config, ...]:
    """The configs a tuner measures for the problem, the heuristic's first."""
    if _is_packed(problem):
        return _packed_search_space(problem)
    v, wide, n = min(problem.group_size, 128), problem.itemsize // 2, problem.n
    found = [heuristic(problem)]
    if problem.op == "grad_values":
        found += [
            Config(rows, 64 // wide, num_warps=warps, num_stages=stages, split=split)
            for rows in (64, 128, 256)
            for warps in (4, 8)
            for stages in (3, 4)
            for split in (1, 2, 4)
            if rows * v >= 32 * 32 * warps
        ]
    elif problem.op == "grad_input":
        found += [
            Config(rows, tokens, min(v, k // wide), num_stages=stages, prefetch=prefetch, split=split)
            for rows in (64, 128)
            for tokens in {_token_tile(n, 64), _token_tile(n, 128)}
            for k in (64, 128)
            for stages in (3, 4)
            for prefetch in (False, True)
            for split in (1, 2, 4, 8)
        ]
    elif not problem.few_tokens:
        pipelines = ((32, 6, False), (32, 7, False), (64, 3, False), (64, 5, False), (64, 7, False), (64, 3, True))
        tiles = [(v, 128, 4), (v, 256, 4 if v < 128 else 8)]
        tiles += {64: [(64, 256, 8)]}.get(v, [])
        found += [
            Config(rows, tokens, k // wide, warps, stages, prefetch, tokens_first, flip, early_rows=early_rows)
            for rows, tokens, warps in tiles
            for k, stages, prefetch in pipelines
            for early_rows in (False, True)
            for tokens_first in (False, True)
            for flip in ((False,) if v >= 64 else (False, True))
        ]
    else:
        tokens = _token_tile(n, 128)
        found += [
            Config(rows, tokens, k // wide, 4, stages, True, False, flip, split, early_rows)
            for early_rows in (False, True)
            for rows in {min(v, 32), min(v, 64), v}
            for k, stages in ((64, 4), (128, 3), (128, 5), (256, 2), (256, 3))
            for flip in (False, True)
            for split in (1, 2, 4)
            if split == 1 or rows >= 64
        ]
    legal = (c for c in found if shared_memory(problem, c) <= SHARED_MEMORY)
    return tuple(dict.fromkeys(legal))


def _is_packed(problem: Problem) -> bool:
    return problem.packed and problem.op == "forward"  # derivatives are of the expanded matrix


def _packed_heuristic(problem: Problem) -> Config:
    tokens = max(16, min(64, 1 << (problem.n - 1).bit_length()))
    flip = tokens < 64  # few tokens are no rows for the widest instructions: let the weights' rows be their columns
    stages = (3 if flip else 2) if problem.itemsize == 2 else 1
    return Config(min(problem.group_size, 64), tokens, 256, num_warps=4, num_stages=stages, flip=flip)


def _packed_search_space(problem: Problem) -> tuple[Config, ...]:
    v, most = min(problem.group_size, 128), max(16, 1 << (problem.n - 1).bit_length())
    found = [_packed_heuristic(problem)]
    found += [
        Config(rows, min(64, most), 256, warps, stages, flip=flip, split=split)
        for rows, warps in sorted({(min(v, 32), 2), (min(v, 64), 4), (v, 4), (v, 8)})
        for stages in (1, 2, 3)
        for flip in ((False, True) if rows <= 64 else (False,))
        for split in ((1, 2) if rows == 128 else (1,))
    ]
    return tuple(dict.fromkeys(found))


def shared_memory(problem: Problem, config: Config) -> int:
    """About how many bytes of shared memory the pipeline of a program takes."""
    if problem.op == "grad_values":
        step = (config.block_rows + problem.group_size) * config.block_tokens
    else:
        step = (config.block_rows + config.block_tokens) * config.block_k
    # Ids inside the pipeline are one load ahead of what they address, which takes about half of its depth.
    stages = config.num_stages if problem.op != "forward" or config.prefetch else (config.num_stages + 1) // 2
    return step * stages * problem.itemsize


def _power_of_two(size: int) -> int:
    return 1 << max(size, 1).bit_length() - 1


def _token_tile(n: int, most: int) -> int:
    return max(16, min(most, 1 << (n - 1).bit_length()))
