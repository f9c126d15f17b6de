"""A Triton backend in Python named `onnxruntime`: serves an emitted repository where the real backend is not at hand.

The Triton that comes as a Python package has the python backend alone. This file is put into its folder `backends` as
`onnxruntime/model.py`, and the repository stays as it is. It answers like the real backend: one session a version, one
run for all requests of a batch, `intra_op_thread_count` of the configuration.
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Called by Triton."""

    def initialize(self, args):
        """Open the version's file; Triton refuses the version if this fails."""
        config = json.loads(args["model_config"])
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", "0")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.batches = config["max_batch_size"] > 0

    def execute(self, requests):
        """Answer all requests with one run, if their samples have the same shape."""
        arrays = [
            {name: pb_utils.get_input_tensor_by_name(each, name).as_numpy() for name in self.inputs}
            for each in requests
        ]
        shapes = {tuple(one[name].shape[1:] for name in self.inputs) for one in arrays}
        if not self.batches or len(shapes) > 1:
            return [self._answers([request], [one])[0] for request, one in zip(requests, arrays, strict=True)]
        return self._answers(requests, arrays)

    def _answers(self, requests, arrays):
        feeds = {name: np.concatenate([one[name] for one in arrays]) for name in self.inputs}
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        try:
            values = dict(zip(wanted, self.session.run(wanted, feeds), strict=True))
        except Exception as err:  # noqa: BLE001  # whatever the engine says goes to the client
            error = pb_utils.TritonError(str(err))
            return [pb_utils.InferenceResponse(output_tensors=[], error=error) for _ in requests]
        ends = np.cumsum([len(one[self.inputs[0]]) for one in arrays])
        return [
            pb_utils.InferenceResponse(
                output_tensors=[
                    pb_utils.Tensor(name, np.ascontiguousarray(values[name][end - len(one[self.inputs[0]]) : end]))
                    for name in request.requested_output_names()
                ]
            )
            for request, one, end in zip(requests, arrays, ends, strict=True)
        ]
