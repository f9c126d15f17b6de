"""MLServer's runtime for one ONNX file on ONNX Runtime. Stands alone."""

import asyncio

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse
from mlserver.utils import get_model_uri


class OnnxModel(MLModel):
    """Called by MLServer."""

    async def load(self):
        """Open the file; MLServer keeps the old model if this fails."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.settings.parameters.extra["threads"]
        path = await get_model_uri(self.settings)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.known = [node.name for node in self.session.get_inputs()]
        return True

    async def predict(self, payload):
        """Run all rows of a request at once; other requests are taken meanwhile."""
        feeds = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        expected = {each.name: each.datatype for each in self.settings.inputs}
        if {each.name: each.datatype for each in payload.inputs} != expected:
            raise InferenceError(f"the inputs of {self.name} are {expected}")
        rows = {len(feed) for feed in feeds.values()}
        if len(rows) != 1 or max(rows) > self.settings.max_batch_size:
            raise InferenceError(
                f"a request to {self.name} has 1 to {self.settings.max_batch_size} samples, not {rows}"
            )
        try:
            values = await asyncio.get_running_loop().run_in_executor(None, self._run, feeds)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as err:
            raise InferenceError(str(err)) from err
        outputs = [NumpyCodec.encode_output(name, value) for name, value in values.items()]
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=outputs)

    def _run(self, feeds):
        names = [node.name for node in self.session.get_outputs()]
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in self.known}
        return dict(zip(names, self.session.run(names, arrays), strict=True))
