"""The command line: parse, call one function, print, give an exit code of errors.EXIT_CODES."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.errors import EXIT_CODES, BadInput, CannotBuildHere, OptinError
from optin_deploy.options import (
    DEFAULT_WEIGHTING,
    MANY,
    SCORING,
    Align,
    Allocation,
    At,
    Calibration,
    Compatible,
    Compensation,
    Dense,
    DryRun,
    Engine,
    EngineAlign,
    Eval,
    Flops,
    Folder,
    Force,
    KlWeight,
    LabelColumn,
    MaxDrop,
    MemoryBudget,
    Model,
    Out,
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
    Task,
    TextColumn,
    Threads,
    TimingCache,
    WeightingName,
    Weights,
    Workspace_,
)
from optin_deploy.progress import silent
from optin_deploy.terminal import print_plan, print_report, print_table, quiet_libraries, stage_bar, warn

app = typer.Typer(
    name="optin",
    help="Make a trained transformer physically smaller and measurably faster, with no retraining.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

INTERRUPTED = 130
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""Base of all errors of the command line itself; typer brings its own copy of click or uses the installed one."""

EXPORT_EXAMPLES = """
Examples:

    optin-export sentence-transformers/all-MiniLM-L6-v2 --calibration articles.jsonl

    optin-export ./my-bert --flops 0.4 --at batch=1,seq=128 --at batch=32,seq=128 --threads 2

    optin-export ./my-vit --calibration photos/ --engine trt --prepare-only
"""


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    model: Model,
    task: Task = None,
    calibration: Calibration = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    seq_len: SeqLen = 128,
    samples: Samples = 512,
    seed: Seed = 0,
    flops: Flops = None,
    params: Params = None,
    size: Size = None,
    max_drop: MaxDrop = None,
    evaluation: Eval = None,
    align: EngineAlign = None,
    allocation: Allocation = "uniform",
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
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    prepare_only: PrepareOnly = False,
) -> None:
    """Prune MODEL end to end: score, cut, compensate, export, prove, measure, report."""
    from exporters.job import describe, export_model, ready
    from exporters.measuring import Point, parse_point
    from optin_deploy.workspace import Source, Workspace

    data = None if calibration is None else str(calibration.absolute())
    source = _judged_by(
        Source(_absolute(model), task, data, text_column, label_column, seq_len, samples, seed), evaluation
    )
    limits = _limits(flops, params, size, max_drop)
    folder = out or Path(f"{Path(model).resolve().name if Path(model).exists() else model.split('/')[-1]}-{limits}")
    options: dict[str, Any] = {
        "limits": limits,
        "engine": engine,
        "precision": precision,
        "align": align,
        "allocation": allocation,
        "points": [parse_point(text) for text in at] if at else [Point()],
        "threads": threads,
        "pool": pool,
        "options": _engine_options(profile, workspace, timing_cache, compatible, weights),
    }
    scoring, scoring_bytes = _scoring(scorer, paper, weighting, kl_weight), _size(memory_budget, "--memory-budget")
    if dry_run:
        Workspace.check(folder, source, force=force)
        target, spec, prepared = ready(source, **options)
        name, _ = target.file_names(spec.precision or target.precisions[0])
        _echo(describe(prepared, limits=limits, artifact=folder / name))
        return
    _warn_if_bundled(calibration)
    try:
        report = export_model(
            source,
            folder,
            **options,
            scoring=scoring,
            memory_budget=scoring_bytes,
            compensation=compensation,
            dense=dense,
            force=force,
            stage=stage_bar,
        )
    except CannotBuildHere as err:
        if not prepare_only:
            raise
        typer.echo(str(err))
        return
    print_report(report, folder)


SCORE_EXAMPLES = """
Examples:

    optin score ./my-bert --calibration texts.txt --out work

    torchrun --nproc-per-node=4 --max-restarts=3 -m optin_deploy score ./my-bert --calibration texts.txt --out work

    optin score ./my-bert --calibration texts.txt --out /shared/work --shard 2/8
"""


