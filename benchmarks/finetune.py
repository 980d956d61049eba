"""Fine-tuning compressed values against training the dense model, a step each: `python -m benchmarks.finetune`.

One Transformer, once with dense parameters and once with compressed ones, both by AdamW with float32 parameters and
moments and bfloat16 products. What is written are wall-clock times of a step, measured in turns, the kernel times of a
step by CUPTI, and the bytes of the pruned layers' parameters and moments.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shfl_jax
from benchmarks import records as files
from pallas_kernels import timing
from shfl_jax import LayerSpec, Masks, ShflBW
from shfl_jax.pruning import bits_per_token
from training.gpt import GPT

PRUNED = r"(.*/)?(mlp|attn)/.*"
STEPS = 8
"""Steps of one wall-clock measurement."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One Transformer and batch."""

    d_model: int = 2048
    mlp: int = 8192
    layers: int = 4
    heads: int = 16
    batch: int = 32
    context: int = 256
    sparsity: float = 0.75
    group_size: int = 128

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context

    @property
    def model(self) -> GPT:
        """The module."""
        return GPT(256, self.context, self.d_model, self.layers, self.heads, self.mlp, 0.0, jnp.bfloat16)


CASES = (Case(), Case(batch=64))
SMOKE = Case(64, 128, 1, 2, 2, 16, group_size=16)


def random_masks(specs: dict[str, LayerSpec], params: Any, seed: int = 0) -> Masks:
    """Masks of Shfl-BW whose rows are in random order: weights that are random too have no order that is better."""
    rng, found, leaves = np.random.default_rng(seed), {}, shfl_jax.path_leaves(params)
    for path, spec in specs.items():
        pattern, shape = spec.pattern, spec.matrix_shape
        assert pattern.searches_rows
        rows = jnp.asarray(rng.permutation(shape[0]), jnp.int32)
        scores = jnp.abs(spec.to_matrix(leaves[path]))
        choose = jax.jit(functools.partial(pattern.mask_of_rows, count=pattern.count(shape)))
        found[path] = choose(scores, rows)
    return Masks(found, tuple(specs.values()))


def step_of(apply: Callable[[Any, Any, jax.Array], jax.Array], tx: optax.GradientTransformation) -> Callable:
    """(params, opt_state, topology, windows) -> params, opt_state, loss: one step of training, not compiled."""

    def step(params: Any, opt_state: Any, topology: Any, windows: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return bits_per_token(apply(params, topology, windows[:, :-1]), windows[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def nbytes(specs: dict[str, LayerSpec], params: Any, opt_state: Any, topology: Any = ()) -> int:
    """Bytes of the pruned kernels, of what the optimizer keeps for them, and of their topology."""
    trees = [params, *(tree for tree in jax.tree.leaves(opt_state, is_leaf=_is_moments) if _is_moments(tree))]
    leaves = [leaf for tree in trees for path, leaf in shfl_jax.path_leaves(tree).items() if path in specs]
    return sum(leaf.nbytes for leaf in [*leaves, *jax.tree.leaves(topology)])


def _is_moments(tree: Any) -> bool:
    return isinstance(tree, dict)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The records of a case, the dense model's first."""
    model, tx = case.model, optax.adamw(1e-4)
    windows = jax.random.randint(jax.random.key(1), (case.batch, case.context + 1), 0, model.vocab)
    params = jax.jit(model.init)(jax.random.key(0), windows[:1, :-1])["params"]
    plan = shfl_jax.Plan({PRUNED: ShflBW(case.sparsity, group_size=case.group_size, balanced=True)})
    specs = shfl_jax.linen.resolve(plan, model, windows[:1, :-1])
    sparse = shfl_jax.compress(params, random_masks(specs, params))

    def dense_apply(params: Any, topology: Any, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, tokens))

    def sparse_apply(params: Any, topology: Any, tokens: jax.Array) -> jax.Array:
        return shfl_jax.linen.apply(model, {"params": params, "topology": topology}, tokens)

    variants = {
        "dense": (dense_apply, params, {}),
        "compressed": (sparse_apply, sparse["params"], sparse["topology"]),
    }
    steps, states, sizes, kernels, temporary = {}, {}, {}, {}, {}
    for label, (apply, values, topology) in variants.items():
        state = (jax.tree.map(jnp.array, values), tx.init(values))
        step = jax.jit(step_of(apply, tx), donate_argnums=(0, 1)).lower(*state, topology, windows).compile()
        sizes[label] = nbytes(specs, *state, topology)
        analysis = step.memory_analysis()
        temporary[label] = None if analysis is None else analysis.temp_size_in_bytes
        steps[label], states[label] = (lambda *args, s=step, t=topology: s(*args, t, windows)), state
        if jax.default_backend() == "gpu":
            kept = jax.jit(step_of(apply, tx)).lower(*state, topology, windows).compile()
            kernels[label] = timing.median_us(kept, [(*state, topology, windows)], 5)[0]
    times: dict[str, list[float]] = {label: [] for label in variants}
    for i in range(rounds + 1):  # the first round warms up
        for label, step in steps.items():
            begin, loss = time.perf_counter(), None
            for _ in range(STEPS):
                *states[label], loss = step(*states[label])
            value = float(jax.block_until_ready(loss))
            if i:
                times[label].append(1e6 * (time.perf_counter() - begin) / STEPS)
            if not np.isfinite(value):
                raise FloatingPointError(f"{label}: the loss is {value}")
    medians = {label: statistics.median(values) for label, values in times.items()}
    return [
        {
            "op": "finetune",
            "label": label,
            "case": f"d{case.d_model}/{case.layers} layers/{case.tokens} tokens/V{case.group_size}",
            "pattern": "dense" if label == "dense" else "shfl_bw",
            "implementation": "xla" if label == "dense" else "default",
            "m": case.mlp,
            "k": case.d_model,
            "n": case.tokens,
            "dtype": "bfloat16",
            "sparsity": 0.0 if label == "dense" else case.sparsity,
            "group_size": None if label == "dense" else case.group_size,
            "counts": None if label == "dense" else "equal",
            **{name: getattr(case, name) for name in ("d_model", "mlp", "layers", "heads", "batch", "context")},
            "time_us": medians[label],
            "dense_time_us": medians["dense"],
            "speedup": medians["dense"] / medians[label],
            "kernel_us": kernels.get(label),
            "kernel_speedup": kernels["dense"] / kernels[label] if kernels else None,
            "layer_bytes": sizes[label],
            "memory": sizes[label] / sizes["dense"],
            "temporary_bytes": temporary[label],
        }
        for label in variants
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs the program."""
    parser = files.command_line("finetune", __doc__, smoke="one tiny model")
    parser.add_argument("--rounds", type=int, default=5, help="wall-clock measurements (default: %(default)s)")
    options = parser.parse_args(argv)
    path, records = files.output(parser, options, "finetune"), []
    for case in (SMOKE,) if options.smoke else CASES:
        records += measure(case, options.rounds)
        files.write(path, records)
        for r in records[-2:]:
            print(
                f"{r['case']}, {r['label']}: {r['time_us'] / 1e3:.2f} ms a step, {r['speedup']:.2f} times dense; "
                f"memory of the pruned layers {r['memory']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
