"""The options that commands share: each once, with its help and the panel it stands in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a transformers model, or an .onnx file.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of an earlier command.")]
FolderOrFile = Annotated[
    Path, typer.Argument(metavar="DIR|FILE.onnx", help="Output folder of an earlier command, or an ONNX file.")
]
Task = Annotated[str | None, typer.Option(help="transformers task; inferred from config.architectures.")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help=".txt, .jsonl, .csv, a folder of images, or .npz with inputs by name. Default: a small bundled set."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the text in .jsonl and .csv.")]
PairColumn = Annotated[
    str, typer.Option(help="Column of the second text, for models that take pairs; text_pair may be absent.")
]
LabelColumn = Annotated[str, typer.Option(help="Column of the label; labels are only used to report accuracy.")]
SeqLen = Annotated[
    int | None, typer.Option(help="Longest calibration text in tokens. [default: 128, or what the network takes]")
]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling and random projections.")]
BUDGET = "Budget: all that is given must hold"
Flops = Annotated[
    float | None,
    typer.Option(
        help="Share of the dense MACs to keep, in (0, 1]. [default: 0.6 without another budget]",
        rich_help_panel=BUDGET,
    ),
]
Params = Annotated[
    float | None, typer.Option(help="Share of the dense parameters to keep, in (0, 1].", rich_help_panel=BUDGET)
]
Size = Annotated[
    str | None,
    typer.Option(help="Most that all weights may take in float32, e.g. 60MiB.", rich_help_panel=BUDGET),
]
EngineAlign = Annotated[
    int | None, typer.Option(help="Neurons and channels in multiples of this. [default: the engine's: CPU 16, GPU 64]")
]
Allocation = Annotated[
    str,
    typer.Option(
        help="Where to cut: curves (least error after compensation), uniform (equal widths a layer) or paper (global "
        "ranking)."
    ),
]
Tokens = Annotated[
    float | None,
    typer.Option(
        help="Mean share of the tokens that stay, in (0, 1]: those of images that are alike are merged, block by "
        "block, those of texts dropped; widths get what is left of the budget. [default: all stay]"
    ),
]
DropTokens = Annotated[
    bool,
    typer.Option(
        "--drop-tokens", help="Tokens that go are dropped, not merged into those that are like them. Texts need it."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Points of the metric that may be lost: the smallest such model is found by bisection. Instead of a "
        "budget.",
        rich_help_panel=BUDGET,
    ),
]
Eval = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        help="Rows that judge the models, as --calibration takes them; nothing learns from them. [default: held-out "
        "calibration rows]",
    ),
]
SCORING = "Scoring"
ScorerName = Annotated[
    str, typer.Option(help="sketch (fast) or exact (one partial forward a unit).", rich_help_panel=SCORING)
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="With --scorer exact: FFN outputs of 768 tokens drawn across each batch, as in the authors' code.",
        rich_help_panel=SCORING,
    ),
]
WeightingName = Annotated[
    str,
    typer.Option(
        "--weighting",
        help="paper (all later layers add up), normalised (their mean) or output (only the model's output).",
        rich_help_panel=SCORING,
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        help="Memory that scoring may take beyond the model, e.g. 2GiB. [default: most of what is free]",
        rich_help_panel=SCORING,
    ),
]
KlWeight = Annotated[
    float | None,
    typer.Option(
        min=0, help="Weight of the output term. [default: a tenth of the trajectory term]", rich_help_panel=SCORING
    ),
]
Compensation = Annotated[bool, typer.Option(help="Re-solve the kept projections in closed form.")]
Engine = Annotated[
    str,
    typer.Option(
        help="onnx (ONNX Runtime) and openvino on CPU, ort-cuda, ort-trt, torch, torch-compile, aoti, trt or trt-rtx."
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="fp32, fp16, bf16 or int8; trt also tf32. [default: fp32; for trt fp16]")
]
TENSORRT, MANY = "TensorRT", "Many processes"
ProfileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="SIZES",
        help="min, opt and max sizes of the engine: batch=1,8,32 seq=16,128,512 (the default); repeatable.",
        rich_help_panel=TENSORRT,
    ),
]
Workspace_ = Annotated[
    str | None, typer.Option("--workspace", help="Scratch memory of kernels, e.g. 4GiB.", rich_help_panel=TENSORRT)
]
TimingCache = Annotated[
    Path | None,
    typer.Option(help="File of measured kernel times, reused by later builds.", rich_help_panel=TENSORRT),
]
Compatible = Annotated[
    list[str] | None,
    typer.Option(help="version (loads in later ones) or hardware (any GPU from Ampere on).", rich_help_panel=TENSORRT),
]
Weights = Annotated[
    str, typer.Option(help="fixed, refittable, or stripped (put in from the ONNX at load).", rich_help_panel=TENSORRT)
]
TIME = "Budget in time"
Latency = Annotated[
    str | None,
    typer.Option(help="Longest time of a batch at the first --at, measured: 4.0ms.", rich_help_panel=TIME),
]
Speedup = Annotated[
    float | None, typer.Option(help="How much faster than the dense model at the first --at.", rich_help_panel=TIME)
]
Throughput = Annotated[
    float | None, typer.Option(help="Least samples a second at the first --at.", rich_help_panel=TIME)
]
LatencyTableFile = Annotated[
    Path | None,
    typer.Option(
        "--latency-table",
        help="Written by optin profile for this model and engine. [default: measured, kept in the output folder]",
        rich_help_panel=TIME,
    ),
]
At = Annotated[
    list[str] | None, typer.Option(help="Point to measure at, e.g. batch=8,seq=128; repeatable. [default: batch=1]")
]
Memory = Annotated[bool, typer.Option("--memory", help="Measure peak memory too, in fresh processes.")]
DeviceTime = Annotated[
    bool,
    typer.Option(
        "--device-time",
        help="trt and trt-rtx: measure the time on the GPU too, without transfers, with and without a CUDA graph.",
    ),
]
Operators = Annotated[
    bool,
    typer.Option("--operators", help="Profile by operator and by layer too, and say what holds the rest of the time."),
]
LOADGEN = "MLCommons LoadGen"
Protocol = Annotated[
    str,
    typer.Option(
        help="interleaved (our own, with confidence intervals) or mlperf (LoadGen's scenarios).",
        rich_help_panel=LOADGEN,
    ),
]
Scenario = Annotated[
    str | None,
    typer.Option(help="single-stream, offline or server. [default: single-stream]", rich_help_panel=LOADGEN),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Least duration of each of the four runs; MLPerf's own rules ask for 600. [default: 10]",
        rich_help_panel=LOADGEN,
    ),
]
Qps = Annotated[float | None, typer.Option(help="Server: queries a second, Poisson arrivals.", rich_help_panel=LOADGEN)]
TargetLatency = Annotated[
    float | None,
    typer.Option(help="Server: milliseconds that 99% of the queries must keep.", rich_help_panel=LOADGEN),
]
SuiteFile = Annotated[
    Path | None,
    typer.Option(
        "--suite",
        help="TOML file of lists: engines, precisions, threads, batch, seq. Every combination is measured.",
    ),
]
Threads = Annotated[int, typer.Option(help="Threads of the engine; 0 = its default.")]
Pool = Annotated[
    str | None,
    typer.Option(help="mean or cls, as the model pools: add output sentence_embedding."),
]
Dense = Annotated[bool, typer.Option("--dense/--no-dense", help="Also export and measure the dense model.")]
Out = Annotated[Path | None, typer.Option(help="Output folder. [default: ./MODEL-BUDGET]")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Write also where optin-deploy did not make what is there; files in the way are kept as NAME.kept1.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would be done, write nothing.")]
PrepareOnly = Annotated[bool, typer.Option("--prepare-only", help="Exit 0 if only the engine build is left to do.")]

DEFAULT_WEIGHTING = "paper"
