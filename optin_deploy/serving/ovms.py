"""OpenVINO Model Server: a folder of versions for each model, and config.json, which names the served ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.serving.base import Files, Rows
from optin_deploy.serving.manifest import Manifest


class OpenVinoModelServer:
    """See `Server`. Started with `--config_path REPO/config.json`; it watches that file and reloads it."""

    name = "ovms"
    artifacts: Mapping[str, str] = {"onnx": "model.onnx", "openvino": "model.onnx"}
    side_by_side = True
    tokenizes = False
    unheard = ("storage_uri", "canary", "preferred", "queue_delay")

    def check(self, manifest: Manifest) -> None:
        """See `Server.check`."""
        if manifest.precision not in ("fp32", "fp16"):
            raise BadInput(
                f"precision {manifest.precision}: OpenVINO Model Server is given fp32 or fp16. Build one of them."
            )

    def model_files(self, served: Sequence[Manifest], rows: Rows) -> Files:
        """All is said in config.json."""
        return {}

    def root_files(self, models: Mapping[str, Sequence[Manifest]]) -> Files:
        """See `Server.root_files`."""
        entries = [{"config": _entry(name, served)} for name, served in models.items()]
        return {"config.json": json.dumps({"model_config_list": entries}, indent=2) + "\n"}


def _entry(name: str, served: Sequence[Manifest]) -> dict[str, Any]:
    options = served[-1].options
    # Without the hint it computes in bfloat16 where the CPU can, and gives other numbers than those that were proven.
    plugin: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": options.instances}
    if options.threads is not None:
        plugin["INFERENCE_NUM_THREADS"] = options.threads * options.instances
    return {
        "name": name,
        "base_path": name,  # relative to config.json
        "target_device": "CPU",
        "model_version_policy": {"specific": {"versions": [each.version for each in served]}},
        "nireq": options.instances,
        "plugin_config": plugin,
    }
