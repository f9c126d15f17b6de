"""`optin-export` of ONNX files, and of checkpoints that no row of the table serves: the whole job on the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.networks import NETWORK, sizes_of
from optin_deploy.commands.parsing import echo, limits_of, refuse_idle, scoring_settings, size_of, warn_if_bundled
from optin_deploy.errors import BadInput
from optin_deploy.terminal import print_report, stage_bar

Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE|ID",
        help="Tokenizer of the calibration texts: folder, tokenizer.json or hub id. [default: beside the file]",
        rich_help_panel=NETWORK,
    ),
]
Preprocessor = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE|ID",
        help="How images are prepared: folder, preprocessor_config.json or hub id. [default: beside the file]",
        rich_help_panel=NETWORK,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE|HxW", help="Of images, where the network leaves it free.", rich_help_panel=NETWORK),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="M[,M,M]", help="Of channels: pixels become (pixel / 255 - mean) / std.", rich_help_panel=NETWORK
    ),
]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="Of channels.", rich_help_panel=NETWORK)]
Compared = Annotated[
    str | None,
    typer.Option(
        "--compare-output",
        metavar="NAME[:KIND]",
        help="Output that is compared, and as what: logits, probabilities, regression, embedding. [default: found]",
        rich_help_panel=NETWORK,
    ),
]
OF_MODELS = (
    *("task", "max_drop", "latency_table", "precision", "pool", "dense"),
    *("profile", "workspace", "timing_cache", "compatible", "weights", "prepare_only"),
)
"""Options of `optin-export` that only transformers models have a use for so far."""
OF_NETWORKS = ("tokenizer", "preprocessor", "image_size", "mean", "std", "units", "compared", "shape")
"""Those that they have none for."""


def is_file(model: str) -> bool:
    """Is this an ONNX file, as far as the name tells?"""
    return model.lower().endswith(".onnx")


def by_graph(model: str) -> bool:
    """Is this an ONNX file, or a transformers checkpoint of a type that no row of the table serves?"""
    if is_file(model):
        return True
    from optin_deploy.arch.resolve import supported_model_types
    from optin_deploy.checkpoint.config import model_type_of

    kind = model_type_of(model)
    return kind is not None and kind not in supported_model_types()


def export_by_graph(ctx: typer.Context, given: Mapping[str, Any]) -> None:
    """Do the job on the options of `optin-export`."""
    from exporters.network_job import Request, export_network
    from optin_deploy.data.feeds import Drawing, Preparation
    from optin_deploy.jobs.pruning import Recipe
    from optin_deploy.planning.widths import DEFAULT_ALIGN, DEFAULT_KINDS, Choice

    of_file = is_file(given["model"])
    refuse_idle(ctx, *OF_MODELS, why="models that are cut in their graph have no use for it yet")
    if of_file and given["calibration"] is None:
        raise BadInput(
            f"--calibration is missing: rows that {given['model']} is run on, as text (with --tokenizer), a folder of "
            "images, or .npz with its inputs by name. Without data: `optin plan FILE.onnx --magnitude`."
        )
    times = {name: given[name] for name in ("latency", "speedup", "throughput")}
    limits = limits_of(given["flops"], given["params"], given["size"], None, **times)
    output, kind = compared(given["compared"])
    settings = scoring_settings(given["scorer"], given["paper"], given["weighting"], given["kl_weight"])
    units = given["units"]
    request = Request(
        given["model"],
        given["calibration"],
        given["evaluation"],
        Preparation(
            given["tokenizer"],
            given["preprocessor"],
            pixels_of(given["mean"], given["std"]),
            image_size_of(given["image_size"]),
            given["seq_len"],
            text_column=given["text_column"],
            label_column=given["label_column"],
            pair_column=given["pair_column"],
        ),
        Drawing(given["samples"], seed=given["seed"]),
        Recipe(
            limits,
            Choice(
                DEFAULT_KINDS if units is None else tuple(kind.strip() for kind in units.split(",")),
                DEFAULT_ALIGN if given["align"] is None else given["align"],
                given["allocation"],
            ),
            settings,
            given["compensation"],
            output,
            kind,
        ),
        sizes_of(given["shape"]),
        given["engine"],
        batches_of(given["at"]),
        given["threads"],
        size_of(given["memory_budget"], "--memory-budget"),
    )
    warn_if_bundled(given["calibration"])
    name = Path(given["model"]).resolve().name if Path(given["model"]).exists() else given["model"].split("/")[-1]
    out = given["out"] or Path(f"{Path(name).stem if of_file else name}-{limits}")
    report = export_network(request, out, force=given["force"], dry_run=given["dry_run"], stage=stage_bar)
    if report is None:
        echo([f"would write {out}"])
    else:
        print_report(report, out)


def compared(text: str | None) -> tuple[str | None, Any]:
    """Name and kind of `--compare-output NAME:KIND`; either may be left out."""
    from optin_deploy.scoring.reading import KINDS

    if text is None:
        return None, None
    name, colon, kind = text.rpartition(":")
    if colon and kind in KINDS:
        return name or None, kind
    return text, None


def pixels_of(mean: str | None, std: str | None) -> Any:
    """How pixels are scaled; None: not said."""
    from optin_deploy.data.image_feeds import Pixels

    if mean is None and std is None:
        return None
    return Pixels(_numbers(mean or "0", "--mean"), _numbers(std or "1", "--std"))


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as err:
        raise BadInput(
            f"{option} {text!r}: give one number, or one for each channel, as in 0.485,0.456,0.406."
        ) from err


def image_size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width of `--image-size 224` or `320x48`.

    Raises: BadInput.
    """
    from optin_deploy.validation import whole_number

    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        raise BadInput(f"--image-size {text!r}: give one size, or height and width, as in 48x320.")
    height, width = (whole_number(int(part), "--image-size", 1) for part in (parts[0], parts[-1]))
    return height, width


def batches_of(at: Sequence[str] | None) -> tuple[int, ...]:
    """Rows at once of each `--at batch=N`.

    Raises: BadInput: a length is given, which the calibration rows have.
    """
    from exporters.bench.measuring import parse_points

    points = parse_points(at)
    if any(point.seq is not None for point in points):
        raise BadInput("--at seq=: ONNX files are measured on calibration rows; give --seq-len for their length.")
    return tuple(point.batch for point in points) or (1,)
