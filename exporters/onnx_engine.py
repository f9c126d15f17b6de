"""Engines whose artifact is the ONNX file itself: written here, made into an engine when it is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from optin_deploy.errors import CannotBuildHere
from optin_deploy.exporters.base import Artifact, ExportSpec, Form, graph_precision
from optin_deploy.exporters.to_onnx import OnnxExporter


class OnnxEngineExporter(OnnxExporter):
    """What such engines share."""

    extra: str
    """Name of the extra with the packages that run it: pip install 'optin-deploy[extra]'."""

    def export(self, form: Form, spec: ExportSpec, out: Path) -> Artifact:
        """Write the ONNX file, or find it finished.

        Raises: CannotBuildHere: the engine cannot open it on this machine.
        """
        precision = spec.precision or self.precisions[0]
        graph = super().export(form, replace(spec, precision=graph_precision(precision)), out)
        obstacle = self.obstacle(precision)
        if obstacle is not None:
            raise CannotBuildHere(
                f"{out} is written, but {self.engine} does not run here: {obstacle}. Copy {out.parent} to the target "
                f"and run there\n  pip install 'optin-deploy[{self.extra}]'\n"
                f"  optin bench {out.parent.name} --engine {self.engine} --precision {precision}"
            )
        return replace(graph, engine=self.engine, precision=precision)
