"""`optin ship` and `serve-check`: artifacts into an inference server's repository, and what the server answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_deploy.commands.options import DryRun, Engine, Writing
from optin_deploy.commands.parsing import refuse_idle
from optin_deploy.commands.values import options
from optin_deploy.common.formatting import size
from optin_deploy.common.validation import holds, positive_number, seed_of, whole_number
from optin_deploy.errors import BadInput, ParityFailure
from optin_deploy.files.ownership import free_name
from optin_deploy.measuring.points import BLOCKS
from optin_deploy.reporting.terminal import print_table, stage_bar
from optin_deploy.serving.manifest import ServingOptions
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.server_load import TIMEOUT_SECONDS, ServerLoad

SHIP_EXAMPLES = """
Examples:

    optin ship work --server triton --out repository --name minilm

    optin ship work --server triton --out repository --name minilm --text --too-long refuse

    optin ship work --server ovms --out repository --engine openvino --dense none

    optin ship work --server kserve --out repository --storage-uri pvc://models/repository --canary 10

    optin ship --rollback --out repository --name minilm
"""


@dataclass(frozen=True)
class RepositoryOptions:
    """The repository that artifacts are published to."""

    server: Annotated[str, typer.Option(help="triton, ovms, mlserver or kserve.")] = "triton"
    out: Annotated[Path, typer.Option(metavar="REPO", help="The server's model repository.")] = Path("repository")
    name: Annotated[str | None, typer.Option(help="Of the served model. [default: DIR's name]")] = None
    version: Annotated[
        int | None,
        typer.Option(
            help="Number of the new version, or what --rollback goes to. [default: the next, or the one before]"
        ),
    ] = None
    rollback: Annotated[bool, typer.Option("--rollback", help="Serve the version before again.")] = False
    dry_run: DryRun = False


@dataclass(frozen=True)
class Settings:
    """How the server runs each model."""

    dense: Annotated[
        str, typer.Option(help="Serve the dense model beside it: as one of two `models` or `versions`, or `none`.")
    ] = ShipOrder.dense
    max_batch: Annotated[int, typer.Option(help="Samples that are run at once, at most.")] = ServingOptions.max_batch
    preferred: Annotated[
        str | None,
        typer.Option(metavar="8,16", help="Batches that the server forms. [default: the best of report.json]"),
    ] = None
    queue_delay: Annotated[
        int, typer.Option(metavar="MICROSECONDS", help="How long a request may wait for others to join it.")
    ] = ServingOptions.queue_delay_us
    instances: Annotated[int, typer.Option(help="Copies of each model that run at the same time.")] = (
        ServingOptions.instances
    )
    threads: Annotated[
        int | None,
        typer.Option(
            help="Intra-op threads of a copy. [default: on CPUs this machine's, divided by --instances; for kserve 1]"
        ),
    ] = None
    text: Annotated[bool, typer.Option("--text", help="Also serve a model that takes texts (triton, kserve).")] = False
    longest: Annotated[
        int | None, typer.Option(help="Tokens of a text at most, with --text. [default: the calibration length]")
    ] = None
    too_long: Annotated[str, typer.Option(help="`truncate` or `refuse` a longer text.")] = ServingOptions.too_long
    storage_uri: Annotated[str | None, typer.Option(help="Where KServe will find REPO, e.g. s3://bucket/repo.")] = None
    canary: Annotated[int | None, typer.Option(help="Percent of KServe's traffic for this version.")] = None


@options
def ship(
    ctx: typer.Context,
    place: RepositoryOptions,
    engine: Engine,
    settings: Settings,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Output folder of `optin export` or `build`; none with --rollback."),
    ] = None,
) -> None:
    """Publish the artifacts in DIR to an inference server: a new version, whole, and never over an old one."""
    from optin_deploy.serving.shipments import default_name
    from optin_deploy.serving.shipping import roll_back, ship_folder

    out, dry_run = place.out, place.dry_run
    if place.rollback:
        idle = [each.name or "" for each in ctx.command.params if each.name not in OF_ROLLBACK]
        refuse_idle(ctx, *idle, why="--rollback serves a version as it was published")
        if folder is not None or place.name is None:
            raise BadInput("--rollback goes back to a published version: leave out DIR, and give --name and --out.")
        served = roll_back(out, place.name, place.version, dry_run=dry_run)
        _say(served, out, "would serve" if dry_run else "Serving again")
        return
    if folder is None:
        raise BadInput("DIR is missing: give an output folder of `optin export`, or --rollback.")
    _refuse_unheard(ctx, place.server, settings)
    threads = settings.threads
    asked = ServingOptions(
        max_batch=settings.max_batch,
        preferred=_numbers(settings.preferred, "--preferred", "8,16"),
        queue_delay_us=settings.queue_delay,
        instances=settings.instances,
        threads=_threads(engine.engine, place.server, settings.instances) if threads is None else threads,
        longest=settings.longest,
        too_long=settings.too_long,
        storage_uri=settings.storage_uri,
        canary=settings.canary,
    )
    order = ShipOrder(
        server=place.server,
        out=out,
        name=place.name or default_name(folder),
        version=place.version,
        engine=engine.engine,
        precision=engine.precision,
        dense=settings.dense,
        text=settings.text,
        options=asked,
    )
    served, new = ship_folder(folder, order, dry_run=dry_run)
    _say(served, out, "would publish" if dry_run else "Published" if new else "Nothing new: serving")


def _refuse_unheard(ctx: typer.Context, server: str, settings: Settings) -> None:
    """Refuse settings that would not be heard.

    Raises: BadInput.
    """
    from optin_deploy.serving import server as known_server

    if not settings.text:
        refuse_idle(ctx, "longest", "too_long", why="only a model of --text cuts texts")
    refuse_idle(ctx, *known_server(server).unheard, why=f"--server {server} has no such setting")


ON_CPU = ("onnx", "openvino")
"""Engines that servers run with threads."""
OF_ROLLBACK = ("ctx", "folder", "out", "name", "version", "rollback", "dry_run")


CHECK_EXAMPLES = """
Examples:

    optin serve-check repository --url http://127.0.0.1:8000

    optin serve-check repository --url grpc://127.0.0.1:8001 --concurrency 1,4,16 --batch 8 --out served.json

    optin serve-check repository --url grpc://127.0.0.1:8001 --model minilm --no-latency