@app.command(epilog=SCORE_EXAMPLES)
def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder.")],
    task: Task = None,
    calibration: Calibration = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    seq_len: SeqLen = 128,
    samples: Samples = 512,
    seed: Seed = 0,
    scorer: ScorerName = "sketch",
    paper: Paper = False,
    weighting: WeightingName = DEFAULT_WEIGHTING,
    kl_weight: KlWeight = None,
    features: Annotated[
        str, typer.Option(help="What is compared: block (outputs of blocks) or ffn.", rich_help_panel=SCORING)
    ] = "block",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens drawn from each sample. [default: all]", rich_help_panel=SCORING)
    ] = None,
    probes: Annotated[
        int | None,
        typer.Option(
            help="Random projections a sample. [default: until the ranking is stable]", rich_help_panel=SCORING
        ),
    ] = None,
    memory_budget: MemoryBudget = None,
    shard: Annotated[
        str | None, typer.Option(metavar="i/N", help="Do only this share of the work.", rich_help_panel=MANY)
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Run N workers on the Ray cluster of RAY_ADDRESS, or here.", rich_help_panel=MANY
        ),
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Score every head and neuron of MODEL; writes scores.safetensors and scores.json.

    Run it as often as you like on the same --out, on one machine or on many that share the folder: finished parts are
    skipped, and whoever finds all of them finished writes the scores. Under torchrun each process takes a share, and
    takes over what a killed one left.
    """
    from exporters.job import describe
    from optin_deploy.budget import Limits
    from optin_deploy.scoring.parts import PartsLeft, worker_of
    from optin_deploy.stages import ScoreRequest, prepare
    from optin_deploy.workspace import Source, Workspace

    data = None if calibration is None else str(calibration.absolute())
    source = Source(_absolute(model), task, data, text_column, label_column, seq_len, samples, seed)
    settings = _scoring(scorer, paper, weighting, kl_weight, features, tokens, probes)
    request = ScoreRequest(source, out.absolute(), settings, _size(memory_budget, "--memory-budget"), force)
    worker = worker_of(shard, os.environ)
    Workspace.check(out, source, force=force)
    if dry_run:
        _echo(describe(prepare(source), limits=Limits(flops=1.0), artifact=out / "scores.safetensors"))
        return
    first = worker.index == 0 or shard is not None
    if first:
        _warn_if_bundled(calibration)
    try:
        with stage_bar("score") if first else nullcontext(silent) as progress:
            if ray is None:
                reused = request.run(worker, progress)
            else:
                from optin_deploy.cluster import score_on_ray

                reused = score_on_ray(request, ray)
    except PartsLeft as left:
        typer.echo(str(left))
        return
    if first:
        typer.echo(f"{'Found finished' if reused else 'Wrote'} {out / 'scores.safetensors'}. Next: optin plan {out}")


@app.command(
    epilog="Examples:\n\n    optin plan work --flops 0.5 --align 64\n\n    optin plan work --params 0.6 --size 60MiB"
    "\n\n    optin plan work --allocation curves"
)
def plan(
    folder: Folder,
    flops: Flops = None,
    params: Params = None,
    size: Size = None,
    max_drop: MaxDrop = None,
    evaluation: Eval = None,
    align: Align = 16,
    allocation: Allocation = "uniform",
    compensation: Compensation = True,
    dry_run: DryRun = False,
) -> None:
    """Choose what to keep under a budget; writes masks.json and plan.json from the scores in DIR."""
    from optin_deploy.search import check_search
    from optin_deploy.stages import plan_stage, prepare
    from optin_deploy.sweep import planned
    from optin_deploy.workspace import Workspace

    workspace, limits = Workspace(folder), _limits(flops, params, size, max_drop)
    check_search(align, allocation)
    if dry_run and max_drop is not None:
        typer.echo(
            f"would try models within smaller and smaller budgets, until one loses more than {max_drop:g} points"
        )
        return
    if dry_run or (allocation != "curves" and max_drop is None):  # no model is needed
        found = plan_stage(workspace, limits, align=align, allocation=allocation, write=not dry_run)
    else:
        prepared = prepare(_judged_by(workspace.source(), evaluation))
        limits.within(prepared.cost, prepared.params)  # what is impossible is refused before the long work
        how: Any = {"align": align, "allocation": allocation, "compensation": compensation}
        found = planned(workspace, prepared, limits, **how, stage=stage_bar)
    print_plan(found)
    if not dry_run:
        typer.echo(f"Wrote {folder / 'plan.json'}. Next: optin rewrite {folder}")


@app.command(
    epilog="Examples:\n\n    optin sweep work\n\n    optin sweep work --eval test.jsonl --flops 0.8,0.6,0.4 "
    "--allocation curves"
)
def sweep(
    folder: Folder,
    flops: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Shares of the dense MACs. [default: 0.9,0.8,...,0.3]")
    ] = None,
    evaluation: Eval = None,
    align: Align = 16,
    allocation: Allocation = "uniform",
    compensation: Compensation = True,
    dry_run: DryRun = False,
) -> None:
    """Make a model at each of many budgets and judge it; writes sweep.csv, sweep.png and sweep.json.

    Models that sweep.json already holds are not made again.
    """
    from optin_deploy.search import check_search
    from optin_deploy.stages import prepare
    from optin_deploy.sweep import HEADER, parse_shares
    from optin_deploy.sweep import sweep as sweep_folder
    from optin_deploy.workspace import Workspace

    workspace, shares = Workspace(folder), parse_shares(flops)
    check_search(align, allocation)
    source = _judged_by(workspace.source(), evaluation)
    if dry_run:
        typer.echo(f"would make and judge {len(shares)} models")
        return
    how: Any = {"align": align, "allocation": allocation, "compensation": compensation}
    points = sweep_folder(workspace, prepare(source), shares, **how, stage=stage_bar)
    print_table(HEADER, [point.row for point in points])
    typer.echo(f"Wrote {folder / 'sweep.csv'} and {folder / 'sweep.png'}.")


@app.command(epilog="Example:\n\n    optin rewrite work")
def rewrite(folder: Folder, compensation: Compensation = True, dry_run: DryRun = False) -> None:
    """Cut and compensate by the plan in DIR; writes model/, a smaller transformers model."""
    from optin_deploy.stages import prepare, rewrite_stage
    from optin_deploy.workspace import Workspace

    workspace = Workspace(folder)
    chosen = workspace.read_plan()
    prepared = prepare(workspace.source())
    chosen.check(prepared.layout)
    if dry_run:
        print_plan(chosen)
        return
    with stage_bar("rewrite") as progress:
        pruned, reused = rewrite_stage(workspace, prepared, compensation=compensation, progress=progress)
    params = pruned.report["params"]
    typer.echo(
        f"{'Found finished' if reused else 'Wrote'} {workspace.model_folder}: {params['dense']:,} -> "
        f"{params['pruned']:,} parameters. Next: optin build {folder}"
    )


@app.command(epilog="Examples:\n\n    optin build work --engine onnx\n\n    optin build work --engine trt")
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

    options = _engine_options(profile, workspace, timing_cache, compatible, weights)
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


@app.command(epilog="Example:\n\n    optin bench work --at batch=1,seq=128 --at batch=8,seq=128 --threads 2")
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
    from optin_deploy.bench.report import LATENCY_HEADER, latency_rows

    points = [parse_point(text) for text in at] if at else [Point()]
    measured = bench_folder(
        folder, engine=engine, precision=precision, points=points, threads=threads, dry_run=dry_run, stage=stage_bar
    )
    if dry_run:
        typer.echo(f"would measure {len(points)} points on engine {engine}")
        return
    print_table(LATENCY_HEADER, latency_rows(measured))


@app.command(epilog="Examples:\n\n    optin show work\n\n    optin show scores work")
def show(
    what: Annotated[
        str, typer.Argument(metavar="DIR|scores", help="Output folder of an earlier command, or scores and the folder.")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Whose scores; left out: of the current folder.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Print the plan and the report in DIR; with `scores` the scores, which are also drawn into DIR/scores.png."""
    from optin_deploy.workspace import Workspace

    scores_wanted, root = _scores_wanted(what, folder)
    workspace = Workspace(root)
    source = workspace.source()
    typer.echo(f"{source.model}, calibrated on {source.calibration or 'the bundled set'}")
    if scores_wanted:
        _show_scores(workspace, write=not dry_run)
        return
    if (root / "scores.json").is_file() and not (root / "plan.json").exists():
        from optin_deploy.score_table import print_provenance

        print_provenance(workspace.read_scores()[0])
        typer.echo(f"No plan yet. Next: optin plan {root}, or optin show scores {root}")
        return
    print_plan(workspace.read_plan())
    report = root / "report.md"
    if report.is_file():
        typer.echo(report.read_text(encoding="utf-8"))


