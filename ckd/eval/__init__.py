"""What a trained student is good for: classification and retrieval with its embeddings."""

from ckd.eval.evaluate import evaluate_student
from ckd.eval.report import Figure, Report

__all__ = ["Figure", "Report", "evaluate_student"]
