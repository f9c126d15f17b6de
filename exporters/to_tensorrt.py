"""NVIDIA TensorRT and TensorRT-RTX: a plan built from the typed ONNX file, with a record of what it fits.

TensorRT builds on the GPU that it will serve on. TensorRT-RTX also builds ahead of time on a machine without one,
which makes it the preflight of TensorRT: it shares the parser and much of the compiler, but is not the same product.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optin_deploy.errors import BadInput, CannotBuildHere, MissingDependency
from optin_deploy.exporters.base import Artifact, ExporterDefaults, ExportSpec, Form, graph_precision, typed_name
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.exporters.preflight import build_ahead
from optin_deploy.exporters.tensorrt_plan import PlanOptions, build_engine
from optin_deploy.exporters.to_onnx import OnnxExporter
from optin_deploy.files.storage import atomic_file, sha256_file, sha256_json, write_text
from optin_deploy.runtimes.base import Runtime
from optin_deploy.runtimes.device import NO_GPU, current_gpu, describe_device
from optin_deploy.runtimes.record import EngineRecord, finished, read_record, write_record
from optin_deploy.runtimes.tensorrt import TensorRTRuntime
from optin_deploy.runtimes.tensorrt_bindings import MODULES, EngineLog, import_tensorrt

TIMING_CACHE = "timing.cache"
OLDEST, NEWEST = (10, 12), 12
"""First version with the calls used here, and the first major version that was not looked at."""


class TensorRTExporter(ExporterDefaults):
    """Plans for TensorRT; where it or a GPU is missing, the instructions for the target."""

    engine = "trt"
    precisions = ("fp16", "fp32", "tf32", "bf16", "int8")
    align = 64
    reads_onnx = True
    options: type[PlanOptions] = PlanOptions
    keeps_timings = True

    def file_names(self, precision: str, folder: Path | None = None) -> tuple[str, str | None]:
        """See `Exporter.file_names`."""
        return "model.engine", "dense.engine"

    def export(self, form: Form, spec: ExportSpec, out: Path) -> Artifact:
        """Build the plan of the typed ONNX file, which is exported beside it.

        Raises: CannotBuildHere: no TensorRT, no GPU, or the builder refused; the ONNX file lies beside `out`.
        """
        precision = spec.precision or self.precisions[0]
        stem = out.name.partition(".")[0]
        onnx_precision = graph_precision(precision)
        source = out.with_name(typed_name(stem, onnx_precision, ".onnx"))
        graph = OnnxExporter().export(form, replace(spec, precision=onnx_precision), source)
        options = self.options.checked(spec.options)
        profiles = tuple(profile.up_to(form.longest) for profile in options.profiles)
        options = replace(options, profiles=profiles)
        missing = self.cannot_build()
        if missing is not None:
            preflight = _preflight(source, options) if self.engine == "trt" else ""
            raise CannotBuildHere(f"{_instructions(form, source, precision, options, missing)}{preflight}")
        trt: Any = import_tensorrt(self.engine)
        gpu = current_gpu()
        device = ("", "") if gpu is None else describe_device(gpu)
        wanted = EngineRecord(
            engine=self.engine,
            precision=precision,
            sha256="",
            size_bytes=0,
            device=device[0],
            capability=device[1],
            version=trt.__version__,
            key=sha256_json([graph.sha256, self.engine, precision, options.settings(), trt.__version__, device]),
            versions={"torch": torch.__version__, "cuda": str(torch.version.cuda)},
            options=options.settings(),
            onnx=source.name,
            onnx_sha256=graph.sha256,
            onnx_data=graph.data,
            any_version="version" in options.compatible,
            any_device="hardware" in options.compatible,
            stripped=options.weights == "stripped",
        )
        record = finished(out, wanted.key) or self._build(trt, source, out, options, wanted)
        return Artifact(
            path=out,
            engine=self.engine,
            precision=precision,
            inputs=graph.inputs,
            outputs=graph.outputs,
            sha256=record.sha256,
            size_bytes=record.size_bytes,
            versions={**graph.versions, MODULES[self.engine][0]: record.version},
            shapes=tuple(corner for profile in profiles for corner in profile.corners()),
        )

    def _build(self, trt: Any, source: Path, out: Path, options: PlanOptions, wanted: EngineRecord) -> EngineRecord:
        """Write plan, builder's log and record; `wanted` lacks only what the file itself tells."""
        log = EngineLog(MODULES[self.engine][1])
        cache = (options.timing_cache or out.with_name(TIMING_CACHE)) if self.keeps_timings else None
        try:
            plan = build_engine(
                trt,
                source,
                options,
                log=log,
                tf32=wanted.precision in ("tf32", "int8"),  # int8: what is not quantised need not be exact
                timing_cache=cache,
                configure=lambda config: self.configure(trt, config),
            )
        finally:
            write_text(out.with_name(f"{out.name}.log"), "\n".join(log.lines) + "\n")
        with atomic_file(out) as temporary:
            temporary.write_bytes(plan)
        record = replace(wanted, sha256=sha256_file(out), size_bytes=len(plan))
        write_record(out, record)
        return record

    def configure(self, trt: Any, config: Any) -> None:
        """Set what only this kind of TensorRT has."""

    def cannot_build(self) -> str | None:
        """Why no plan can be built on this machine; None: it can."""
        try:
            found = import_tensorrt(self.engine).__version__
        except MissingDependency as err:
            return str(err)
        numbers = [int(part) for part in found.split(".")[:2]]
        if tuple(numbers) < OLDEST or numbers[0] >= NEWEST:
            return f"TensorRT {found} is installed; 10.12 to 11 are supported. Run: pip install 'optin-deploy[trt]'"
        return NO_GPU if current_gpu() is None else None

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return self.cannot_build()

    def threads(self, asked: int) -> int:
        """See `Exporter.threads`."""
        if asked:
            raise BadInput(f"--threads {asked}: engine {self.engine} runs on the GPU and has none. Leave it out.")
        return 0

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """The plan on the current CUDA device, with CUDA graphs; errors as in `open_device`."""
        return self.open_device(path, precision=precision)

    def open_device(
        self, path: Path, *, precision: str | None = None, cuda_graph: bool = True, task: str | None = None
    ) -> TensorRTRuntime:
        """See `DeviceExporter.open_device`.

        Raises: BadInput: the plan was built in another precision, or for another device or version.
        """
        found = read_record(path).precision
        if precision not in (None, found):
            raise BadInput(
                f"{path} is a plan in {found}, not {precision}. Run: "
                f"optin build {path.parent} --engine {self.engine} --precision {precision}, or give --precision {found}"
            )
        return TensorRTRuntime(path, engine=self.engine, cuda_graph=cuda_graph)


