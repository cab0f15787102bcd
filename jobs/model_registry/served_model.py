"""Loader of a registered model: MLflow copies this file into it and runs it (models from code)."""

from jobs.prediction.predictor import CertifiedModel
from pipeline.tracking.model_registry import serve

serve(CertifiedModel)