"""

MOST_CLIENTS = 1024


@dataclass(frozen=True)
class LoadOptions:
    """The load under which latency is measured."""

    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Measure it from the client's side.")] = True
    concurrency: Annotated[
        str, typer.Option(metavar="1,4,16", help="Clients that ask at the same time, one number after the other.")
    ] = ",".join(map(str, ServerLoad.concurrencies))
    batch: Annotated[int, typer.Option(help="Samples a request, where latency is measured.")] = ServerLoad.batch
    seconds: Annotated[
        float, typer.Option(help=f"Of load on each model in each of {BLOCKS} blocks, at each concurrency.")
    ] = ServerLoad.seconds
    seed: Annotated[int, typer.Option(help="Draws the order within the blocks.")] = ServerLoad.seed

    def clients(self) -> tuple[int, ...]:
        """Return how many clients ask at the same time, checked as all of it is."""
        clients = _numbers(self.concurrency, "--concurrency", "1,4,16") if self.latency else ()
        for each in clients:
            whole_number(each, "--concurrency", 1, MOST_CLIENTS, "Each client is a thread with a connection.")
        whole_number(self.batch, "--batch", 1, 65536)
        seed_of(self.seed)
        positive_number(self.seconds, "--seconds", 3600)
        return clients


@options
def serve_check(
    ctx: typer.Context,
    repository: Annotated[
        Path, typer.Argument(metavar="REPO", help="Repository of `optin ship`, as the server has it.")
    ],
    load: LoadOptions,
    writing: Writing,
    url: Annotated[str, typer.Option(help="http://host:port or grpc://host:port.")] = "http://127.0.0.1:8000",
    model: Annotated[list[str] | None, typer.Option(help="Only this model; repeatable. [default: all]")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that any answer may take.")] = TIMEOUT_SECONDS,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything, raw latencies too (JSON).")
    ] = None,
) -> None:
    """Compare a server's answers with the published artifacts, and dense with pruned under load, interleaved.

    Exit code 1 if names, types, shapes or outputs differ, or the server does not answer.
    """
    from optin_deploy.files.storage import write_json
    from optin_deploy.serving.check_result import LOAD_HEADER, label
    from optin_deploy.serving.checking import check_server

    if not load.latency:
        refuse_idle(ctx, "concurrency", "batch", "seconds", "seed", why="with --no-latency nothing is measured")
    clients = load.clients()
    positive_number(timeout, "--timeout", 86_400)
    if out is not None:
        free_name(out, _is_check, force=writing.force, dry_run=True)
    if writing.dry_run:
        typer.echo(f"would check {', '.join(model or ('all models',))} of {repository} on {url}, clients: {clients}")
        return
    found = check_server(
        repository,
        url,
        names=model or (),
        timeout=timeout,
        load=ServerLoad(clients, load.batch, load.seconds, seed=load.seed),
        stage=stage_bar,
    )
    header = ("model", "role", "requests", "largest error", "compared with")
    rows = [
        (label(each.manifest), each.manifest.role, str(each.requests), f"{each.largest_error:.2g}", each.compared_with)
        for each in found.checked
    ]
    print_table(header, rows, url)
    if found.load:
        print_table(LOAD_HEADER, found.load_rows(), f"closed loop, batch {load.batch}")
    if out is not None:
        free_name(out, _is_check, force=writing.force)
        write_json(out, found.to_json())
    if found.problems:
        raise ParityFailure(" ".join(f"{problem}." for problem in found.problems))


def _is_check(file: Path) -> bool:

    return holds(file, "schema_version", "settings", "environment", "models", "load")


def _threads(engine: str, server: str, instances: int) -> int | None:
    """Left to itself, a server in a container would start a thread for every core of its host."""
    from optin_deploy.common.processors import default_threads

    if engine not in ON_CPU:
        return None
    return 1 if server == "kserve" else max(1, default_threads() // max(1, instances))


def _numbers(text: str | None, option: str, example: str) -> tuple[int, ...]:
    """Numbers of `8,16`, rising."""
    try:
        return () if text is None else tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError as err:
        raise BadInput(f"{option} {text!r}: give numbers such as {example}.") from err


def _say(served: Any, out: Path, did: str) -> None:
    header = ("model", "version", "role", "file", "size", "sha256")
    rows = [
        (
            each.name,
            str(each.version),
            each.role,
            each.file or "-",
            size(each.size_bytes) if each.size_bytes else "-",
            each.sha256.get(each.file, "-")[:12],
        )
        for each in served
    ]
    print_table(header, rows, f"{did} in {out}")
