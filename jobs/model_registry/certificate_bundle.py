"""A certificate as evidence: its files, its certified samples, and its verification."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.storage.store import Store
from data_shards.untrusted.json_input import canonical_json, parse_object
from data_shards.untrusted.parquet import read_table
from jobs.errors import EvaluationError
from jobs.evaluation.stored_result import evaluation_files
from jobs.model_registry.promotion_rule import Bits, Rule
from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.run.layout import CERTIFICATE, SAMPLES, SUMMARY

FILES = (CERTIFICATE, SAMPLES, SUMMARY)
_IDENTITY = ("shard", "key", "pixels_sha256", "label")
_COLUMNS = (*_IDENTITY, "sound_prediction", "sound_radius")
VERIFY_TIMEOUT_S = 6 * 3600.0


class VerificationError(EvaluationError):
    """The independent verifier refused a certificate; the message says why."""


@dataclass(frozen=True)
class CertificateBundle:
    """The files of one evaluation, held together by their digests.

    Attributes:
        files: bytes of `FILES`.
        body: the content of certificate.json.
        summary: says where artifact and shard set lie; no number of it is used.
    """

    files: Mapping[str, bytes]
    body: Mapping[str, Any]
    summary: EvaluationSummary

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], place: object) -> CertificateBundle:
        """Check that the files belong together.

        Raises:
            EvaluationError: one is missing, damaged, or belongs to another certificate.
        """
        for name in FILES:
            if name not in files:
                raise EvaluationError(f"{place} has no {name}")
        try:
            body = parse_object(files[CERTIFICATE], CERTIFICATE)
            stated = body.pop("digest")
            digest = hashlib.sha256(canonical_json(body)).hexdigest()
            summary = EvaluationSummary.from_json(files[SUMMARY])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{place} cannot be read: {error!r}") from error
        checks = {
            f"digest of {CERTIFICATE}": (stated, digest),
            f"sha256 of {SAMPLES}": (
                body.get("samples_sha256"),
                hashlib.sha256(files[SAMPLES]).hexdigest(),
            ),
            f"certificate digest in {SUMMARY}": (summary.certificate_digest, stated),
        }
        for what, (found, derived) in checks.items():
            if found != derived:
                raise EvaluationError(f"{place}: {what} is {found}, not {derived}")
        found = cls({name: files[name] for name in FILES}, {**body, "digest": stated}, summary)
        try:
            _require_rows(found._table, body["shards"]["samples"])
            _ = (found.model_digest, found.index_digest, found.dataset)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{place} cannot be read: {error!r}") from error
        return found

    @classmethod
    def read(cls, url: str) -> CertificateBundle:
        """The evaluation whose files lie at a URL.

        Raises:
            EvaluationError: see `of_files`.
        """
        store = Store(url.removesuffix(f"/{CERTIFICATE}"))
        try:
            files = evaluation_files(store)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise EvaluationError(f"no finished evaluation at {store}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{store} cannot be read: {error!r}") from error
        return cls.of_files(files, store).found_at(store.url)

    def found_at(self, url: str) -> CertificateBundle:
        """The same where the evaluation lies now: artifact and shard set were moved with it."""
        return replace(self, summary=self.summary.found_at(url))

    @property
    def digest(self) -> str:
        """Digest of the certificate."""
        return str(self.body["digest"])

    @property
    def model_digest(self) -> str:
        """Digest of the model artifact."""
        return str(self.body["model"]["digest"])

    @property
    def index_digest(self) -> str:
        """Digest of the index of the test set."""
        return str(self.body["shards"]["index_digest"])

    @property
    def dataset(self) -> str:
        """Name of the test set, as evaluations record it."""
        return f"{self.body['shards']['name']}-{self.body['shards']['split']}"

    def certified(self, rule: Rule) -> Bits:
        """Whether each sample is classified correctly with a sound radius greater than eps.

        Raises:
            EvaluationError: the certificate is of another norm, or does not list eps.
        """
        norm, listed = self.body.get("norm"), self.body.get("eps", [])
        if norm != rule.norm or rule.eps not in listed:
            raise EvaluationError(
                f"certificate {self.digest[:12]} states {norm} radii at {', '.join(listed)}; the "
                f"rule compares {rule.metric}"
            )
        names = ("label", "sound_prediction", "sound_radius")
        label, prediction, radius = (self._table[name].to_numpy() for name in names)
        return np.asarray((prediction == label) & (radius > eps_value(rule.eps)), dtype=bool)

    def same_samples(self, other: CertificateBundle) -> bool:
        """Whether both speak of the same images in the same order."""
        mine, theirs = self.body["shards"], other.body["shards"]
        return mine == theirs and self._table.select(_IDENTITY).equals(
            other._table.select(_IDENTITY)
        )

    def verify(self, sample: int | None, seed: int) -> str:
        """Run the independent verifier on exactly these bytes; all weights are derived again.

        Args:
            sample: how many samples are derived again; None for all.
            seed: of the choice among them.

        Returns:
            The verifier's report.

        Raises:
            VerificationError: a disagreement, or an input that cannot be used.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name in (CERTIFICATE, SAMPLES):
                Path(folder, name).write_bytes(self.files[name])
            command = [sys.executable, "-m", "model.verify", folder]
            command += ["--artifact", self.summary.artifact_url]
            command += ["--data.shards", self.summary.shards_url]
            if sample is not None:
                command += ["--sample", str(sample), "--seed", str(seed)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=VERIFY_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise VerificationError(
                    f"verifying certificate {self.digest[:12]} took more than {error.timeout:g} s"
                ) from error
        if done.returncode != 0:
            said = (done.stderr.strip() or f"exit status {done.returncode}").replace(folder, "")
            raise VerificationError(f"certificate {self.digest[:12]} does not verify: {said}")
        return done.stdout

    @cached_property
    def _table(self) -> pa.Table:
        return read_table(self.files[SAMPLES], SAMPLES, _COLUMNS)


def _require_rows(table: pa.Table, samples: int) -> None:
    if table.num_rows != samples:
        raise ValueError(f"{SAMPLES} has {table.num_rows} rows for {samples} samples")
    whole, real = pa.types.is_integer, pa.types.is_floating
    for name, right in {"label": whole, "sound_prediction": whole, "sound_radius": real}.items():
        kind = table.schema.field(name).type
        if not right(kind):
            raise ValueError(f"{SAMPLES} has {name} of type {kind}")
