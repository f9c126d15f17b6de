"""Re-solve the kept projections in closed form, so that the pruned stream follows the dense one.

Branch by branch on the already pruned stream, two regressions. What a branch reads has changed: the linear map that
brings it nearest to what the dense one reads is folded into the input projections (queries, keys and values; FFN in),

    minimise over A, c    || z' + A z' + c  -  z ||^2  +  ridge * || A ||^2

and then the output projection makes up for the cut units and for what the stream has lost so far:

    minimise over W', b' of the kept columns

        || x' + s * (W' a' + b')  -  (x + s * (W a + b)) ||^2  +  ridge * || W' - W_kept ||^2

z, a, x: what the branch reads, input of its output projection and the residual it is added to, dense; z', a', x': the
same in the pruned model; s: LayerScale. In the norms, a sample's tokens count by how much they move the output (see
token_weights.py). No gradient step, no labels. Each ridge is chosen by the error on samples that the solution has not
seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.data.batches import make_batches
from optin_deploy.guard import working
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, Recording, inference, recorded, run_blocks
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.regression import RIDGES, Ridge
from optin_deploy.rewrite.slices import projection_at, rows_in_parts, unit_columns, widened
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring.features import valid_tokens
from optin_deploy.token_weights import TokenWeights

Weights = dict[str, Tensor]
"""State-dict entries of the dense shape; rows and columns of cut units are untouched."""


def compensate(
    model: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    token_weights: TokenWeights | None = None,
    progress: Progress = silent,
) -> Weights:
    """New weights and biases of the kept projections, dense-shaped; the model itself is untouched.

    Args:
        batches: unlabeled calibration inputs, see batches.py; padding is left out of the fit.
        token_weights: what each token's error counts, of these batches; None = all the same.
    """
    with working(model):
        batches = make_batches(model, batches)
        student = rewrite_torch(model, layout, plan)
        refit(model, student, layout, plan, batches, token_weights=token_weights, progress=progress)
        weights: Weights = {}
        for index, layer in enumerate(layout.layers):
            for branch, kept in ((layer.attention, plan.heads[index]), (layer.ffn, plan.neurons[index])):
                entries = widened(model, student, branch, kept)
                if not index and branch is layer.attention:  # its input projections stay as they are
                    entries = {name: entry for name, entry in entries.items() if name.startswith(f"{branch.output}.")}
                weights |= entries
    return weights


def refit(
    model: nn.Module,
    student: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    token_weights: TokenWeights | None = None,
    progress: Progress = silent,
) -> None:
    """Give the student, which `rewrite_torch` made of the model, the new weights and biases of its projections.

    Args: batches, token_weights: see `compensate`; the batches are checked already.
    """
    streams = _Streams(model, student, layout, batches, token_weights)
    with inference(model), inference(student), torch.no_grad():
        for index, layer in enumerate(layout.layers):
            for branch, kept in ((layer.attention, plan.heads[index]), (layer.ffn, plan.neurons[index])):
                units = unit_columns(kept, branch.unit_width)
                if kept and (index or branch is layer.ffn):  # the first branch of all reads what the dense one reads
                    streams.fit_inputs(index, branch, units)
                streams.fit_output(index, branch, units)
            streams.advance(index)
            progress(index + 1, len(layout.layers))


def apply_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the model with these entries of its state dict replaced."""
    changed = copy.deepcopy(model)
    changed.load_state_dict(weights, strict=False)
    return changed


