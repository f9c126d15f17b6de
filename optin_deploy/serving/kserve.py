"""KServe: Triton's repository, an InferenceService for each model of it, and its metadata in the V2 protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from optin_deploy.common.extras import require
from optin_deploy.errors import BadInput
from optin_deploy.serving.base import Files, Rows
from optin_deploy.serving.manifest import Manifest
from optin_deploy.serving.triton import PLATFORMS, Triton

FORMATS = {"onnxruntime_onnx": "onnx", "tensorrt_plan": "tensorrt"}
"""Triton's platform -> KServe's model format."""
SERVICE = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
"""Kubernetes' names of services."""


class KServe(Triton):
    """See `Server`. The runtime is KServe's own Triton; the repository has to be where `--storage-uri` says."""

    name = "kserve"
    unheard = ()

    def check(self, manifest: Manifest) -> None:
        """See `Server.check`."""
        super().check(manifest)
        if manifest.options.storage_uri is None:
            raise BadInput("KServe fetches the repository: say where it will be, with --storage-uri s3://bucket/repo.")
        if not SERVICE.fullmatch(manifest.name):
            raise BadInput(f"--name {manifest.name}: Kubernetes takes small letters, digits and inner hyphens.")

    def model_files(self, served: Sequence[Manifest], rows: Rows) -> Files:
        """See `Server.model_files`."""
        return {"metadata.json": json.dumps(metadata_of(served), indent=2) + "\n", **super().model_files(served, rows)}

    def root_files(self, models: Mapping[str, Sequence[Manifest]]) -> Files:
        """See `Server.root_files`. Raises: MissingDependency."""
        require("yaml")
        import yaml

        return {
            f"{name}.yaml": yaml.safe_dump(service_of(served[-1]), sort_keys=False)
            for name, served in models.items()
            if served[-1].role in ("pruned", "dense")
        }


def metadata_of(served: Sequence[Manifest]) -> dict[str, Any]:
    """What the V2 protocol answers to `GET /v2/models/NAME`."""
    last = served[-1]
    return {
        "name": last.name,
        "versions": [str(each.version) for each in served],
        "platform": PLATFORMS.get(last.engine, "ensemble" if last.role == "text" else "python"),
        "inputs": [asdict(each) for each in last.inputs],
        "outputs": [asdict(each) for each in last.outputs],
    }


def service_of(manifest: Manifest) -> dict[str, Any]:
    """An InferenceService of one model."""
    options, platform = manifest.options, PLATFORMS[manifest.engine]
    device = {} if manifest.engine == "onnx" else {"nvidia.com/gpu": "1"}
    cpu = str((options.threads or 1) * options.instances)
    resources = {"cpu": cpu, **device}
    predictor: dict[str, Any] = {
        "model": {
            "modelFormat": {"name": FORMATS[platform]},
            "protocolVersion": "v2",
            "runtime": "kserve-tritonserver",
            "storageUri": options.storage_uri,
            "args": ["--model-control-mode=explicit", f"--load-model={manifest.name}"],
            "resources": {"requests": resources, "limits": {**resources}},  # one object would become a YAML anchor
        }
    }
    if options.canary is not None:
        predictor["canaryTrafficPercent"] = options.canary
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": manifest.name,
            # A new version changes it, so that KServe makes a new revision of the same storageUri.
            "annotations": {"optin-deploy/version": str(manifest.version)},
        },
        "spec": {"predictor": predictor},
    }
