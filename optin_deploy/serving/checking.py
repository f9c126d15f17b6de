"""`optin serve-check`: does a server give what the published artifacts give, and what does it gain?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import BadInput
from optin_deploy.exporters import exporter
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.files.storage import read_tensors
from optin_deploy.jobs.proving import relative_error
from optin_deploy.runtimes.base import Feeds
from optin_deploy.serving.check_result import Checked, ServeCheck, ServedPair, label
from optin_deploy.serving.client import ServedClient, connect
from optin_deploy.serving.load import Ask, measure_load
from optin_deploy.serving.manifest import Manifest, TensorSpec, check_files
from optin_deploy.serving.repository import Repository
from optin_deploy.serving.server_load import TIMEOUT_SECONDS, ServerLoad
from optin_deploy.serving.shipments import SAMPLES

ANY = -1
"""A size that is open."""
SAME_FILE = 2e-2
"""Most that two machines may differ in running one file; of int8, whose own loss is no matter here, too."""


def check_server(
    root: Path,
    url: str,
    *,
    names: Sequence[str] = (),
    timeout: float = TIMEOUT_SECONDS,
    load: ServerLoad = ServerLoad(),  # noqa: B008  # frozen
    stage: Stage = silent_stage,
) -> ServeCheck:
    """Compare a server with the repository that it is to serve.

    Args:
        names: models; default: all dense and pruned ones. timeout: seconds for any answer.
    Raises: BadInput. ServerFault: no server, or one that does not answer as the protocol says.
    """
    repository = Repository(root)
    manifests = _chosen(repository, names)
    rows = {label(each): _recorded(repository, each) for each in manifests}
    with connect(url, timeout) as client:
        checked = []
        for manifest in manifests:
            with stage(f"check {label(manifest)}"):
                checked.append(_checked(repository, manifest, client, rows[label(manifest)][0]))
    found = []
    for pair in _pairs(manifests) if load.concurrencies and not any(each.problems for each in checked) else ():
        both = {label(each): each for each in (pair.dense, pair.pruned) if each is not None}
        with stage(f"load {label(pair.pruned)}"), ExitStack() as connections:
            askers = {
                name: partial(_asker, connections, url, timeout, repository, each, _cut(rows[name][0], load.batch))
                for name, each in both.items()
            }
            points = measure_load(askers, load.concurrencies, seconds=load.seconds, blocks=load.blocks, seed=load.seed)
        found.append((pair, points))
    settings = {name: value for name, value in asdict(load).items() if name != "concurrencies"}
    return ServeCheck(tuple(checked), tuple(found), {"url": url, **settings, "timeout": timeout})


def _chosen(repository: Repository, names: Sequence[str]) -> list[Manifest]:
    """Served versions of the asked models, their files verified."""
    known = repository.names()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadInput(f"--model {unknown[0]}: not in {repository.root}; there are: {', '.join(known) or 'none'}.")
    found = [each for name in names or known for each in repository.served(name) if each.role in ("dense", "pruned")]
    if not found:
        raise BadInput(f"{repository.root} serves no dense or pruned model. Publish one with `optin ship`.")
    for manifest in found:
        check_files(repository.folder(manifest.name, manifest.version), manifest)
    return found


def _recorded(repository: Repository, manifest: Manifest) -> tuple[Feeds, np.ndarray]:
    """Recorded inputs, and what the torch model gave."""
    path = repository.folder(manifest.name, manifest.version) / SAMPLES
    tensors = read_tensors(path, "Publish the version anew.")
    inputs = {tensor.name: tensors.get(f"input.{tensor.name}") for tensor in manifest.inputs}
    absent = [name for name, values in inputs.items() if values is None]
    if absent or "output" not in tensors:
        raise BadInput(f"{path} holds no rows of {', '.join(absent) or 'the output'}. Publish the version anew.")
    feeds = {name: values.numpy() for name, values in inputs.items() if values is not None}
    return feeds, tensors["output"].numpy()


def _version(repository: Repository, manifest: Manifest) -> str:
    """The version to ask for; MLServer serves one, without a number."""
    return "" if repository.state(manifest.name).server == "mlserver" else str(manifest.version)


def _cut(feeds: Feeds, batch: int) -> Feeds:
    """A request of so many samples, the recorded ones over and over."""
    return {name: np.resize(values, (batch, *values.shape[1:])) for name, values in feeds.items()}


def _asker(
    connections: ExitStack, url: str, timeout: float, repository: Repository, manifest: Manifest, feeds: Feeds
) -> Ask:
    """A client with a connection of its own."""
    client = connections.enter_context(connect(url, timeout))
    return partial(client.infer, manifest.name, feeds, _version(repository, manifest))


def _checked(repository: Repository, manifest: Manifest, client: ServedClient, feeds: Feeds) -> Checked:
    """Metadata, then every recorded row alone and all together."""
    version = _version(repository, manifest)
    inputs, outputs = client.metadata(manifest.name, version)
    problems = [*differences("input", manifest.inputs, inputs), *differences("output", manifest.outputs, outputs)]
    problems = [f"{label(manifest)}: {problem}" for problem in problems]
    if problems:
        return Checked(manifest, float("nan"), 0, "nothing", tuple(problems))
    count = len(next(iter(feeds.values())))
    requests = [{name: values[i : i + 1] for name, values in feeds.items()} for i in range(count)]
    together = min(count, manifest.options.max_batch)
    requests.append({name: values[:together] for name, values in feeds.items()})
    answers = [client.infer(manifest.name, request, version) for request in requests]
    expected, by = _expected(repository, manifest, requests)
    errors = []
    for answer, reference in zip(answers, expected, strict=True):
        for name, values in reference.items():
            problem, error = compare(answer, name, values)
            errors.append(error)
            problems += [f"{label(manifest)}: {problem}"] if problem else []
    worst = float(np.max(errors))  # NaN where one is, which max() would not see
    allowed = TOLERANCES[manifest.precision]
    limit = min(allowed, SAME_FILE) if by == "artifact" else allowed
    if not problems and not worst <= limit:
        problems.append(
            f"{label(manifest)}: the outputs differ by {worst:.2g} from the {by}'s, and {limit:g} is allowed in "
            f"{manifest.precision}. Is another version or file served?"
        )
    return Checked(manifest, worst, len(requests), by, tuple(dict.fromkeys(problems)))


def _expected(
    repository: Repository, manifest: Manifest, requests: Sequence[Feeds]
) -> tuple[list[Mapping[str, np.ndarray]], str]:
    """What the artifact gives where it can run, else what was recorded of the first output."""
    engine = exporter(manifest.engine)
    folder = repository.folder(manifest.name, manifest.version)
    if engine.obstacle(manifest.precision) is None and manifest.file.endswith(".onnx"):
        with engine.open(folder / manifest.file, precision=manifest.precision) as runtime:
            return [runtime.run(request) for request in requests], "artifact"
    _, output = _recorded(repository, manifest)
    name, rows = manifest.outputs[0].name, [*range(len(output))]
    together = len(next(iter(requests[-1].values())))
    return [*({name: output[i : i + 1]} for i in rows), {name: output[:together]}], "recorded"


def compare(answer: Mapping[str, np.ndarray], name: str, reference: np.ndarray) -> tuple[str | None, float]:
    """What is wrong with an output as such, or None; and its largest error, relative to max(1, largest reference)."""
    if name not in answer:
        return f"the server gives no output {name}, but {', '.join(sorted(answer))[:200]}", 0.0
    values = answer[name]
    if values.shape != reference.shape or values.dtype != reference.dtype:
        found = f"{values.dtype} {list(values.shape)}"
        return f"output {name} is {found}, not {reference.dtype} {list(reference.shape)}", 0.0
    return None, relative_error(reference, values)


def differences(kind: str, expected: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> list[str]:
    """How a server's metadata differ from the manifest, in sentences."""
    theirs = {tensor.name: tensor for tensor in found}
    problems = [
        f"the server has no {kind} {tensor.name}, but {', '.join(theirs)[:200] or 'none'}"
        for tensor in expected
        if tensor.name not in theirs
    ]
    for tensor in expected:
        other = theirs.get(tensor.name)
        if other is None:
            continue
        if other.datatype != tensor.datatype:
            problems.append(
                f"{kind} {tensor.name} is {other.datatype} on the server, {tensor.datatype} in the manifest"
            )
        fits = len(other.shape) == len(tensor.shape) and all(
            ANY in (a, b) or a == b for a, b in zip(other.shape, tensor.shape, strict=True)
        )
        if not fits:
            shapes = f"{list(other.shape)} on the server, {list(tensor.shape)} in the manifest"
            problems.append(f"{kind} {tensor.name} has shape {shapes}")
    return problems


def _pairs(manifests: Sequence[Manifest]) -> list[ServedPair]:
    """Each pruned version with the dense one of the same weights; a dense one alone if nothing is pruned."""
    dense = [each for each in manifests if each.role == "dense"]
    pruned = [each for each in manifests if each.role == "pruned"]
    if not pruned:
        return [ServedPair(each, None) for each in dense]
    return [ServedPair(each, next((other for other in dense if _same_origin(each, other)), None)) for each in pruned]


def _same_origin(pruned: Manifest, dense: Manifest) -> bool:
    keys = ("dense_weights", "source")
    return all(pruned.made_from.get(key) == dense.made_from.get(key) for key in keys)