class _Streams:
    """The dense model and its student side by side, block by block; solutions go into the student at once."""

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        layout: ModelLayout,
        batches: Sequence[Batch],
        token_weights: TokenWeights | None,
    ) -> None:
        self.model, self.student, self.layout, self.batches = model, student, layout, batches
        self.token_weights = token_weights
        self.dense: list[Tensor | None] = [None] * len(batches)
        """Inputs of the block in hand, (batch, tokens, hidden)."""
        self.pruned: list[Tensor | None] = [None] * len(batches)

    def fit_inputs(self, index: int, branch: Branch, units: Tensor) -> None:
        """The input projections of a branch; all of them read the same tensor.

        Args: units: indices of the kept units' outputs.
        """
        read = branch.inputs[0]
        projections = {path: projection_at(self.model, path) for path in branch.inputs}
        width = projections[read].inputs
        ridge = Ridge(width, width, centred=all(each.bias is not None for each in projections.values()), ridges=RIDGES)
        # The output hears what attention reads as it hears the output of the block before.
        source = index - 1 if branch is self.layout.layers[index].attention else index
        for i in range(len(self.batches)):
            wanted, found = (seen.inputs[read] for seen in self._look(i, index, inputs=[read], stop=read))
            ridge.add(found, wanted - found, self._counts(i, source, found))
        change, offset = ridge.solve()
        narrow: Weights = {}
        for path, full in projections.items():
            rows = rows_in_parts(units, branch.width, full.outputs)
            kept = full.weight[rows].double().cpu()
            weight = (kept + kept @ change.T).to(full.weight)
            bias = None if full.bias is None else (full.bias[rows].double().cpu() + kept @ offset).to(full.bias)
            narrow |= full.entries(path, weight, bias)
        self.student.load_state_dict(narrow, strict=False)

    def fit_output(self, index: int, branch: Branch, columns: Tensor) -> None:
        """The output projection of a branch.

        Unknowns and targets are in the residual stream's scale (LayerScale applied); rows of W' are independent, so
        dividing by the scale afterwards gives the same projection as dividing the targets.
        Args: columns: indices of the kept units' columns.
        """
        start = projection_at(self.model, branch.output)
        scale = None if branch.scale is None else self.model.get_parameter(branch.scale)
        ridge = Ridge(len(columns), start.outputs, centred=start.bias is not None, ridges=RIDGES)
        # The dense model's last look at a block also gives the input of its next one.
        layer = self.layout.layers[index]
        last = layer.path if branch is layer.ffn else branch.output
        for i in range(len(self.batches)):
            ends, inputs = {branch.output, last}, (branch.output, branch.residual)
            teacher, pupil = self._look(i, index, inputs=inputs, outputs=ends, stop=last)
            gap = teacher.outputs[branch.output] - pupil.outputs[branch.output]  # cut units gone, others as they were
            if scale is not None:
                gap = gap * scale
            gap = gap + teacher.inputs[branch.residual] - pupil.inputs[branch.residual]
            kept = pupil.inputs[branch.output][..., : len(columns)]  # an emptied branch shows its input instead
            ridge.add(kept, gap, self._counts(i, index, gap))
            if branch is layer.ffn:
                self.dense[i] = teacher.outputs[last]
        change, offset = ridge.solve()
        if scale is not None:
            exact = scale.double().cpu()
            inverse = torch.where(exact.abs() > 1e-8, 1 / exact, 0)
            change, offset = change * inverse, offset * inverse
        weight = start.weight[:, columns] + change.T.to(start.weight)
        bias = None if start.bias is None else start.bias + offset.to(weight)
        self.student.load_state_dict(start.entries(branch.output, weight, bias), strict=False)

    def advance(self, index: int) -> None:
        """The pruned stream to the next block, by the solutions of this one; the dense stream is there already."""
        stop = self.layout.layers[index].path
        for i, batch in enumerate(self.batches):
            hidden = self.pruned[i]
            self.pruned[i] = run_blocks(self.student, self.layout, batch, start=index, hidden=hidden, stop=stop)

    def _look(
        self, i: int, index: int, *, inputs: Iterable[str], outputs: Iterable[str] = (), stop: str
    ) -> tuple[Recording, Recording]:
        """What modules of block `index` take and give for batch i, up to module `stop`: dense, and pruned."""
        found = []
        for model, hidden in ((self.model, self.dense[i]), (self.student, self.pruned[i])):
            with recorded(model, inputs=inputs, outputs=outputs) as seen:
                run_blocks(model, self.layout, self.batches[i], start=index, hidden=hidden, stop=stop)
            found.append(seen)
        return found[0], found[1]

    def _counts(self, i: int, index: int, like: Tensor) -> Tensor:
        """(batch, tokens): what an error at each token of batch i counts at the end of a block, 0 for padding."""
        valid = valid_tokens(self.batches[i], like)
        return valid if self.token_weights is None else self.token_weights[index][i].to(valid.device) * valid.double()
