"""Word overlap of an answer with its reference, as a metric of the `evaluate` library.

A local module, because the library's own metrics are downloaded from a hub. Two figures, each the mean over
the answers of an F1 score between 0 and 1:

- `f1`: words in common, in any order (as SQuAD scores answers);
- `rouge_l`: the longest common subsequence of words (ROUGE-L, Lin 2004), which also asks for their order.

Words are runs of letters, digits and underscores, in lower case.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


def words(text: str) -> list[str]:
    """Split into lower-case words."""
    return re.findall(r"\w+", text.lower())


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by the textbook table, one row at a time."""
    row = [0] * (len(right) + 1)
    for item in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if item == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def f_score(common: int, predicted: int, wanted: int) -> float:
    """Return the harmonic mean of precision and recall; two empty texts agree."""
    if predicted == wanted == 0:
        return 1.0
    return 2 * common / (predicted + wanted)


class WordOverlap(evaluate.Metric):
    """`evaluate.load(<this directory>).compute(predictions=[...], references=[...])`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean F1 of words in common, and of their longest common subsequence.",
            citation="",
            inputs_description="predictions and references: lists of strings of the same length.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], **_: Any) -> dict[str, float]:
        f1 = rouge_l = 0.0
        for prediction, reference in zip(predictions, references, strict=True):
            got, wanted = words(prediction), words(reference)
            f1 += f_score((Counter(got) & Counter(wanted)).total(), len(got), len(wanted))
            rouge_l += f_score(longest_common_subsequence(got, wanted), len(got), len(wanted))
        return {"f1": f1 / len(references), "rouge_l": rouge_l / len(references)}
