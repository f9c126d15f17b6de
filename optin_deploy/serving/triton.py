"""NVIDIA Triton: a model repository of ONNX files (ONNX Runtime backend) or TensorRT plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optin_deploy.errors import BadInput
from optin_deploy.serving.base import Files, Rows
from optin_deploy.serving.manifest import Manifest, TensorSpec
from optin_deploy.serving.names import TEXT, tokenizer_of
from optin_deploy.serving.triton_config import Message, Word, data_type, entries, lines

CONFIG = "config.pbtxt"
WARMUP = "warmup"
PLATFORMS = {
    "onnx": "onnxruntime_onnx",
    "ort-cuda": "onnxruntime_onnx",
    "ort-trt": "onnxruntime_onnx",
    "trt": "tensorrt_plan",
}
ON_CPU = ("onnx",)


class Triton:
    """See `Server`. Written for Triton 24.10 and later."""

    name = "triton"
    artifacts: Mapping[str, str] = {
        engine: "model.plan" if platform == "tensorrt_plan" else "model.onnx" for engine, platform in PLATFORMS.items()
    }
    side_by_side = True
    tokenizes = True
    unheard: tuple[str, ...] = ("storage_uri", "canary")

    def check(self, manifest: Manifest) -> None:
        """See `Server.check`."""
        for tensor in (*manifest.inputs, *manifest.outputs):
            if batches(manifest) and len(tensor.shape) < 2:
                raise BadInput(
                    f"{tensor.name} has one value a sample and no axis for it (shape {list(tensor.shape)}); Triton "
                    "batches tensors of two or more axes. Export it with one more."
                )

    def model_files(self, served: Sequence[Manifest], rows: Rows) -> Files:
        """See `Server.model_files`."""
        last = served[-1]
        warmup = {} if last.role not in ("dense", "pruned") else _first_row(last, rows)
        files = {f"{WARMUP}/{_warmup_file(last, name)}": row.tobytes() for name, row in warmup.items()}
        return {**files, CONFIG: config_of(served, warmup)}

    def root_files(self, models: Mapping[str, Sequence[Manifest]]) -> Files:
        """Triton reads nothing beside its models' folders."""
        return {}


def batches(manifest: Manifest) -> bool:
    """Is the first axis of every tensor open, so that requests can be joined?"""
    return all(tensor.shape[0] == -1 for tensor in (*manifest.inputs, *manifest.outputs))


def config_of(served: Sequence[Manifest], warmup: Rows) -> str:
    """The configuration of a model, as text.

    Args: served: its versions, of which the last one's options count. warmup: one row of values for each input.
    """
    last = served[-1]
    joined = batches(last)
    message = {
        "name": last.name,
        "max_batch_size": last.options.max_batch if joined else 0,
        "input": [_tensor(each, joined) for each in last.inputs],
        "output": [_tensor(each, joined) for each in last.outputs],
        "version_policy": {"specific": {"versions": [each.version for each in served]}},  # others may lie beside them
    }
    if last.role == "text":
        message |= {"platform": "ensemble", "ensemble_scheduling": {"step": _steps(last)}}
    elif last.role == "tokenizer":
        cut = {"longest": last.options.longest, "too_long": last.options.too_long}
        message |= {"backend": "python", "instance_group": [_instances(last)], "parameters": _parameters(cut)}
    else:
        message |= _running(last, warmup, joined)
    return "\n".join(lines(message)) + "\n"


def _running(manifest: Manifest, warmup: Rows, joined: bool) -> Message:
    """How an artifact is run."""
    options, accelerator = manifest.options, {"gpu_execution_accelerator": [{"name": "tensorrt"}]}
    delay = {"max_queue_delay_microseconds": options.queue_delay_us}
    threads = {} if options.threads is None else {"intra_op_thread_count": options.threads}
    return {
        "platform": PLATFORMS[manifest.engine],
        "instance_group": [_instances(manifest)],
        "dynamic_batching": {"preferred_batch_size": options.preferred, **delay} if joined else None,
        "optimization": {"execution_accelerators": accelerator} if manifest.engine == "ort-trt" else None,
        "model_warmup": _warmups(manifest, warmup, joined),
        "parameters": _parameters(threads),
        "response_cache": {"enable": False},  # dense and pruned are compared by what they compute
    }


def _tensor(spec: TensorSpec, joined: bool) -> Message:
    """An input or output; its sizes are without the batch axis if the model batches."""
    dims = spec.shape[1:] if joined else spec.shape
    return {"name": spec.name, "data_type": data_type(spec.datatype), "dims": dims}


def _instances(manifest: Manifest) -> Message:
    on_cpu = manifest.engine in ON_CPU or manifest.role == "tokenizer"
    return {"count": manifest.options.instances, "kind": Word("KIND_CPU" if on_cpu else "KIND_GPU")}


def _parameters(settings: Mapping[str, object]) -> list[Message]:
    """Settings of a backend."""
    return entries({name: {"string_value": str(value)} for name, value in settings.items()})


def _first_row(manifest: Manifest, rows: Rows) -> Rows:
    """One recorded row of every input, or nothing if one is not recorded."""
    names = [tensor.name for tensor in manifest.inputs]
    return {name: rows[name][:1] for name in names} if batches(manifest) and all(name in rows for name in names) else {}


def _warmup_file(manifest: Manifest, name: str) -> str:
    return f"{manifest.version}-{name.replace('/', '_')}"


def _warmups(manifest: Manifest, rows: Rows, joined: bool) -> list[Message]:
    """A request of one sample, and one of a full batch, of recorded values: random ids may lie outside a table."""
    if not (rows and joined):
        return []
    inputs = {
        each.name: {
            "data_type": data_type(each.datatype),
            "dims": rows[each.name].shape[1:],
            "input_data_file": _warmup_file(manifest, each.name),
        }
        for each in manifest.inputs
    }
    sizes = sorted({1, *(manifest.options.preferred[-1:] or (manifest.options.max_batch,))})
    return [{"name": f"recorded rows, batch {size}", "batch_size": size, "inputs": entries(inputs)} for size in sizes]


def _steps(manifest: Manifest) -> list[Message]:
    """Texts go to the tokenizer, its tensors to the model; maps go from a model's names to the ensemble's."""
    model, tensors = manifest.made_from["serves"], manifest.made_from["tensors"].split()
    passed = {name: name for name in tensors}
    outputs = {tensor.name: tensor.name for tensor in manifest.outputs}
    steps = ((tokenizer_of(model), {TEXT: TEXT}, passed), (model, passed, outputs))
    return [
        {"model_name": name, "model_version": -1, "input_map": entries(given), "output_map": entries(found)}
        for name, given, found in steps
    ]
