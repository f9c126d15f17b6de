"""Triton's python backend: texts to padded ids. Stands alone; needs `tokenizers` and numpy where the server runs."""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

TEXT = "TEXT"
OF_ENCODING = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""Tensor -> where `tokenizers` has its values."""
STEP = 16
"""Lengths are padded to multiples of it, so that the server can join requests of nearly the same length."""


class TritonPythonModel:
    """Called by Triton."""

    def initialize(self, args):
        """Read the tokenizer beside this file, and the model's configuration."""
        config = json.loads(args["model_config"])
        settings = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.types = {each["name"]: pb_utils.triton_string_to_numpy(each["data_type"]) for each in config["output"]}
        self.longest = int(settings["longest"])
        self.refuses = settings["too_long"] == "refuse"
        folder = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(folder, "padding.json"), encoding="utf-8") as file:
            padding = json.load(file)
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.tokenizer.no_truncation()
        if not self.refuses:
            self.tokenizer.enable_truncation(self.longest)
        step = STEP if self.longest % STEP == 0 else None
        self.tokenizer.enable_padding(pad_to_multiple_of=step, **padding)

    def execute(self, requests):
        """Answer each request on its own: the model behind joins them."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        rows = pb_utils.get_input_tensor_by_name(request, TEXT).as_numpy().reshape(-1)
        try:
            encoded = self.tokenizer.encode_batch([row.decode("utf-8") for row in rows])
        except UnicodeDecodeError as err:
            return _refused(f"a text is not UTF-8: {err}")
        longest = max(sum(each.attention_mask) for each in encoded)
        if longest > self.longest:
            return _refused(f"a text has {longest} tokens; this server takes at most {self.longest}. Shorten it.")
        tensors = [
            pb_utils.Tensor(name, np.array([getattr(each, OF_ENCODING[name]) for each in encoded], kind))
            for name, kind in self.types.items()
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _refused(why):
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(why))
