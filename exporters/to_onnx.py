"""ONNX files of dense and pruned networks: the float32 graph as it was cut, and passes over it for other types."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.exporters.base import Artifact, ExporterDefaults, ExportSpec, Form, typed_name
from optin_deploy.exporters.passes.folded import folded
from optin_deploy.exporters.passes.pooled import pooled
from optin_deploy.exporters.passes.typed import typed
from optin_deploy.exporters.quantize import NEEDS_SAMPLES, NOISE_LIMIT, SETTINGS, quantize_int8
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.files.storage import scratch_folder, sha256_json
from optin_deploy.network.graph import Network
from optin_deploy.network.hashing import hash_of
from optin_deploy.network.sealed import KEY, MADE_FROM, Finished, complete, finished, install, store
from optin_deploy.network.unused import tidied
from optin_deploy.network.write import SINGLE_FILE_BYTES
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.ort import OrtRuntime

PACKAGES = ("torch", "onnx", "onnxruntime")
"""What made a file; part of the artifact's `versions`."""


class OnnxExporter(ExporterDefaults):
    """ONNX for ONNX Runtime; also what TensorRT and OpenVINO read."""

    engine = "onnx"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    reads_onnx = True

    def file_names(self, precision: str, folder: Path | None = None) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return typed_name("model", precision, ".onnx"), typed_name("dense", precision, ".onnx")

    def export(self, form: Form, spec: ExportSpec, out: Path) -> Artifact:
        """See `Exporter.export`; the float32 file is there already, weights that one file does not hold lie beside it.

        Raises: BadInput: int8 without samples, or too large.
        """
        precision = spec.precision or self.precisions[0]
        found = finished(form.graph)
        assert found is not None, "the float32 file was written by an earlier stage"
        if precision != "fp32":
            found = _typed(form, found, precision, spec, out)
        return Artifact(
            path=out,
            engine=self.engine,
            precision=precision,
            inputs=found.inputs,
            outputs=found.outputs,
            sha256=found.sha256,
            size_bytes=sum(path.stat().st_size for path in (out, *map(out.with_name, found.data))),
            versions={name: version(name) for name in PACKAGES},
            data=found.data,
        )

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return "ONNX Runtime has no bfloat16 kernels for the CPU" if precision == "bf16" else None

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """ONNX Runtime on the CPU."""
        return OrtRuntime(path, threads=threads)


def _typed(form: Form, source: Finished, precision: str, spec: ExportSpec, out: Path) -> Finished:
    """The same graph in another type."""
    entries = {MADE_FROM: source.sha256}
    if precision != "int8":
        key = sha256_json([source.sha256, precision, version("onnx")])
        plain = typed(folded(tidied(form.network, without=POOLED)), precision)
        return store(plain if spec.head is None else pooled(plain, spec.head), out, key, entries)
    key = sha256_json(
        [source.sha256, precision, version("onnxruntime"), NOISE_LIMIT, SETTINGS, [*map(hash_of, spec.calibration)]]
    )
    known = finished(out)
    if known is None or known.key != key:
        if not spec.calibration:
            raise BadInput(NEEDS_SAMPLES)
        check_size(form.network, precision)
        with scratch_folder(out) as folder:
            quantize_int8(form.graph, folder / out.name, spec.calibration)
            complete(folder / out.name, {KEY: key, **entries})
            install(folder / out.name, out)
        known = finished(out)
        assert known is not None, "the file was written just now"
    return known


def check_size(network: Network, precision: str | None) -> None:
    """Refuse int8 where the float32 weights that it is made from are more than one file holds.

    Raises: BadInput.
    """
    size_bytes = sum(weight.nbytes for weight in network.weights.values())
    if precision == "int8" and size_bytes > SINGLE_FILE_BYTES:
        raise BadInput(
            f"--precision int8: the float32 weights are {size_bytes / 2**30:.2f} GiB, and the quantiser takes models "
            "of one ONNX file, which holds 2 GiB. Use --precision fp16, bf16 or fp32, or a smaller model."
        )
