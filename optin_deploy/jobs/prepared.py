"""Load a network with its data: what every computing stage needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from optin_deploy.common.version import __version__
from optin_deploy.data.samples import check_start
from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Drawing, Halves, Preparation, read_feeds, read_judging, unseen
from optin_deploy.feeds.image_feeds import Pixels
from optin_deploy.files.names import DENSE
from optin_deploy.files.storage import sha256_json
from optin_deploy.network.probe import Given, probes_of
from optin_deploy.network.sealed import finished
from optin_deploy.pruning.dense import DenseSource, dense_of, stored_in
from optin_deploy.pruning.networks import Found
from optin_deploy.pruning.pruning import ComparedOutput, ready_of, turned
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.source import Source
from optin_deploy.structure.find import find
from optin_deploy.structure.labels import TOKENS
from optin_deploy.structure.turning import KINDS as TURNED

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The dense network and its data: what every computing stage needs."""

    source: Source
    dense: DenseSource
    ready: Ready

    @cached_property
    def key(self) -> str:
        """Hash of all that a stage's result depends on besides its own options: network, data, versions."""
        return sha256_json([self.ready.key, self.source.seed, __version__, version("torch")])


def prepare(source: Source, home: Path | None = None, *, cut_by: Source | None = None) -> Prepared:
    """Load network and data, and check that they fit together.

    Args: home: an output folder, whose dense.onnx is read where it is of this very model. cut_by: what that folder
        started from, where the network in it was cut by other rows: heads are turned as they are there, and no row
        judges that calibrated the cut.
    Raises: BadInput and its kinds: see errors.py.
    """
    for file in filter(None, (source.calibration, source.evaluation)):
        check_start(Path(file), source.text_column, source.label_column, source.pair_column)
    dense = dense_of(source, home)
    network = dense.network
    rows = _rows(dense, source)
    if cut_by is not None:
        rows = _without_those_of(rows, dense, cut_by)
    probes = probes_of(network, given=Given(source.sizes, {}))
    found = Found(find(network, probes), tuple(probes))
    ready = ready_of(
        found,
        rows,
        compared=ComparedOutput(source.output, source.read_as or dense.read_as, dense.head),
        kinds=tuple(kind for kind in source.units if kind != TOKENS),
        names=dense.class_names,
        strict=source.evaluation is not None,
        metric=None if dense.task is None else dense.task.metric,
        seed=source.seed,
    )
    if set(ready.kinds) & set(TURNED):
        dense, ready = _turned(dense, ready, home, other_rows=cut_by is not None)
    prepared = Prepared(source, dense, ready)
    judging = ready.rows.held_out
    if judging is not None and (ready.metric is not None or any(label is not None for label in judging.labels)):
        _ = ready.judge  # refuses before the long work labels in another order, and a perplexity that is no number
    return prepared


def _turned(dense: DenseSource, ready: Ready, home: Path | None, *, other_rows: bool) -> tuple[DenseSource, Ready]:
    """The same with the widths of heads turned: as dense.onnx has them, if that is of these rows, so that plans fit."""
    key, stored = sha256_json(["turned", dense.key, ready.key]), None
    known = None if home is None else finished(home / DENSE)
    if home is not None and known is not None and (other_rows or known.key == key):
        stored = stored_in(home, dense.network.source)
    after = turned(ready, stored)
    return (replace(dense, network=after.network, key=key) if after.turned else dense), after


def _without_those_of(rows: Halves, dense: DenseSource, cut_by: Source) -> Halves:
    """The same without the rows that judge and calibrated a cut; a warning tells where that is not known.

    Raises: BadInput: no row that judges is left.
    """
    assert rows.held_out is not None, "a fifth of the rows judges, or those of --eval"
    try:
        seen = _rows(dense, replace(cut_by, evaluation=None)).calibration
    except BadInput as err:
        log.warning("rows that calibrated the cut may be among those that judge, as they cannot be read: %s", err)
        return rows
    if set(rows.held_out.keys) <= set(seen.keys):
        raise BadInput(
            f"{rows.held_out.origin}: all {len(rows.held_out)} rows that should judge calibrated the cut. Give --eval "
            "with rows that nothing learned from."
        )
    return replace(rows, held_out=unseen(dense.network, rows.held_out, seen))


def _rows(dense: DenseSource, source: Source) -> Halves:
    """Rows that teach and rows that judge."""
    pixels = None
    if source.mean is not None or source.std is not None:
        pixels = Pixels(source.mean or (0.0,), source.std or (1.0,))
    own = not source.is_file and pixels is None and source.preprocessor is None
    size = None if own else source.image_size  # the model's own processor knows it
    explicit = pixels is not None or size is not None
    beside = None if source.is_file else source.model  # a feature extractor is loaded where recordings come
    preparation = Preparation(
        tokenizer=source.tokenizer or dense.tokenizer,
        preprocessor=source.preprocessor or (None if explicit else dense.processor or beside),
        pixels=pixels,
        image_size=size,
        seq_len=dense.seq_len(source.seq_len),
        text_column=source.text_column,
        label_column=source.label_column,
        pair_column=source.pair_column,
        prompts=dense.prompts,
        masks=dense.task is not None and dense.task.metric == "pseudo_perplexity",
    )
    drawing = Drawing(source.samples, seed=source.seed, others_judge=source.evaluation is not None)
    found = read_feeds(dense.network, source.calibration, preparation, drawing)
    if source.evaluation is None:
        return found
    judging = read_judging(dense.network, source.evaluation, found.calibration, preparation)
    return replace(found, held_out=judging)
