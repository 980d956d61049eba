"""Plan: which layers get which pattern, by rules on their paths."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shfl_jax._layers import LayerSpec


@dataclasses.dataclass(frozen=True, init=False)
class Plan:
    """Rules that give kernels their sparsity pattern.

    A rule is a regular expression that must match a whole path (`re.fullmatch`), keys joined by '/'. The first rule
    that matches decides; None keeps the layer dense, and so does no rule at all. Only kernels of layers count: biases,
    embeddings and scales are never pruned.

        Plan({r"(.*/)?lm_head/.*": None, r"(.*/)?(mlp|attn)/.*": ShflBW(sparsity=0.75)})

    Attributes:
        rules: (regular expression, pattern or None), in order.
    """

    rules: tuple[tuple[str, Any], ...]

    def __init__(self, rules: Mapping[str, Any]) -> None:
        """Checks the rules.

        Args:
            rules: regular expression -> pattern, or None to keep dense.

        Raises:
            ValueError: no rule, a regular expression that does not compile, or something that is no pattern.
        """
        if not rules:
            raise ValueError("a plan needs at least one rule, such as {'.*': ShflBW(sparsity=0.75)}")
        for regex, pattern in rules.items():
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"rule {regex!r} is no regular expression: {error}") from error
            if pattern is not None and not hasattr(pattern, "mask"):
                raise ValueError(f"rule {regex!r} must map to a pattern or None, got {pattern!r}")
        object.__setattr__(self, "rules", tuple(rules.items()))

    def assign(self, paths: Iterable[str]) -> dict[str, Any]:
        """Gives every kernel its pattern.

        Args:
            paths: paths of all parameters; those not called 'kernel' are skipped.

        Returns:
            path -> pattern, for the kernels that are to be pruned.

        Raises:
            ValueError: a rule that decides no kernel; the text names it and the kernels there are.
        """
        kernels = [path for path in paths if path.rsplit("/", 1)[-1] == "kernel"]
        matches = [[path for path in kernels if re.fullmatch(regex, path)] for regex, _ in self.rules]
        assigned: dict[str, Any] = {}
        for (regex, pattern), matched in zip(self.rules, matches, strict=True):
            if not matched:
                raise ValueError(
                    f"rule {regex!r} matches no kernel; rules match whole paths, and the kernels are {kernels}"
                )
            if all(path in assigned for path in matched):
                raise ValueError(f"rule {regex!r} decides nothing: earlier rules match {matched}; move it before them")
            assigned |= {path: pattern for path in matched if path not in assigned}
        return {path: assigned[path] for path in kernels if assigned.get(path) is not None}

    def specs(self, params: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """Puts patterns and axes together.

        Args:
            params: path -> every parameter, or its shape and dtype.
            axes: path -> the `Axes` of every kernel that is to be pruned.

        Returns:
            path -> spec.
        """
        found = {}
        for path, pattern in self.assign(params).items():
            use = axes[path]
            shape = params[path].shape
            found[path] = LayerSpec(path, shape, use.batch, use.contracting, use.out, pattern, use.convolution)
        return found
