"""What quality can be measured by: one row a metric, which says what people call it and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a figure is told."""

    title: str
    """What people call it, as the beginning of a sentence."""
    labelled: bool = True
    """Whether both networks are judged by labels, or the pruned one by the dense."""
    less: bool = False
    """Whether less is better; such a figure is no share."""
    share: bool = True
    """Whether it is told in percent."""
    rows: str = "rows"
    """What its samples are called."""


METRICS = {
    "accuracy": Metric("Accuracy"),
    "accuracy_per_token": Metric("Accuracy of all tokens"),
    "entity_f1": Metric("F1 of entities"),
    "micro_f1": Metric("Micro F1 of labels"),
    "subset_accuracy": Metric("All labels of a row right"),
    "exact_match": Metric("Exact answers"),
    "answer_f1": Metric("F1 of answers"),
    "recall_at_10": Metric("Recall@10", rows="queries"),
    "recall_at_1": Metric("Recall@1", rows="queries"),
    "ndcg_at_10": Metric("nDCG@10", rows="queries"),
    "mrr": Metric("Mean reciprocal rank", share=False, rows="queries"),
    "spearman": Metric("Spearman correlation with the labels", share=False),
    "mean_iou": Metric("Mean IoU", rows="photographs"),
    "pixel_accuracy": Metric("Pixels right", rows="photographs"),
    "perplexity": Metric("Perplexity", less=True, share=False),
    "pseudo_perplexity": Metric("Perplexity of masked words", less=True, share=False),
    "masked_accuracy": Metric("Masked words right"),
    "relative_error": Metric("Difference from the dense outputs", labelled=False, less=True),
    "cosine_to_dense": Metric("Mean cosine to the dense embeddings", labelled=False),
    "same_prediction": Metric("Same prediction as dense", labelled=False),
    "same_prediction_per_token": Metric("Same prediction as dense, of all tokens", labelled=False),
    "same_answer": Metric("Same answer as dense", labelled=False),
    "correlation_with_dense": Metric("Correlation with the dense predictions", labelled=False),
}
"""Metrics by the names that reports hold. A new one is a row here and what computes it beside this file."""
