"""Let tokens that are merged be the same instead: all stay there, and the network computes what the merging one does.

Compensation compares a cut network with the dense one value by value, so that both need as many tokens. Where several
are one in the merging network, each of them has here the mean of all; that attention meets each as a key of its own is
the logarithm of their number that it adds there. So the weights make up for merging too: the dense network knows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from optin_deploy.cutting.merging import APART, in_front
from optin_deploy.network.axes import kept
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.operators.row import Row, refuse
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.tokens import TokenStream

DOMAIN, TIED = "optin_deploy", "Tied"


@dataclass(frozen=True, eq=False)
class Ties:
    """Which tokens of a masked network are the same from where on."""

    layout: Layout
    stream: TokenStream
    merges: Sequence[int]
    """How many tokens are merged behind the attention of each block."""
    keep: Mapping[str, Sequence[int]]
    """Kept units: tokens are compared by the keys that stay."""

    @property
    def nodes(self) -> set[int]:
        """The residual Adds behind which tokens are the same."""
        network = self.layout.structure.network
        blocks = zip(self.stream.blocks, self.merges, strict=True)
        return {network.producer[block.leaves].index for block, count in blocks if count}

    @uncollected()
    def tied(self, network: Network) -> Network:
        """Return a network of the same nodes in the same order, where these Adds tie tokens; it runs with `ROWS`.

        Args: network: the layout's own, or one with other weights.
        """
        model, leaves, axes = network.model.clone(), self.layout.leaves(self.keep), self.layout.structure.axes
        nodes, left, places = list(model.graph), self.stream.tokens, None
        values = {value.name: value for node in nodes for value in node.outputs}
        for block, count in zip(self.stream.blocks, self.merges, strict=True):
            if not count:
                continue
            heads, width = (kept(axis, leaves).tolist() for axis in axes[block.keys][1:3])
            how = {"heads": heads, "width": width, "tokens": left, "count": count, "protected": self.stream.protected}
            add, old = nodes[network.producer[block.leaves].index], values[block.leaves]
            inputs = [*add.inputs, values[block.keys], *([] if places is None else [places])]
            node = ir.node(TIED, inputs, how, domain=DOMAIN, num_outputs=2)
            new, places = node.outputs
            new.type, new.shape = old.type, old.shape
            old.name, new.name, places.name = f"{old.name}.untied", old.name, f"{old.name}.places"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.insert_before(add, node)
            model.graph.remove(add)
            values[block.leaves] = new
            left -= count
        model.graph.opset_imports[DOMAIN] = 1
        return Network(model, network.source)


def _tied(node: Node, one: Tensor, other: Tensor, keys: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum, where each token is the mean of those that it is merged with, and the place of each in the sequence of
    merged ones, (samples, tokens); see `cutting.merging`.

    Args: keys: (samples, heads, width, tokens). places: before this merge; None: all are apart.
    """
    x, protected, tokens, count = one + other, node.get("protected"), node.get("tokens"), node.get("count")
    samples, length, features = x.shape
    each = torch.arange(length, device=x.device).expand(samples, -1)
    places = each if places is None else places
    someone = torch.zeros(samples, tokens, dtype=torch.long, device=x.device).scatter(1, places, each)
    total = keys[:, node.get("heads")][:, :, node.get("width")].float().sum(1).mT
    total = total.gather(1, someone[..., None].expand(-1, -1, total.shape[2]))
    total = total / total.square().sum(2, keepdim=True).sqrt()
    cosines = total[:, ::2] @ total[:, 1::2].mT
    apart = torch.zeros_like(cosines[0])
    apart[: (protected + 1) // 2] = apart[:, : protected // 2] = APART
    best, into = (cosines + apart).max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    goes, stays = order[:, :count], order[:, count:].sort(dim=1).values
    left, odd = stays.shape[1], tokens // 2
    first = torch.zeros_like(into).scatter(1, stays, each[:, :left]).scatter(1, goes, left + into.gather(1, goes))
    merged = torch.zeros_like(someone)
    merged[:, ::2], merged[:, 1::2] = first, left + torch.arange(odd, device=x.device)
    if protected > 1:
        merged = torch.from_numpy(in_front(left, odd, protected)).to(x.device).argsort()[merged]
    places = merged.gather(1, places)
    index = places[..., None].expand(-1, -1, features)
    sums = x.new_zeros(samples, left + odd, features).scatter_add(1, index, x)
    many = x.new_zeros(samples, left + odd).scatter_add(1, places, x.new_ones(samples, length))
    return (sums / many[..., None]).gather(1, index), places


ROWS = {(DOMAIN, TIED): Row(TIED, _tied, refuse("its tokens are tied"), domain=DOMAIN)}
"""Row for `network.run.Program`; no file has such a node."""
