"""Training many models of one architecture, dense and pruned to many patterns, with few compiled programs.

The seeds of a model are stacked along a leading axis and trained together. A training step takes the masks as arrays in
the shapes of the kernels, so that one program trains every pattern, and the dense model too. The masks are updated
between calls of it, by a program of their own for each pattern, to which the sparsity is an argument: it is not inside
the mapped training step, where a `lax.cond` would run both of its branches at every step. What this does is what
`pruning.prune` does, as a test shows, except for the first gradient after an update: here it is taken at the pruned
weights.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shfl_jax
from shfl_jax import LayerSpec, Mask, Masks, Pattern
from shfl_jax.patterns import magnitude
from shfl_jax.pruning import choose_masks, keep_all, layer_kernels, zero_moments
from shfl_jax.sparse import matrices
from training.tasks import Task

Specs = dict[str, LayerSpec]


class Models(NamedTuple):
    """Models of one pattern and sparsity, one for each seed; every array has the seeds as its leading axis.

    Attributes:
        params: parameters.
        opt_state: the optimizer's state.
    """

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The compiled programs of one task.

    Attributes:
        task: the task.
        seeds: the seeds of all models: of initialisation, batches and dropout.
        specs: path -> `LayerSpec` of every layer that is pruned; their pattern is ignored.
    """

    task: Task
    seeds: tuple[int, ...]
    specs: Specs

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The recipe's."""
        return self.task.recipe.optimizer()

    @functools.cached_property
    def data(self) -> dict[str, jax.Array]:
        """The training data, on the device."""
        return {name: jnp.asarray(array) for name, array in self.task.train.items()}

    @functools.cached_property
    def keys(self) -> jax.Array:
        """A key for each seed: (S,)."""
        return jnp.stack([jax.random.key(seed) for seed in self.seeds])

    def start(self) -> Models:
        """Untrained models."""
        return jax.jit(jax.vmap(self._init))(self.keys)

    def _init(self, key: jax.Array) -> Models:
        params = self.task.model.init(key, *self.task.example)["params"]
        return Models(params, self.optimizer.init(params))

    def everything(self) -> dict[str, jax.Array]:
        """Masks that keep all weights, in the shapes of the kernels: path -> (S, ...) bool."""
        return {path: jnp.ones((len(self.seeds), *spec.shape), bool) for path, spec in self.specs.items()}

    def train(self, models: Models, kept: dict[str, jax.Array], step: int) -> tuple[Models, jax.Array]:
        """Trains for `every` steps.

        Args:
            models: given up (donated).
            kept: path -> (S, ...) bool, which weights of the pruned layers are kept.
            step: the number of the first step, from 0 for an untrained model; batches and noise depend on it.

        Returns:
            The models and their last losses (S,) float32.
        """
        return self._train(models, kept, jnp.int32(step), self.keys, self.data)

    @functools.cached_property
    def _train(self) -> Callable:
        task, layers, tx = self.task, tuple(self.specs.values()), self.optimizer

        def one(models: Models, kept: Any, first: jax.Array, key: jax.Array, data: Any) -> tuple[Models, jax.Array]:
            def step(models: Models, i: jax.Array) -> tuple[Models, jax.Array]:
                draw_key, loss_key = jax.random.split(jax.random.fold_in(key, first + i))
                batch = task.draw(data, draw_key, task.recipe.batch)
                value, gradients = jax.value_and_grad(task.loss)(models.params, batch, loss_key)
                updates, opt_state = tx.update(_masked(gradients, kept), models.opt_state, models.params)
                params = _masked(optax.apply_updates(models.params, updates), kept)
                return Models(params, opt_state), value

            models, losses = jax.lax.scan(step, models, jnp.arange(task.recipe.every))
            return models, losses[-1]

        layer_kernels(jax.eval_shape(task.model.init, jax.random.key(0), *task.example)["params"], layers)
        return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0, None)), donate_argnums=0)

    def whole(self, pattern: Pattern) -> dict[str, Mask]:
        """The masks of a pattern before the first update: path -> mask with a leading axis of the seeds."""
        count = len(self.seeds)
        return {
            path: jax.tree.map(
                lambda a: jnp.broadcast_to(a, (count, *a.shape)), keep_all(dataclasses.replace(spec, pattern=pattern))
            )
            for path, spec in self.specs.items()
        }

    def compile_renewal(self, pattern: Pattern) -> Callable:
        """Compiles the update of the masks of one pattern, at any sparsity.

        Returns:
            (models, masks, sparsity, fraction) -> models, masks, weights kept. Masks are the pattern's, path -> mask;
            sparsity and fraction (of it that is due) are float32 scalars. Weights that are pruned become zero, and so
            do their moments. The models are given up (donated).
        """
        models = jax.eval_shape(jax.vmap(self._init), self.keys)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        renewal = jax.jit(functools.partial(self._renew, pattern), donate_argnums=0)
        return renewal.lower(models, jax.eval_shape(lambda: self.whole(pattern)), scalar, scalar).compile()

    def _renew(
        self, pattern: Pattern, models: Models, masks: dict[str, Mask], sparsity: jax.Array, fraction: jax.Array
    ) -> tuple[Models, dict[str, Mask], dict[str, jax.Array]]:
        kernels = shfl_jax.path_leaves(models.params)
        alike, found = defaultdict(list), {}
        for path, spec in self.specs.items():
            alike[spec.matrix_shape].append(path)
        count = len(self.seeds)
        for shape, paths in alike.items():
            scores = jnp.concatenate([magnitude(jax.vmap(self.specs[p].to_matrix)(kernels[p])) for p in paths])
            previous = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(masks[p] for p in paths))
            due, target = (
                jnp.full(len(scores), pattern.count(shape, sparsity, part), jnp.int32) for part in (fraction, 1.0)
            )
            new = choose_masks(pattern, scores, previous, due, target, jnp.zeros((), bool), batch=len(scores))
            for i, path in enumerate(paths):
                found[path] = jax.tree.map(lambda a, i=i: a[i * count : (i + 1) * count], new)
        kept = {path: jax.vmap(self.specs[path].from_matrix)(mask.elements()) for path, mask in found.items()}
        opt_state = jax.vmap(functools.partial(zero_moments, self.optimizer))(models.opt_state, models.params, kept)
        return Models(_masked(models.params, kept), opt_state), found, kept

    def evaluate(self, models: Models) -> list[dict[str, float]]:
        """Measures every seed's model on the test data: one name -> number for each."""
        batches = self._batches()
        parts = [jax.device_get(self._evaluate(models.params, batch)) for batch in batches]
        return [
            self.task.finish(_joined([{name: np.asarray(a)[i] for name, a in part.items()} for part in parts]))
            for i in range(len(self.seeds))
        ]

    @functools.cached_property
    def _evaluate(self) -> Callable:
        def one(params: Any, batch: Any) -> Any:
            return self.task.evaluate(functools.partial(self.task.model.apply, {"params": params}), batch)

        # One model after another: vmapped, the convolutions of a model would be grouped ones.
        return jax.jit(lambda params, batch: jax.lax.map(lambda one_params: one(one_params, batch), params))

    def evaluate_compressed(self, models: Models, masks: dict[str, Mask], pattern: Pattern) -> dict[str, float]:
        """Compresses the model of the first seed, prepares it, and measures it on the test data.

        Returns:
            What `evaluate` measures, and "layers", how many are compressed: the others stay dense and masked.

        Raises:
            ValueError: as `shfl_jax.compress`.
        """
        params, first = jax.tree.map(lambda a: a[0], (models.params, masks))
        specs = tuple(dataclasses.replace(spec, pattern=pattern) for spec in self.specs.values())
        sparse = shfl_jax.prepare(shfl_jax.compress(params, Masks(first, specs)))
        model = self.task.model

        @jax.jit
        def evaluate(sparse: Any, batch: Any) -> Any:
            return self.task.evaluate(functools.partial(shfl_jax.linen.apply, model, sparse), batch)

        found = self.task.finish(_joined([jax.device_get(evaluate(sparse, batch)) for batch in self._batches()]))
        return {**found, "layers": len(matrices(sparse))}

    def _batches(self) -> list[dict[str, np.ndarray]]:
        test, size = self.task.test, self.task.test_batch
        count = len(next(iter(test.values())))
        if count % size:
            raise ValueError(f"{self.task.name}: test_batch={size} does not divide the {count} examples of the test")
        return [{name: array[i : i + size] for name, array in test.items()} for i in range(0, count, size)]


