"""The masks of a model."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.patterns import Mask


@functools.partial(jax.tree_util.register_dataclass, data_fields=["masks"], meta_fields=["specs"])
@dataclasses.dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Mask]):
    """The masks of a model: a mapping from path to `Mask`, and a pytree whose specs are static.

    Attributes:
        masks: path -> mask of that kernel, read as a matrix by its spec; stacked layers have leading axes.
        specs: one `LayerSpec` for every mask.
    """

    masks: dict[str, Mask]
    specs: tuple[LayerSpec, ...]

    def __getitem__(self, path: str) -> Mask:
        return self.masks[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def spec(self, path: str) -> LayerSpec:
        """The spec of one layer.

        Raises:
            KeyError: no layer of that path.
        """
        return {spec.path: spec for spec in self.specs}[path]

    def apply(self, params: Any) -> Any:
        """Sets the pruned weights of a parameter tree to zero; everything else stays the same object. jit-able.

        Args:
            params: the parameter tree the specs were resolved from.

        Returns:
            The masked tree. A pruned weight becomes zero whatever it held, NaN and inf included.

        Raises:
            ValueError: the tree lacks a layer, or a kernel has another shape than its spec.
        """
        kernels = path_leaves(params)
        masked = {}
        for spec in self.specs:
            if spec.path not in kernels:
                raise ValueError(
                    f"the parameters have no {spec.path!r}; pass the tree that the specs were resolved from"
                )
            weight = spec.to_matrix(kernels[spec.path])
            masked[spec.path] = spec.from_matrix(jnp.where(self[spec.path].elements(), weight, 0))
        return update_paths(params, masked)
