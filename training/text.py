"""Text that comes with Python, as character codes, and a Markov model of it to beat."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in character codes.

    Attributes:
        train: (n,) int32 codes, the first part of the text.
        validation: (n,) int32 codes, the rest.
        alphabet: `alphabet[code]` is the character.
    """

    train: np.ndarray
    validation: np.ndarray
    alphabet: str


def topics(validation: float = 0.1) -> Text:
    """The help topics of the Python language (`pydoc_data.topics`), in alphabetical order.

    Args:
        validation: fraction of the text, its end, that is kept for validation; in (0, 1).

    Raises:
        ValueError: the fraction is out of range.
    """
    from pydoc_data.topics import topics as by_name

    return split("\n\n".join(by_name[name] for name in sorted(by_name)), validation)


def split(text: str, validation: float = 0.1) -> Text:
    """Encodes a text and splits it: the end is kept for validation.

    Raises:
        ValueError: the fraction is out of (0, 1), or the text has fewer than two characters.
    """
    if not 0 < validation < 1 or len(text) < 2:
        raise ValueError(f"cannot keep {validation} of {len(text)} characters for validation")
    alphabet = "".join(sorted(set(text)))
    codes = np.asarray([alphabet.index(c) for c in alphabet], np.int32)
    lookup = dict(zip(alphabet, codes, strict=True))
    encoded = np.fromiter((lookup[c] for c in text), np.int32, len(text))
    cut = round(len(text) * (1 - validation))
    return Text(encoded[:cut], encoded[cut:], alphabet)


def windows(codes: np.ndarray, length: int) -> np.ndarray:
    """Cuts codes into inputs and targets of a language model: (n, length + 1), each starting at the last one's end."""
    count = (len(codes) - 1) // length
    return codes[np.arange(count)[:, None] * length + np.arange(length + 1)]


def markov_bits(text: Text, order: int = 3, deltas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)) -> float:
    """Bits per character of an add-delta Markov model on the validation text.

    The chance of a character after its `order` predecessors is (count + delta) / (total + delta * alphabet), from the
    counts in the training text.

    Args:
        text: the text.
        order: how many preceding characters the model sees.
        deltas: the best of these counts, chosen on the validation text in the model's favour.
    """
    size = len(text.alphabet)

    def grams(codes: np.ndarray) -> np.ndarray:
        n = len(codes) - order
        return np.asarray([codes[i : i + n] for i in range(order + 1)], np.int64).T @ size ** np.arange(order, -1, -1)

    seen, counts = np.unique(grams(text.train), return_counts=True)
    contexts, total = np.unique(seen // size, return_inverse=True)
    totals = np.bincount(total, counts)
    asked = grams(text.validation)

    def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    hits, of = look_up(seen, counts, asked), look_up(contexts, totals, asked // size)
    return float(min(-np.log2((hits + delta) / (of + delta * size)).mean() for delta in deltas))
