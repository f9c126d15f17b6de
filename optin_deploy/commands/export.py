"""`optin-export`: the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from optin_deploy.commands.data import AnySize, Compared, ImageSize, Mean, Preprocessor, Std, Tokenizer, source_of
from optin_deploy.commands.networks import Shape, Units
from optin_deploy.commands.options import (
    DEFAULT_WEIGHTING,
    Allocation,
    At,
    Calibration,
    Compatible,
    Compensation,
    Dense,
    DropTokens,
    DryRun,
    Engine,
    EngineAlign,
    Eval,
    Flops,
    Force,
    KlWeight,
    LabelColumn,
    Latency,
    LatencyTableFile,
    MaxDrop,
    MemoryBudget,
    Model,
    Out,
    PairColumn,
    Paper,
    Params,
    Pool,
    Precision,
    PrepareOnly,
    ProfileOption,
    Samples,
    ScorerName,
    Seed,
    SeqLen,
    Size,
    Speedup,
    Task,
    TextColumn,
    Threads,
    Throughput,
    TimingCache,
    Tokens,
    WeightingName,
    Weights,
    Workspace_,
)
from optin_deploy.commands.parsing import (
    check_columns,
    check_plan_options,
    echo,
    engine_options,
    limits_of,
    refuse_idle,
    scoring_settings,
    size_of,
    warn_if_bundled,
)
from optin_deploy.errors import CannotBuildHere
from optin_deploy.reporting.terminal import print_report, stage_bar

EXPORT_EXAMPLES = """
Examples:

    optin-export sentence-transformers/all-MiniLM-L6-v2 --calibration articles.jsonl

    optin-export ./my-bert --flops 0.4 --at batch=1,seq=128 --at batch=32,seq=128 --threads 2

    optin-export ./my-bert --calibration texts.jsonl --latency 4.0ms --at batch=1,seq=128

    optin-export ./my-vit --calibration photos/ --engine trt --prepare-only

    optin-export model.onnx --calibration texts.jsonl --tokenizer ./my-tokenizer --flops 0.6

    optin-export model.onnx --calibration inputs.npz --at batch=1 --at batch=8
"""


def export(
    ctx: typer.Context,
    model: Model,
    task: Task = None,
    calibration: Calibration = None,
    text_column: TextColumn = "text",
    pair_column: PairColumn = "text_pair",
    label_column: LabelColumn = "label",
    seq_len: SeqLen = None,
    samples: Samples = 512,
    seed: Seed = 0,
    flops: Flops = None,
    params: Params = None,
    size: Size = None,
    max_drop: MaxDrop = None,
    latency: Latency = None,
    speedup: Speedup = None,
    throughput: Throughput = None,
    latency_table: LatencyTableFile = None,
    evaluation: Eval = None,
    align: EngineAlign = None,
    allocation: Allocation = "curves",
    tokens: Tokens = None,
    drop_tokens: DropTokens = False,
    scorer: ScorerName = "sketch",
    paper: Paper = False,
    weighting: WeightingName = DEFAULT_WEIGHTING,
    kl_weight: KlWeight = None,
    memory_budget: MemoryBudget = None,
    compensation: Compensation = True,
    engine: Engine = "onnx",
    precision: Precision = None,
    at: At = None,
    threads: Threads = 0,
    pool: Pool = None,
    dense: Dense = True,
    profile: ProfileOption = None,
    workspace: Workspace_ = None,
    timing_cache: TimingCache = None,
    compatible: Compatible = None,
    weights: Weights = "fixed",
    tokenizer: Tokenizer = None,
    preprocessor: Preprocessor = None,
    image_size: ImageSize = None,
    any_size: AnySize = False,
    mean: Mean = None,
    std: Std = None,
    units: Units = None,
    compared: Compared = None,
    shape: Shape = None,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    prepare_only: PrepareOnly = False,
) -> None:
    """Prune MODEL end to end: score, cut, compensate, export, prove, measure, report."""
    from optin_deploy.jobs.export import export_model
    from optin_deploy.jobs.request import Request, describe, ready
    from optin_deploy.jobs.workspace import Workspace
    from optin_deploy.measuring.points import Point, parse_points

    check_columns(ctx, calibration, evaluation)
    check_plan_options(ctx, engine)
    source = source_of(ctx.params)
    times = {"latency": latency, "speedup": speedup, "throughput": throughput}
    limits = limits_of(flops, params, size, max_drop, **times)  # type: ignore[arg-type]  # a dict of several types
    request = Request(
        source=source,
        limits=limits,
        engine=engine,
        precision=precision,
        align=align,
        allocation=allocation,
        tokens=tokens,
        scoring=scoring_settings(scorer, paper, weighting, kl_weight),
        memory_budget=size_of(memory_budget, "--memory-budget"),
        compensation=compensation,
        points=parse_points(at) or (Point(),),
        threads=threads,
        table=latency_table,
        pool=pool,
        options=engine_options(profile, workspace, timing_cache, compatible, weights),
        dense=dense,
    )
    if not dense:
        refuse_idle(ctx, "at", "threads", why="with --no-dense nothing is measured")
    folder = out or Path(f"{named(source)}-{limits}")
    if dry_run:
        Workspace.check(folder, source, force=force)
        asked = ready(request)
        name, _ = asked.target.file_names(asked.spec.precision or asked.target.precisions[0])
        echo(describe(asked.prepared, limits=limits, artifact=folder / name))
        return
    warn_if_bundled(calibration)
    try:
        with Workspace.at_work(folder, source, force=force):
            report = export_model(request, folder, force=force, stage=stage_bar)
    except CannotBuildHere as err:
        if not prepare_only:
            raise
        typer.echo(str(err))
        return
    print_report(report, folder)


def named(source: Any) -> str:
    """What output folders are called after."""
    name = Path(source.model).resolve().name if Path(source.model).exists() else source.model.split("/")[-1]
    return Path(name).stem if source.is_file else name