@app.command(epilog="Examples:\n\n    optin doctor\n\n    optin doctor work\n\n    optin doctor model.onnx --json")
def doctor(
    target: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Output folder or .onnx file. Without it: this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what will not work on this machine, or with the ONNX files in DIR, and what to do; exit code 1 if any."""
    from exporters.doctor import diagnose

    found = diagnose(target)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        for title, header, rows in found.tables():
            print_table(header, rows, title)
        typer.echo(found.summary)
    if found.has_problem:
        raise typer.Exit(1)


def main() -> None:
    """Entry point `optin`."""
    sys.exit(_run(app))


def export_main() -> None:
    """Entry point `optin-export`, the same as `optin export`."""
    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    alone.command(name="optin-export", epilog=EXPORT_EXAMPLES, no_args_is_help=True)(export)
    sys.exit(_run(alone))


def _run(program: Callable[..., object]) -> int:
    """Run a typer app; errors of ours become one line and their exit code."""
    quiet_libraries()
    try:
        code = program(_joined(sys.argv[1:]), standalone_mode=False)
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code themselves
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except OptinError as err:
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(str(err), err=True)
        return err.exit_code
    except USAGE_ERROR as err:
        err.show()
        return int(err.exit_code)
    except OSError as err:
        typer.echo(f"error: {err}. Check the path, its permissions and the free space.", err=True)
        return BadInput.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; finished stages are kept, run the same command again to go on", err=True)
        return INTERRUPTED


def _scores_wanted(what: str, folder: Path | None) -> tuple[bool, Path]:
    """Scores or plan, and of which folder: `show DIR`, `show scores DIR`, or `show scores` of the current folder."""
    if folder is None and Path(what).is_dir():
        return False, Path(what)
    if what == "scores":
        return True, folder or Path()
    wrong = f"cannot show {what!r} of {folder}" if folder else f"{what} is not an output folder"
    raise BadInput(f"{wrong}; possible: optin show DIR, optin show scores DIR.")


def _show_scores(workspace: Any, *, write: bool) -> None:
    from optin_deploy.pictures import draw_scores
    from optin_deploy.score_table import print_scores

    scores = workspace.read_scores()[0]
    print_scores(scores)
    picture = workspace.root / "scores.png"
    if write:
        draw_scores(scores, picture)
    typer.echo(f"{'Wrote' if write else 'would write'} {picture}")


def _engine_options(
    profiles: Sequence[str] | None,
    workspace: str | None,
    timing_cache: Path | None,
    compatible: Sequence[str] | None,
    weights: str,
) -> Any:
    from exporters.profiles import Profile, parse_profile
    from exporters.tensorrt_plan import EngineOptions

    return EngineOptions(
        profiles=tuple(map(parse_profile, profiles)) if profiles else (Profile(),),
        workspace_bytes=_size(workspace, "--workspace"),
        compatible=tuple(compatible or ()),
        weights=weights,
        timing_cache=None if timing_cache is None else timing_cache.absolute(),
    )


def _scoring(
    scorer: str,
    paper: bool,
    weighting: str,
    kl_weight: float | None,
    features: str = "block",
    tokens: int | None = None,
    probes: int | None = None,
) -> Any:
    from optin_deploy.scoring import PAPER, Features, ScoreSettings

    chosen = PAPER if paper else Features(features, tokens)  # type: ignore[arg-type]  # it checks the name itself
    return ScoreSettings(scorer, weighting, kl_weight, chosen, probes)  # type: ignore[arg-type]


def _limits(flops: float | None, params: float | None, size: str | None, max_drop: float | None) -> Any:
    from optin_deploy.budget import Limits

    return Limits(flops, params, _size(size, "--size"), max_drop)


def _judged_by(source: Any, evaluation: Path | None) -> Any:
    return source if evaluation is None else replace(source, evaluation=str(evaluation.absolute()))


def _size(text: str | None, option: str) -> int | None:
    from optin_deploy.validation import parse_size

    return None if text is None else parse_size(text, option)


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--profile batch=1,8,32 seq=16,128,384` as one value, so that people need not quote it."""
    joined: list[str] = []
    for argument in arguments:
        of_profile = len(joined) > 1 and joined[-2] == "--profile"
        if of_profile and argument.startswith(("batch=", "seq=")):
            joined[-1] += f" {argument}"
        else:
            joined.append(argument)
    return joined


def _absolute(model: str) -> str:
    """A folder by its full path, so that later commands find it from anywhere; a hub id as it is."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def _warn_if_bundled(calibration: Path | None) -> None:
    if calibration is None:
        warn("no --calibration given: using the small bundled set. Accuracy needs your own data.")


def _echo(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(line)
