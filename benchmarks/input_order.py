"""How much the order of a group's inputs gives under 2:4: `python -m benchmarks.input_order`.

Compares three orders: naive (ascending inputs), the one of `shfl_jax.fours`, and on small tiles the best of all orders,
by exhaustive search. Writes `benchmarks/results/<device>/input_order.json`.
"""

import argparse
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import shfl_jax
from benchmarks.records import RESULTS, write
from shfl_jax.patterns.search import _fours as fours
from training.compare import device

KINDS = ("normal", "columns", "correlated")


def small_tiles(kind: str, tiles: int = 8, rows: int = 16, inputs: int = 12, seed: int = 0) -> Iterator[np.ndarray]:
    """Tiles of scores (rows, inputs), float32, small enough for `best_order`.

    Args:
        kind: "normal": magnitudes of independent normal weights; "columns": the same with inputs of different scale,
            like ones side by side; "correlated": rows of three kinds that need different inputs, as a row permutation
            finds.
        tiles: how many.
        rows: V.
        inputs: kept inputs, a multiple of four.
        seed: of the random weights.
    """
    for tile in range(tiles):
        rng = np.random.default_rng([seed, tile, KINDS.index(kind)])
        scores = np.abs(rng.standard_normal((rows, inputs)))
        if kind == "columns":
            scores *= np.repeat(rng.permutation([2.0, 1.0, 0.5]), inputs // 3)
        elif kind == "correlated":
            scores *= np.exp(rng.standard_normal((3, inputs)))[rng.integers(0, 3, rows)]
        yield scores.astype(np.float32)


def kept_by(scores: np.ndarray, order: np.ndarray) -> float:
    """What 2:4 keeps of the scores (rows, inputs) in this order of the inputs."""
    ordered = scores[:, order].astype(np.float64).reshape(len(scores), -1, 4)
    return float(np.sort(ordered, axis=2)[:, :, 2:].sum())


def best_order(scores: np.ndarray) -> np.ndarray:
    """The best order of all, by exhaustive search over the partitions into fours: 5775 for 12 inputs."""
    inputs = scores.shape[1]
    value = {
        four: np.sort(scores[:, four].astype(np.float64), axis=1)[:, 2:].sum()
        for four in itertools.combinations(range(inputs), 4)
    }

    def best(rest: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        if not rest:
            return 0.0, ()
        found = []
        for others in itertools.combinations(rest[1:], 3):
            four = (rest[0], *others)
            total, order = best(tuple(i for i in rest if i not in four))
            found.append((total + value[four], four + order))
        return max(found)

    return np.array(best(tuple(range(inputs)))[1])


def small_records(tiles: int = 8) -> list[dict]:
    """One record for each kind of small tile: retained shares of the three orders, how much of the gap is closed."""
    records = []
    for kind in KINDS:
        total, kept = 0.0, {"naive": 0.0, "search": 0.0, "exhaustive": 0.0}
        for tile in small_tiles(kind, tiles):
            rows, all_kept = jnp.arange(len(tile), dtype=jnp.int32), jnp.ones((1, tile.shape[1]), bool)
            order = fours.order_columns(jnp.asarray(tile), rows, all_kept, len(tile))
            total += float(tile.sum(dtype=np.float64))
            kept["naive"] += kept_by(tile, np.arange(tile.shape[1]))
            kept["search"] += kept_by(tile, np.asarray(order)[0])
            kept["exhaustive"] += kept_by(tile, best_order(tile))
        closed = (kept["search"] - kept["naive"]) / (kept["exhaustive"] - kept["naive"])
        retained = {f"retained_{name}": value / total for name, value in kept.items()}
        shape = {"tiles": tiles, "rows": len(tile), "inputs": tile.shape[1]}
        records.append({"op": "input_order", "weights": kind, **shape, **retained, "gap_closed": closed})
    return records


def layer_record(scores: jax.Array, pattern: shfl_jax.TVW | shfl_jax.ShflTVW, weights: str) -> dict:
    """Retained saliency of one layer with the naive order of the inputs, and with the search's.

    Args:
        scores: (M, K) of the layer.
        pattern: TVW or ShflTVW.
        weights: what the record calls the layer.
    """
    mask = shfl_jax.mask(scores, pattern)
    m, k = scores.shape
    inputs = jnp.sort(jnp.where(mask.kept, jnp.arange(k, dtype=jnp.int32), k), axis=1)
    naive = jnp.pad(inputs, ((0, 0), (0, -k % 4)), constant_values=k)
    by_order = {
        name: float(jnp.sum(fours.choose_two(scores, mask.rows, order, pattern.group_size) * scores) / scores.sum())
        for name, order in (("naive", naive), ("search", jnp.asarray(mask.order)))
    }
    return {
        "op": "input_order",
        "weights": weights,
        "pattern": pattern.name,
        "m": m,
        "k": k,
        "sparsity": pattern.sparsity,
        "group_size": pattern.group_size,
        "rounds": pattern.rounds,
        "retained_naive": by_order["naive"],
        "retained_search": by_order["search"],
    }


def main() -> None:
    """Measures and writes the results file of this device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiles", type=int, default=8, help="small tiles of each kind")
    arguments = parser.parse_args()
    records = small_records(arguments.tiles)
    weight = np.abs(np.random.default_rng(0).standard_normal((1024, 1024))).astype(np.float32)
    for sparsity in (0.75, 0.875):
        for pattern in (shfl_jax.TVW(sparsity, 128), shfl_jax.ShflTVW(sparsity, 128), shfl_jax.ShflTVW(sparsity, 32)):
            records.append(layer_record(jnp.asarray(weight), pattern, "normal"))
    write(RESULTS / device() / "input_order.json", records)
    for record in records:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in record.items()})


if __name__ == "__main__":
    main()
