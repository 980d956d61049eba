"""The reference implementation's embeddings of a dozen sentences, for the test of `training.bert`.

    python -m benchmarks.bert_reference

writes tests/training/bert_reference.json. It needs the extra `bert-reference` (torch and transformers) and the model's
package; the test needs neither torch nor transformers.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

from training import bert

SENTENCES = (
    "A row permutation puts similar rows of a matrix side by side.",
    "Sparse matrices save memory.",
    "Why does the cat sit on the warm engine of my neighbour's car every single morning?",
    "The cat sits on the car's warm engine each morning.",
    "Yes.",
    "In 1687 Newton published the Philosophiae Naturalis Principia Mathematica, in three books.",
    "Café, naïve, façade and über: accents are stripped by the tokenizer!",
    "def prune(weights): return weights * (abs(weights) > 0.1)",
    "Tensor cores multiply small dense blocks, which is why unstructured sparsity rarely runs any faster on a GPU.",
    "It rained all day, so we stayed inside, read old letters, and drank far too much tea.",
    "We spent the rainy day indoors with tea and old letters.",
    "数学 and Ελληνικά, symbols such as € or →, and a verylongwordthatisinnovocabularywhatsoever.",
)
TARGET = Path(__file__).parent.parent / "tests" / "training" / "bert_reference.json"


def main() -> int:
    """Writes the file."""
    import torch  # pyrefly: ignore[missing-import]
    from transformers import AutoModel, AutoTokenizer  # pyrefly: ignore[missing-import]

    directory = bert.package_directory()
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    inputs = tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    # Mean over real tokens, then unit length: the package's modules.json and 1_Pooling/config.json say so.
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    document = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "sentences": SENTENCES,
        "embeddings": [[round(float(x), 7) for x in row] for row in mean],
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
