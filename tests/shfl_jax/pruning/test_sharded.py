"""Parameters sharded over two devices, which only a process of its own can simulate."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
from shfl_jax import VW, LayerSpec, pruning

assert len(jax.devices()) == 2
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
specs = [LayerSpec("w", (16, 24), (), (0,), (1,), VW(0.75, 8))]
adam = optax.adam(0.05)
METHODS = {
    "prune": pruning.prune(adam, specs, pruning.linear(0, 4, 2), score="taylor"),
    "regrow": pruning.regrow(adam, specs, pruning.linear(0, 5)),
    "admm": pruning.admm(adam, specs, pruning.constant(1, 9, 2)),
}
start = jax.random.normal(jax.random.key(0), (16, 24))
for name, tx in METHODS.items():
    ends, traces = [], []
    for params in ({"w": start}, {"w": jax.device_put(start, split)}):
        @jax.jit
        def step(params, state, i):
            traces.append(name)
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), start.shape)
            grads = jax.tree.map(lambda p: p + noise, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(params)
        for i in range(6):
            params, state = step(params, state, i)
            # What `init` makes from nothing is laid out on the mesh by the first step, and that is one more type.
            known = len(traces) if i < 2 else known
            assert len(traces) == known
        ends.append((params, state))
    (plain, plain_state), (sharded, state) = ends
    assert sharded["w"].sharding.is_equivalent_to(split, 2), sharded["w"].sharding
    kept = pruning.masks(state)["w"].kept
    np.testing.assert_array_equal(kept, pruning.masks(plain_state)["w"].kept)
    assert kept.sum() == 12
    np.testing.assert_allclose(sharded["w"], plain["w"], rtol=1e-4, atol=1e-5)
    sparse = np.asarray(pruning.sparse_params(sharded, state)["w"])
    assert (sparse != 0).sum() == 96
    print(name)
"""


def test_methods_on_two_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["prune", "regrow", "admm"]