class RtxExporter(TensorRTExporter):
    """TensorRT-RTX: builds ahead of time, with or without a GPU; kernels are finished where it is loaded."""

    engine = "trt-rtx"
    keeps_timings = False

    def file_names(self, precision: str, folder: Path | None = None) -> tuple[str, str | None]:
        """Other names than TensorRT's, whose plans it cannot load."""
        return "model.rtx.engine", "dense.rtx.engine"

    def cannot_build(self) -> str | None:
        """See `TensorRTExporter.cannot_build`."""
        try:
            import_tensorrt(self.engine)
        except MissingDependency as err:
            return str(err)
        return None

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`; to run a plan takes a GPU."""
        return self.cannot_build() or (NO_GPU if current_gpu() is None else None)

    def check(self, options: EngineOptions, pool: str | None = None) -> None:
        """Its plans fit one release and a list of architectures; without a GPU, it builds no plan to be refitted.

        Raises: BadInput.
        """
        own = self.options.checked(options)
        if own.compatible:
            raise BadInput("TensorRT-RTX has no --compatible: its plans load in the release that built them.")
        if own.timing_cache is not None:
            raise BadInput("--timing-cache: TensorRT-RTX times no kernels while it builds. Leave it out.")
        if own.weights != "fixed" and current_gpu() is None:
            raise BadInput(f"--weights {own.weights} needs a GPU with TensorRT-RTX, and {NO_GPU}.")

    def configure(self, trt: Any, config: Any) -> None:
        """Build for the GPU that is here, if one is; else for the product's default list of architectures."""
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or its launches cannot be captured in a graph
        if current_gpu() is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


def _preflight(source: Path, options: PlanOptions) -> str:
    """What TensorRT-RTX, if it is installed, makes of the same file: a line for the error text."""
    try:
        said = build_ahead(source, options)
    except CannotBuildHere as err:
        return f"\nPreflight FAILED, TensorRT will likely refuse it too: {err}"
    return "" if said is None else f"\nPreflight passed: {said}"


def _instructions(form: Form, source: Path, precision: str, options: PlanOptions, missing: str) -> str:
    folder = source.parent
    lines = [
        f"{source} is written, but no {precision} engine: {missing}. Copy {folder} to the target and run there",
        "  pip install 'optin-deploy[cpu,trt]'",
        f"  optin build {folder.name} --engine trt --precision {precision} --no-dense {_flags(options)}",
        "or, for a plan that only other tools read,",
        f"  trtexec --stronglyTyped --onnx={folder.name}/{source.name} --saveEngine={folder.name}/trtexec.engine"
        + ("" if precision != "fp32" else " --noTF32")
        + _trtexec_shapes(form, options),
    ]
    return "\n".join(lines)


def _flags(options: PlanOptions) -> str:
    """The options as they are typed."""
    typed = [f'--profile "{profile}"' for profile in options.profiles]
    typed += [f"--compatible {what}" for what in options.compatible]
    typed += [f"--workspace {options.workspace_bytes}"] if options.workspace_bytes else []
    typed += [f"--weights {options.weights}"] if options.weights != "fixed" else []
    return " ".join(typed)


def _trtexec_shapes(form: Form, options: PlanOptions) -> str:
    shapes = ""
    for name, (batch, tokens) in zip(("min", "opt", "max"), options.profiles[0].corners(), strict=True):
        sized = {
            port.name: [
                size if isinstance(size, int) else tokens if axis else batch
                for axis, size in enumerate(port.shape or ())
            ]
            for port in form.network.inputs
        }
        sizes = ",".join(f"{entry}:{'x'.join(map(str, shape))}" for entry, shape in sized.items())
        shapes += f" --{name}Shapes={sizes}"
    return shapes
