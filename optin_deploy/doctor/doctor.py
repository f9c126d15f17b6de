"""`optin doctor`: look at this machine, or at the ONNX files of a folder, and say what will not work and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from optin_deploy.common.formatting import named, plain
from optin_deploy.doctor.activation_range import check_activations, check_outputs
from optin_deploy.doctor.clashes import check_machine
from optin_deploy.doctor.findings import HEADER, Finding, finding_rows, summary
from optin_deploy.doctor.graph import check_graph, unsupported_by_list
from optin_deploy.doctor.half_range import check_constants
from optin_deploy.doctor.machine import Machine, examine
from optin_deploy.doctor.support import Parser, check_support, find_parser
from optin_deploy.errors import BadInput, OptinError
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.exporters.preflight import build_ahead
from optin_deploy.files.storage import read_tensors
from optin_deploy.network.onnx_data import all_tensors, external_fault, read_onnx, remedy
from optin_deploy.network.sealed import was_changed

SCHEMA_VERSION = 1
SAMPLES = "samples.safetensors"
INPUT = "input."
"""Start of the names of recorded inputs in SAMPLES."""
PREFLIGHT_FILE = "model.onnx"
"""The one file that is built as a preflight: a build takes seconds to minutes."""
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

Preflight = Callable[[Path], str | None]
"""Builds an engine from an ONNX file and says what it built; None: it cannot try. Raises: CannotBuildHere."""


@dataclass(frozen=True)
class EngineRow:
    """Can artifacts of one engine be built, and run, on this machine?"""

    engine: str
    answer: str
    """yes, build only, run only, or no."""
    why: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that a look found."""

    findings: tuple[Finding, ...]
    machine: tuple[tuple[str, str], ...] = ()
    """What is there, by name; empty when a folder was looked at."""
    engines: tuple[EngineRow, ...] = ()

    @property
    def has_problem(self) -> bool:
        """Is anything wrong, beyond warnings?"""
        return any(finding.level == "problem" for finding in self.findings)

    @property
    def summary(self) -> str:
        """One sentence about the findings."""
        return summary(self.findings)

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Title, header and rows of each table that has rows; safe to print."""
        engines = [(row.engine, row.answer, row.why) for row in self.engines]
        every: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
            ("This machine", ("", "found"), list(self.machine)),
            ("Engines", ("engine", "here", "why"), list(engines)),
            ("Findings", HEADER, list(finding_rows(self.findings))),
        ]
        return [(title, head, [tuple(map(plain, row)) for row in rows]) for title, head, rows in every if rows]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "machine": dict(self.machine)}


def diagnose(target: Path | None = None, *, preflight: Preflight = build_ahead) -> Diagnosis:
    """Look at this machine (no target), at an output folder, or at one ONNX file.

    Args: preflight: builds an engine from model.onnx, if nothing is wrong with the file.
    Raises: BadInput: nothing to look at, or a file that is not what its name says.
    """
    if target is None:
        machine = examine()
        return Diagnosis(tuple(check_machine(machine)), machine_rows(machine), engine_rows())
    parser = find_parser()
    findings: list[Finding] = []
    for path in onnx_files(target):
        found = check_file(path, recorded_inputs(path.parent), parser=parser)
        findings += found
        if path.name == PREFLIGHT_FILE and not Diagnosis(tuple(found)).has_problem:
            findings += _built(preflight, path)
    return Diagnosis(tuple(findings))


def onnx_files(target: Path) -> list[Path]:
    """The file itself, or the ONNX files that lie in a folder.

    Raises: BadInput: there is none.
    """
    if target.is_dir():
        found = sorted(target.glob("*.onnx"))
        if not found:
            raise BadInput(f"{target} holds no .onnx file. Give an output folder, or run `optin build {target}` first.")
        return found
    if not target.is_file():
        raise BadInput(f"{target}: no such file or folder. Give an output folder or an .onnx file.")
    return [target]


def recorded_inputs(folder: Path) -> dict[str, np.ndarray]:
    """The inputs that the job recorded, (rows, ...) by name; empty where there are none.

    Raises: BadInput: the file is damaged.
    """
    path = folder / SAMPLES
    if not path.is_file():
        return {}
    tensors = read_tensors(path, "Delete it, or run `optin export` again.")
    plain_types = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return {name.removeprefix(INPUT): t.numpy() for name, t in plain_types.items() if name.startswith(INPUT)}


def check_file(path: Path, feeds: Mapping[str, np.ndarray], *, parser: Parser | None) -> list[Finding]:
    """Everything about one ONNX file.

    Args: feeds: recorded inputs; empty: activations are not looked at. parser: None: a stored list stands for it.
    Raises: BadInput: not an ONNX file, or a damaged one.
    """
    proto, subject = read_onnx(path), path.name
    faults = _external_faults(proto, path.parent, subject)
    if faults:
        return faults  # nothing can run it, and nothing more of it is read
    findings = [*_changed(path, proto, subject), *check_graph(proto, subject)]
    said = check_support(parser, path, len(proto.graph.node), subject) if parser is not None else None
    findings += list(unsupported_by_list(proto, subject)) if said is None else said
    if any(tensor.data_type in HALF for tensor in proto.graph.initializer):
        return [*findings, *check_outputs(proto, path.parent, feeds, subject)]
    constants = check_constants(proto, path.parent, subject)
    return [*findings, *constants.findings, *check_activations(proto, path.parent, feeds, constants.masks, subject)]


def engine_rows() -> tuple[EngineRow, ...]:
    """Which engines can be built and run here; the exporters themselves say what stands in the way."""
    return tuple(_engine_row(name) for name in ENGINES)


def _engine_row(name: str) -> EngineRow:
    try:
        chosen = exporter(name)
        to_run, to_build = chosen.obstacle(), chosen.cannot_build()
    except OptinError as err:
        return EngineRow(name, "no", str(err))
    answers = {(True, True): "yes", (False, True): "build only", (True, False): "run only", (False, False): "no"}
    answer = answers[to_run is None, to_build is None]
    return EngineRow(name, answer, "; ".join(dict.fromkeys(filter(None, (to_run, to_build)))))


def machine_rows(machine: Machine) -> tuple[tuple[str, str], ...]:
    """What is there, for a table."""
    gpus = "; ".join(f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_mib} MiB" for gpu in machine.gpus)
    cuda = machine.torch_cuda and f"built for CUDA {machine.torch_cuda}"
    versions = {
        name: f"{version}, {cuda or 'built without CUDA'}" if name == "torch" else version
        for name, version in machine.versions.items()
    }
    return (
        ("Python", f"{machine.python}, {machine.system}"),
        ("CPU", machine.cpu),
        ("GPU", gpus or "none found"),
        ("NVIDIA driver", machine.driver or "none found (no answer from nvidia-smi)"),
        ("CUDA of the driver", machine.driver_cuda or "none found (no libcuda)"),
        ("C++ compiler", machine.compiler or "none found (engine aoti needs one)"),
        *versions.items(),
    )


def _external_faults(proto: onnx.ModelProto, folder: Path, subject: str) -> list[Finding]:
    faults = [(tensor.name, external_fault(tensor, folder)) for tensor in all_tensors(proto)]
    real = [(name, fault) for name, fault in faults if fault is not None]
    if not real:
        return []
    (name, fault), more = real[0], f" (and {len(real) - 1} tensors more)" if len(real) > 1 else ""
    remedy = "copy the data files beside the ONNX file, from where it was exported"
    return [Finding("problem", subject, f"weights of {named(name)} cannot be read: {fault}{more}.", remedy)]


def _changed(path: Path, proto: onnx.ModelProto, subject: str) -> list[Finding]:
    if not was_changed(path, proto):
        return []
    text = "was changed after it was exported, or the file with its weights was: it may not be the model it came from."
    return [Finding("problem", subject, text, remedy(path))]


def _built(preflight: Preflight, path: Path) -> list[Finding]:
    try:
        said = preflight(path)
    except OptinError as err:
        return [Finding("problem", path.name, str(err), "what the builder said last names the layer")]
    return [] if said is None else [Finding("ok", path.name, said)]
