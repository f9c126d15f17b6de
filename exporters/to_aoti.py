"""AOTInductor: one compiled package that torch loads without the model's Python code, for CPU or GPU."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exporters.base import Artifact, ExportSpec, WithoutPlan, output_names, typed_name
from exporters.graph import DTYPES, Traced, graph_key, quiet_export
from optin_deploy.errors import CannotBuildHere
from optin_deploy.inputs import input_names
from optin_deploy.masking import inference
from optin_deploy.runtimes.aoti import AotiRuntime
from optin_deploy.runtimes.base import Runtime, torch_threads
from optin_deploy.runtimes.device import current_gpu, describe_device, exact_float32, missing_compiler
from optin_deploy.runtimes.record import EngineRecord, finished, write_record
from optin_deploy.storage import atomic_file, sha256_file


class AotiExporter(WithoutPlan):
    """A `.pt2` package; any batch, any length up to the position table's."""

    engine = "aoti"
    precisions = ("fp32", "fp16", "bf16")
    reads_onnx = False

    def file_names(self, precision: str) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return typed_name("model", precision, ".pt2"), typed_name("dense", precision, ".pt2")

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """Trace, compile and package for the device that is here.

        Raises: CannotBuildHere: no C++ compiler.
        """
        precision = spec.precision or self.precisions[0]
        device = current_gpu() or torch.device("cpu")
        key = graph_key(model, precision, spec.pool, torch.__version__, describe_device(device))
        record = finished(out, key)
        if record is None:
            record = _compile(model, spec.pool, precision, device, out, key)
        return Artifact(
            path=out,
            engine=self.engine,
            precision=precision,
            inputs=input_names(model),
            outputs=output_names(model, spec.pool),
            sha256=record.sha256,
            size_bytes=record.size_bytes,
            versions={"torch": record.version},
        )

    def cannot_build(self) -> str | None:
        """See `Exporter.cannot_build`; only the build needs a compiler."""
        return missing_compiler()

    def threads(self, asked: int) -> int:
        """See `Exporter.threads`."""
        return asked or torch_threads()

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """The package on the device that it was compiled for."""
        return AotiRuntime(path, threads=threads)


def _compile(
    model: nn.Module, pool: str | None, precision: str, device: torch.device, out: Path, key: str
) -> EngineRecord:
    obstacle = missing_compiler()
    if obstacle is not None:
        raise CannotBuildHere(
            f"no {out.name}: {obstacle}, then run: optin build {out.parent} --engine aoti --precision {precision}"
        )
    own = copy.deepcopy(model).to(device, DTYPES[precision])
    traced = Traced(own, pool)
    with tempfile.TemporaryDirectory() as temporary, inference(own), torch.no_grad(), exact_float32(), quiet_export():
        program = torch.export.export(traced, traced.example(), dynamic_shapes=traced.dynamic_shapes())
        inductor: Any = torch._inductor
        settings = {
            "aot_inductor.metadata": {
                "inputs": ",".join(traced.inputs),
                "outputs": ",".join(traced.outputs),
            }
        }
        package = inductor.aoti_compile_and_package(
            program, package_path=str(Path(temporary) / "package.pt2"), inductor_configs=settings
        )
        with atomic_file(out) as written:
            shutil.copyfile(package, written)
    name, capability = describe_device(device)
    record = EngineRecord(
        engine=AotiExporter.engine,
        precision=precision,
        sha256=sha256_file(out),
        size_bytes=out.stat().st_size,
        device=name,
        capability=capability,
        version=torch.__version__,
        key=key,
    )
    write_record(out, record)
    return record
