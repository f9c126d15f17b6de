"""Real ONNX files, cut by norms of their weights and measured: what `optin plan --magnitude` and `rewrite` give alone.

Each file gets fixed sizes, so that all engines see the same shapes. The dense side is the file read and written again,
uncut: exporters' own files lose time to fusions that miss. Run: `python -m benchmarks.zoo.faster --record`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.record import RESULTS, write_result
from benchmarks.zoo.fetching import Unavailable
from benchmarks.zoo.real import REAL, exported_by_torchscript
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import prove
from optin_deploy.measuring.comparing import comparison_of
from optin_deploy.measuring.gate import LatencyLimit
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from optin_deploy.network.write import write
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import costs_of, limits_within
from optin_deploy.planning.magnitude import magnitudes
from optin_deploy.planning.plan import plan_of
from optin_deploy.planning.widths import Choice, choose
from optin_deploy.pruning.networks import find_in
from optin_deploy.reporting.report import to_table

FILES: Mapping[str, Mapping[str, int]] = {
    "minilm-l6": {"batch": 1, "length": 128},
    "minilm-l6-torchscript": {"batch": 1, "length": 128},
    "minilm-l3": {"batch": 1, "length": 128},
    "ppocr-recognition": {"batch": 1, "height": 48, "width": 320},
    "vit-focus": {"batch": 1},
    "nudenet": {"batch": 1, "height": 320, "width": 320},
}
"""Files by their names in the zoo, and the sizes that they are measured at."""
MADE = replace(
    REAL["minilm-l6"],
    name="minilm-l6-torchscript",
    what="all-MiniLM-L6-v2, exported here by TorchScript",
    read=exported_by_torchscript,
)
HEADER = ("file", "inputs", "groups", "MACs kept", "cut == masked", "baseline p50 ms", "cut p50 ms", "speed-up [95%]")


def fixed(network: Network, feeds: Mapping[str, Tensor]) -> Network:
    """The same network with the sizes of these inputs."""
    model = network.model.clone()
    for value in model.graph.inputs:
        value.shape = ir.Shape(tuple(feeds[value.name or ""].shape))
    for value in model.graph.outputs:
        value.shape = None
    return Network(model, network.source)


def row(name: str, flops: float, threads: int, folder: Path) -> dict[str, Any]:
    """Cut one file, prove it, and measure it beside the dense one."""
    real = MADE if name == MADE.name else REAL[name]
    types = {name: value.dtype for name, value in real.feeds().items()}
    known = {port.name for port in read(real.path()).inputs}
    drawn = {
        one.name: one.values(torch.Generator().manual_seed(0), FILES[name]) for one in real.inputs if one.name in known
    }
    sized = {key: value.to(types[key]) for key, value in drawn.items()}
    dense, smaller = folder / "dense.onnx", folder / "smaller.onnx"
    write(fixed(read(real.path()), sized), dense)
    found = find_in(dense)
    limits = limits_within(costs_of(found.layout), Limits(flops))
    keep = choose(found.layout, magnitudes(found.layout), limits, Choice(one_measure=False))
    network = cut(found.layout, keep)
    proof = prove(found.layout, keep, network, found.probes)
    cost = plan_of(found.layout, keep).cost
    assert cost is not None
    write(network, smaller)
    point = comparison_of(dense, smaller, engine="onnx", threads=threads).run(LatencyLimit("max_ratio", 1.0)).points[0]
    return {
        "file": name,
        "what": real.what,
        "inputs": {key: list(value.shape) for key, value in sized.items()},
        "groups": len(found.layout.groups),
        "kept": cost.macs_pruned / cost.macs_dense,
        "proof": proof.masked,
        "measured": point.to_json(),
    }


def words(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    measured = found["measured"]
    low, high = measured["ci95"]
    return (
        found["file"],
        ", ".join("x".join(map(str, shape)) for shape in found["inputs"].values()),
        str(found["groups"]),
        f"{found['kept']:.3f}",
        f"{found['proof']:.0e}",
        f"{measured['baseline']['p50_ms']:.2f}",
        f"{measured['candidate']['p50_ms']:.2f}",
        f"{1 / measured['ratio']:.2f} [{1 / high:.2f}, {1 / low:.2f}]",
    )


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", default=list(FILES), help=f"of {', '.join(FILES)}")
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/zoo"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    found = []
    for name in options.only:
        try:
            with tempfile.TemporaryDirectory() as folder:
                found.append(row(name, options.flops, options.threads, Path(folder)))
            print(" | ".join(words(found[-1])))
        except Unavailable as err:
            print(f"{name}: {err}")
    table = to_table(HEADER, [words(each) for each in found])
    text = (
        f"# Real files at {options.flops:.0%} of their MACs, by norms alone\n\n{table}\n\n"
        f"ONNX Runtime, {options.threads} thread(s); cut == masked: largest difference in float64, as a part of the "
        "largest output."
    )
    command = f"python -m benchmarks.zoo.faster --flops {options.flops} --threads {options.threads}"
    write_result(RESULTS if options.record else options.out, "zoo_faster", {"files": found}, text, command)


if __name__ == "__main__":
    main()