def make_sweep(task: Task, seeds: tuple[int, ...]) -> Sweep:
    """The programs of a task; nothing is compiled yet.

    Raises:
        ValueError: the task's regular expression matches no layer.
    """
    plan = shfl_jax.Plan({task.pruned: shfl_jax.Unstructured(0.5)})
    return Sweep(task, seeds, shfl_jax.linen.resolve(plan, task.model, *task.example))


def sparsities(masks: dict[str, Mask], specs: Specs) -> np.ndarray:
    """The fraction of pruned weights over all layers, for every seed: (S,) float64."""
    sizes = np.asarray([np.prod(spec.shape) for spec in specs.values()], np.float64)
    densities = np.stack([np.asarray(masks[path].density(), np.float64) for path in specs])
    return 1 - sizes @ densities / sizes.sum()


def _masked(tree: Any, kept: dict[str, jax.Array]) -> Any:
    leaves = shfl_jax.path_leaves(tree)
    return shfl_jax.update_paths(tree, {path: jnp.where(keep, leaves[path], 0) for path, keep in kept.items()})


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Scalars averaged over the batches, other arrays joined."""
    return {
        name: np.asarray(np.mean([part[name] for part in parts]))
        if np.ndim(value) == 0
        else np.concatenate([p[name] for p in parts])
        for name, value in parts[0].items()
    }
