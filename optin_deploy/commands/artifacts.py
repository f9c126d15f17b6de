"""`optin build` and `bench`: engines, and what they gain."""

from __future__ import annotations

import typer

from optin_deploy.commands.options import (
    At,
    Compatible,
    Dense,
    DryRun,
    Engine,
    Folder,
    Pool,
    Precision,
    PrepareOnly,
    ProfileOption,
    Threads,
    TimingCache,
    Weights,
    Workspace_,
)
from optin_deploy.commands.parsing import engine_options
from optin_deploy.terminal import print_latency, stage_bar

BUILD_EXAMPLES = """
Examples:

    optin build work --engine onnx

    optin build work --engine trt
"""


def build(
    folder: Folder,
    engine: Engine = "onnx",
    precision: Precision = None,
    pool: Pool = None,
    dense: Dense = True,
    profile: ProfileOption = None,
    workspace: Workspace_ = None,
    timing_cache: TimingCache = None,
    compatible: Compatible = None,
    weights: Weights = "fixed",
    prepare_only: PrepareOnly = False,
    dry_run: DryRun = False,
) -> None:
    """Export the model in DIR to an engine, and prove that it computes the same."""
    from exporters.job import build_folder

    options = engine_options(profile, workspace, timing_cache, compatible, weights)
    with stage_bar("export"):
        built = build_folder(
            folder, engine=engine, precision=precision, pool=pool, options=options, dense=dense, dry_run=dry_run
        )
    if built is None:
        typer.echo(f"would export {folder / 'model'} to engine {engine}")
        return
    for pair in built.pairs:
        for artifact in pair.artifacts().values():
            size = f"{artifact.size_bytes / 2**20:.1f} MiB"
            typer.echo(f"{artifact.path}  {pair.precision}  {size}  sha256 {artifact.sha256[:12]}")
    if built.problem is not None and not prepare_only:
        raise built.problem
    if built.obstacle is not None:
        typer.echo(f"not run here: {built.obstacle}")


BENCH_EXAMPLES = """
Example:

    optin bench work --at batch=1,seq=128 --at batch=8,seq=128 --threads 2
"""


def bench(
    folder: Folder,
    engine: Engine = "onnx",
    precision: Precision = None,
    at: At = None,
    threads: Threads = 0,
    dry_run: DryRun = False,
) -> None:
    """Measure the dense and the pruned artifact in DIR against each other, interleaved, with confidence intervals."""
    from exporters.measuring import Point, bench_folder, parse_point

    points = [parse_point(text) for text in at] if at else [Point()]
    measured = bench_folder(
        folder, engine=engine, precision=precision, points=points, threads=threads, dry_run=dry_run, stage=stage_bar
    )
    if dry_run:
        typer.echo(f"would measure {len(points)} points on engine {engine}")
        return
    print_latency(measured)
