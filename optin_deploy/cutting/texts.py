"""Drop tokens of texts inside a network: behind some blocks only a share of them goes on.

Those stay that the others look at most: the attention that a token receives, from all heads and all tokens that are no
padding, as in Learned Token Pruning (Kim et al., KDD 2022, arXiv 2107.00910), here without its training and with a
fixed share in each block, so that batches stay rectangular. The first and the last token of each text, which are [CLS]
and [SEP] or their like, always stay; padding goes first. What stays keeps its order.

Where a value that has all tokens meets one that has fewer, such as a mask, positions or a relative bias, it is picked
by the same places; what follows from such a value, such as the place of the last token, is computed anew. That the rest
treats tokens alike is proven by their standing there twice, in another order. Padding is told by `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from optin_deploy.cutting.same import check_runs, prove_same
from optin_deploy.cutting.shortening import Shortening
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.structure import Structure
from optin_deploy.structure.tokens import HUNDRED, TokenStream


def shortened(
    layout: Layout,
    stream: TokenStream,
    left: Sequence[int],
    probes: Sequence[Mapping[str, Tensor]],
    *,
    proven: bool = False,
) -> Network:
    """Return a network that goes on with fewer tokens behind some blocks; the given one is untouched.

    Args: stream: of a text. left: percents of the tokens behind the attention of each block, never rising. probes:
        inputs on which it is proven that blocks treat tokens alike. proven: it was before, for these blocks or more.
    Raises: BadInput: an output has tokens, or tokens are not treated alike.
    """
    network = layout.structure.network
    steps = zip(stream.blocks, [HUNDRED, *left[:-1]], left, strict=True)
    cuts = {block: after for block, before, after in steps if after < before}
    _check_outputs(layout.structure, stream)
    if not proven:
        moved = Shortening(layout.structure, cuts, moves=True).made()
        why = (
            "its tokens change places and stand there twice: it treats them by where they stand or how many they are, "
            "or reads another than the first by its place"
        )
        prove_same(network, moved, probes, why)
    result = Shortening(layout.structure, cuts).made()
    if not proven:
        check_runs(network, result, probes)
    return result


def _check_outputs(structure: Structure, stream: TokenStream) -> None:
    """Raises: BadInput: an output has a value for each token."""
    tokens = structure.axes[stream.blocks[0].leaves][1].root
    for port in structure.network.outputs:
        if any(tokens in axis.leaves() for axis in structure.axes.get(port.name, ())):
            raise BadInput(
                f"{structure.network.source}: its output {port.name!r} has a value for each token, so that none can be "
                "dropped. Tokens of texts are dropped where few are read, as in classification. Leave out --tokens."
            )
