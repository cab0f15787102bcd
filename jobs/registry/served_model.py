"""Loader of a registered model: MLflow copies this file into it and runs it (models from code)."""

from jobs.registry.serving import CertifiedModel
from pipeline.tracking.registry import serve

serve(CertifiedModel)
