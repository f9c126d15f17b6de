"""The fast scorer: the curvature of the OPTIN score by random projections, all units from a few backward passes.

At mask m = 1 the score and its gradient vanish, and its Gauss-Newton curvature is a squared Jacobian norm:
D_k(u) ~ ||dG_k / dm_u||^2. With R of independent signs, E[(d<R, G>/dm_u)^2] is exactly that norm, so one backward
pass of s = sum of <R_k, G_k> estimates it for every unit of every layer: ds/dm_u of a sample is the sum over its tokens
of unit u times ds/du. Signs depend on sample, layer and probe: batching changes nothing.

The graph of one block at a time is kept: blocks run again from their recorded inputs, last one first, and each pass
hands its gradient down. That costs one forward more, and takes the memory of one block instead of all. Where the
hardware multiplies bfloat16, the passes of a float32 model use it: on MiniLM single scores move by half a percent, far
below the noise of the projections. The dense forward, what is compared, and all sums stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, recorded, rows_of, run_blocks
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.dense import DensePass, dense_pass, pulled_back
from optin_deploy.scoring.features import ALL_TOKENS, Features
from optin_deploy.scoring.losses import exact_directions, random_direction
from optin_deploy.scoring.noise import sample_keys, signs, stream
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY, VARIANCE, Terms, attention_branches, ffn_branches

GAUSSIAN_SQUARES = 2 / 3
"""E x^4 = 3 s^4 and Var x^2 = 2 s^4 for Gaussian x, which projections on many signs are: 2/3 x^4 estimates Var x^2."""
BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features, on x86 and on ARM; without one, bfloat16 is emulated and slower."""


def sketch_terms(
    model: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    *,
    probes: range,
    output_probes: range,
    seed: int,
    features: Features = ALL_TOKENS,
    progress: Progress = silent,
) -> Terms:
    """Estimate both terms for every head and neuron; unbiased for the curvature, error ~ 1/sqrt(samples * probes).

    Args:
        batches: each is in memory as a whole; see `memory.micro_batches`.
        probes: which random projections of the trajectory are taken.
        output_probes: the same for the output. Where a few directions are exact, they are taken with probe 0.
    Returns: sums over samples and probes.
    """
    terms = Terms.zeros((*attention_branches(layout), *ffn_branches(layout)))
    terms.probes = len(probes)
    depth = len(layout.layers)
    for number, batch in enumerate(batches):
        dense = dense_pass(model, layout, batch, features, seed, inputs=[layer.path for layer in layout.layers])
        keys = sample_keys(batch)
        terms.samples += rows_of(batch)
        terms.forward_seconds += dense.seconds
        directions = exact_directions(dense.readout)
        exact = directions is not None
        if directions is None:
            streams = (stream(seed, "output", probe) for probe in output_probes)
            directions = [random_direction(dense.readout, keys, each) for each in streams]
        elif 0 not in output_probes:
            directions = []
        terms.output_probes = int(0 in output_probes) if exact else len(output_probes)
        # Of each projection of the output: its gradient at the end of the block in hand.
        pulled: list[Tensor | None] = [*pulled_back(model, layout, batch, dense, directions)]
        bent: list[Tensor | None] = [None] * len(probes)  # and of each projection of the trajectory
        for index in reversed(range(depth)):
            block = _Block(model, layout, index, batch, dense, features)
            for place, probe in enumerate(probes):
                noise = signs(keys, stream(seed, f"layer {index}", probe), *block.gram.shape[1:], like=block.gram)
                bent[place] = block.pass_down(bent[place], noise, terms, TRAJECTORY)
            for place, gradient in enumerate(pulled):
                pulled[place] = block.pass_down(gradient, None, terms, OUTPUT, certain=exact)
            del block  # its graph, before the next one's
            progress(number * depth + depth - index, len(batches) * depth)
    return terms


def pass_dtype(hidden: Tensor) -> torch.dtype:
    """What passes through a block with input of this kind multiply in; only dtype and device are looked at."""
    if hidden.dtype != torch.float32:
        return hidden.dtype
    if hidden.is_cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Not in every torch that we run with.
        able: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(able.get(name, False) for name in BFLOAT16_PRODUCTS)
    return torch.bfloat16 if fast else torch.float32


class _Block:
    """The graph of one block on one batch, from its dense input to its output and its Gram matrix."""

    def __init__(
        self, model: nn.Module, layout: ModelLayout, index: int, batch: Batch, dense: DensePass, features: Features
    ) -> None:
        layer = layout.layers[index]
        self.branches, path = layer.branches, features.path(layer)
        hidden = dense.recording.inputs.pop(layer.path).detach().requires_grad_()
        watch = recorded(model, inputs=[branch.output for branch in self.branches], outputs=[path])
        dtype = pass_dtype(hidden)
        products = torch.autocast(hidden.device.type, dtype, enabled=dtype != hidden.dtype)
        with torch.enable_grad(), products, watch as kept:
            self.out = run_blocks(model, layout, batch, start=index, hidden=hidden, stop=layer.path)
            self.gram = dense.tokens.gram(kept.outputs[path])
        self.units = [kept.inputs[branch.output] for branch in self.branches]
        self.below = [hidden] if index else []

    def pass_down(
        self, gradient: Tensor | None, noise: Tensor | None, terms: Terms, row: int, *, certain: bool = False
    ) -> Tensor | None:
        """One backward pass: add every unit's squared slope to a row of the sums, and to another its variance.

        Args: gradient: of the projection at the block's output. noise: what the block's Gram matrix is projected on.
            certain: the direction is not random.
        Returns: the gradient at the block's input; None below the first.
        """
        ends = [(self.out, gradient), (self.gram, noise)]
        roots, weights = zip(
            *[(root, weight.to(root.dtype)) for root, weight in ends if weight is not None], strict=True
        )
        found = torch.autograd.grad(roots, [*self.units, *self.below], weights, retain_graph=True)
        for branch, values, slopes in zip(self.branches, self.units, found[:2], strict=True):
            squares = _slopes(branch, values, slopes).square()
            terms.sums[branch][row] += squares.sum(0).cpu()
            if not certain:
                terms.sums[branch][VARIANCE + row] += GAUSSIAN_SQUARES * squares.square().sum(0).cpu()
        return found[2] if self.below else None


def _slopes(branch: Branch, values: Tensor, gradients: Tensor) -> Tensor:
    """ds/dm of each sample and unit, (batch, units), in float64: over its tokens and the unit's own columns."""
    slopes = (values.detach() * gradients).sum(1)  # (batch, units * width)
    return slopes.double().view(len(slopes), branch.units, -1).sum(2)
