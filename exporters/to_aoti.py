"""AOTInductor: one compiled package that torch loads without the model's Python code, for CPU or GPU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_deploy.errors import BadInput, CannotBuildHere
from optin_deploy.exporters.base import Artifact, ExporterDefaults, ExportSpec, Form, typed_name
from optin_deploy.exporters.precisions import DTYPES
from optin_deploy.exporters.to_torch import module_of
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.feeds.rows import MASK
from optin_deploy.files.storage import atomic_file, sha256_file, sha256_json
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_torch import FAILURES, Traced, prepared, quiet
from optin_deploy.network.sealed import finished as sealed
from optin_deploy.runtimes.aoti import AotiRuntime
from optin_deploy.runtimes.base import Runtime, torch_threads
from optin_deploy.runtimes.device import current_gpu, describe_device, float32_mode, missing_compiler
from optin_deploy.runtimes.record import EngineRecord, finished, write_record


class AotiExporter(ExporterDefaults):
    """A `.pt2` package; any batch, any length up to the position table's."""

    engine = "aoti"
    precisions = ("fp32", "fp16", "bf16")
    reads_onnx = False

    def file_names(self, precision: str, folder: Path | None = None) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return typed_name("model", precision, ".pt2"), typed_name("dense", precision, ".pt2")

    def export(self, form: Form, spec: ExportSpec, out: Path) -> Artifact:
        """Trace, compile and package for the device that is here.

        Raises: CannotBuildHere: no C++ compiler, or torch.export cannot trace the module.
        """
        precision = spec.precision or self.precisions[0]
        device = current_gpu() or torch.device("cpu")
        graph = sealed(form.graph)
        assert graph is not None, "the float32 file was written by an earlier stage"
        key = sha256_json(
            [graph.sha256, precision, spec.head and spec.head.digest, torch.__version__, describe_device(device)]
        )
        record = finished(out, key)
        if record is None:
            record = _compile(form, spec.head, precision, device, out, key)
        return Artifact(
            path=out,
            engine=self.engine,
            precision=precision,
            inputs=graph.inputs,
            outputs=graph.outputs,
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

    def open_device(
        self, path: Path, *, precision: str | None = None, cuda_graph: bool = True, task: str | None = None
    ) -> AotiRuntime:
        """See `DeviceExporter.open_device`; no graph is recorded."""
        return AotiRuntime(path)


def _compile(
    form: Form, head: EmbeddingHead | None, precision: str, device: torch.device, out: Path, key: str
) -> EngineRecord:
    obstacle = missing_compiler()
    if obstacle is not None:
        raise CannotBuildHere(
            f"no {out.name}: {obstacle}, then run: optin build {out.parent} --engine aoti --precision {precision}"
        )
    module = module_of(form.module or form.graph, form.task).to(device, DTYPES[precision])
    with tempfile.TemporaryDirectory() as temporary, float32_mode(), quiet():
        try:
            program, outputs = traced_of(module, form, precision, head)
        except (BadInput, *FAILURES) as err:
            said = (str(err).splitlines() or [""])[0]
            raise CannotBuildHere(
                f"no {out.name}: torch.export cannot trace this network ({type(err).__name__}: {said}). "
                "Use --engine onnx, openvino or torch."
            ) from err
        inductor: Any = torch._inductor
        inputs = ",".join(port.name for port in form.network.inputs)
        settings = {"aot_inductor.metadata": {"inputs": inputs, "outputs": ",".join(outputs)}}
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


def traced_of(
    module: torch.nn.Module, form: Form, precision: str, head: EmbeddingHead | None
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Trace the module of a form for every size of its free axes.

    Returns: the program, and the names of its outputs.
    Raises: BadInput, or one of `FAILURES`: it cannot be traced.
    """
    weight = next(module.parameters(), torch.empty(0))
    example = example_of(form.network, weight.device)
    typed = Typed(module, tuple(example), DTYPES[precision], head)
    with prepared(module), torch.no_grad():
        typed(*example.values())  # notes the names of the outputs
        program = torch.export.export(typed, tuple(example.values()), dynamic_shapes=(dynamic_shapes(form),))
    return program, typed.found_names.all


class Typed(Traced):
    """Takes and gives float32 whatever the weights are; with pooling, one more output."""

    def __init__(
        self, module: torch.nn.Module, names: tuple[str, ...], dtype: torch.dtype, head: EmbeddingHead | None = None
    ) -> None:
        super().__init__(module, names)
        self.dtype, self.head = dtype, head

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See `Traced`."""
        found = super().forward(*(v.to(self.dtype) if v.is_floating_point() else v for v in values))
        found = tuple(v.float() if v.is_floating_point() else v for v in found)
        if self.head is None:
            return found
        states, mask = found[0], dict(zip(self.names, values, strict=True)).get(MASK)
        valid = torch.ones(states.shape[:2]) if mask is None else mask
        self.found_names.all = (*self.found_names.all, POOLED)
        return (*found, self.head(states, valid.to(states)))


def example_of(network: Network, device: torch.device) -> Mapping[str, Tensor]:
    """Inputs to trace with: no free size is 1, which torch would take for a constant."""
    probe = probes_of(network)[0]
    return {port.name: probe[port.name].to(device) for port in network.inputs}


def dynamic_shapes(form: Form) -> tuple[dict[int, Any], ...]:
    """Free axes of the inputs; those of one name have one size, and lengths end where the table of positions does."""
    sizes: dict[str, Any] = {}
    found = []
    for port in form.network.inputs:
        free = {axis: size for axis, size in enumerate(port.shape or ()) if isinstance(size, str)}
        for axis, size in free.items():
            # torch treats a length of 1 as a case of its own.
            bounds = {"min": 2, "max": form.longest} if axis else {"min": 1}
            sizes.setdefault(size, torch.export.Dim(_plain(size), **bounds))
        found.append({axis: sizes[size] for axis, size in free.items()})
    return tuple(found)


def _plain(size: str) -> str:
    """A name that Python takes."""
    return "".join(letter if letter.isalnum() else "_" for letter in f"size_{size}")
