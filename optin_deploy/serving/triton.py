"""NVIDIA Triton: a model repository of ONNX files (ONNX Runtime backend) or TensorRT plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from optin_deploy.errors import BadInput
from optin_deploy.serving.base import Files, Rows
from optin_deploy.serving.manifest import Manifest, TensorSpec
from optin_deploy.serving.names import TEXT, tokenizer_of
from optin_deploy.serving.triton_config import (
    Accelerator,
    Accelerators,
    Cache,
    Config,
    DynamicBatching,
    Ensemble,
    InstanceGroup,
    Optimization,
    Parameter,
    Specific,
    Step,
    Tensor,
    VersionPolicy,
    Warmup,
    WarmupInput,
    Word,
    data_type,
)

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
        return {**files, CONFIG: str(config_of(served, warmup))}

    def root_files(self, models: Mapping[str, Sequence[Manifest]]) -> Files:
        """Triton reads nothing beside its models' folders."""
        return {}


def batches(manifest: Manifest) -> bool:
    """Is the first axis of every tensor open, so that requests can be joined?"""
    return all(tensor.shape[0] == -1 for tensor in (*manifest.inputs, *manifest.outputs))


def config_of(served: Sequence[Manifest], warmup: Rows) -> Config:
    """The configuration of a model.

    Args: served: its versions, of which the last one's options count. warmup: one row of values for each input.
    """
    last = served[-1]
    joined = batches(last)
    config = Config(
        name=last.name,
        max_batch_size=last.options.max_batch if joined else 0,
        input=tuple(_tensor(each, joined) for each in last.inputs),
        output=tuple(_tensor(each, joined) for each in last.outputs),
        version_policy=VersionPolicy(Specific(tuple(each.version for each in served))),
    )
    if last.role == "text":
        return replace(config, platform="ensemble", ensemble_scheduling=_ensemble(last))
    if last.role == "tokenizer":
        return replace(config, backend="python", instance_group=_instances(last), parameters=_tokenizing(last))
    options = last.options
    return replace(
        config,
        platform=PLATFORMS[last.engine],
        instance_group=_instances(last),
        dynamic_batching=DynamicBatching(options.preferred, options.queue_delay_us) if joined else None,
        optimization=Optimization(Accelerators((Accelerator("tensorrt"),))) if last.engine == "ort-trt" else None,
        model_warmup=_warmups(last, warmup, joined),
        parameters=None if options.threads is None else {"intra_op_thread_count": Parameter(str(options.threads))},
        response_cache=Cache(enable=False),
    )


def _tensor(spec: TensorSpec, joined: bool) -> Tensor:
    return Tensor(spec.name, data_type(spec.datatype), spec.shape[1:] if joined else spec.shape)


def _instances(manifest: Manifest) -> tuple[InstanceGroup, ...]:
    on_cpu = manifest.engine in ON_CPU or manifest.role == "tokenizer"
    return (InstanceGroup(manifest.options.instances, Word("KIND_CPU" if on_cpu else "KIND_GPU")),)


def _first_row(manifest: Manifest, rows: Rows) -> Rows:
    """One recorded row of every input, or nothing if one is not recorded."""
    names = [tensor.name for tensor in manifest.inputs]
    return {name: rows[name][:1] for name in names} if batches(manifest) and all(name in rows for name in names) else {}


def _warmup_file(manifest: Manifest, name: str) -> str:
    return f"{manifest.version}-{name.replace('/', '_')}"


def _warmups(manifest: Manifest, rows: Rows, joined: bool) -> tuple[Warmup, ...]:
    """A request of one sample, and one of a full batch, of recorded values: random ids may lie outside a table."""
    if not (rows and joined):
        return ()
    inputs = {
        each.name: WarmupInput(data_type(each.datatype), rows[each.name].shape[1:], _warmup_file(manifest, each.name))
        for each in manifest.inputs
    }
    sizes = sorted({1, *(manifest.options.preferred[-1:] or (manifest.options.max_batch,))})
    return tuple(Warmup(f"recorded rows, batch {size}", size, inputs) for size in sizes)


def _tokenizing(manifest: Manifest) -> Mapping[str, Parameter]:
    return {
        "longest": Parameter(str(manifest.options.longest)),
        "too_long": Parameter(manifest.options.too_long),
    }


def _ensemble(manifest: Manifest) -> Ensemble:
    """Texts go to the tokenizer, its tensors to the model."""
    model, tensors = manifest.made_from["serves"], manifest.made_from["tensors"].split()
    passed = {name: name for name in tensors}
    outputs = {tensor.name: tensor.name for tensor in manifest.outputs}
    return Ensemble((Step(tokenizer_of(model), -1, {TEXT: TEXT}, passed), Step(model, -1, passed, outputs)))
