"""MLServer: model-settings.json for each model, and a small runtime class that gives it to ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from optin_deploy.errors import BadInput
from optin_deploy.serving.base import Files, Rows
from optin_deploy.serving.manifest import Manifest
from optin_deploy.serving.payload_files import payload

SETTINGS = "model-settings.json"
RUNTIME = "mlserver_onnx.py"


class MLServer:
    """See `Server`. Needs `onnxruntime` where it runs; `POST /v2/repository/models/NAME/load` switches versions."""

    name = "mlserver"
    artifacts: Mapping[str, str] = {"onnx": "model.onnx"}
    side_by_side = False
    tokenizes = False
    unheard = ("storage_uri", "canary", "preferred", "instances")

    def check(self, manifest: Manifest) -> None:
        """See `Server.check`."""
        half = sorted(each.name for each in (*manifest.inputs, *manifest.outputs) if each.datatype == "FP16")
        if half:
            raise BadInput(f"{', '.join(half)} of FP16: MLServer's JSON has no half floats. Ship fp32 or int8.")

    def model_files(self, served: Sequence[Manifest], rows: Rows) -> Files:
        """See `Server.model_files`."""
        last = served[-1]
        module = f"onnx_{last.name.replace('-', '_')}"  # a name of its own: all models share one Python process
        source = payload(RUNTIME)
        options = last.options
        settings = {
            "name": last.name,
            "implementation": f"{module}.OnnxModel",
            "platform": "onnxruntime",
            "inputs": [asdict(each) for each in last.inputs],
            "outputs": [asdict(each) for each in last.outputs],
            "max_batch_size": options.max_batch,
            "max_batch_time": options.queue_delay_us / 1e6,
            # No version: a load then takes the place of what is served, also where it goes back to an older one.
            "parameters": {"uri": f"./{last.version}/{last.file}", "extra": {"threads": options.threads or 0}},
        }
        return {f"{module}.py": source, SETTINGS: json.dumps(settings, indent=2) + "\n"}

    def root_files(self, models: Mapping[str, Sequence[Manifest]]) -> Files:
        """Nothing lies beside the models."""
        return {}
