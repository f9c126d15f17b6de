"""A text network that also gives one vector a text."""

from __future__ import annotations

import onnx_ir as ir

from optin_deploy.errors import BadInput
from optin_deploy.exporters.passes.schemas import types_of
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.pooling import POOLED, POOLINGS
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network, Port
from optin_deploy.network.pooling_nodes import MASK, PoolingNodes

STATES, LOGITS = "last_hidden_state", "logits"


@uncollected()
def pooled(network: Network, how: EmbeddingHead | str) -> Network:
    """Return a network with one more output, `sentence_embedding`: what an `EmbeddingHead` makes of the states.

    Its weights for the tokens are the input `attention_mask`; without one, all tokens count. In 16 bits a network is to
    be typed first and pooled then: the sums are in float32, as its outputs are.

    Args: how: the head, or one of `POOLINGS` alone.
    Raises: BadInput: unknown pooling; no output of states, (batch, tokens, hidden).
    """
    head = EmbeddingHead(how) if isinstance(how, str) else how
    how = head.pooling
    if how not in POOLINGS:
        raise BadInput(f"unknown --pool {how!r}; possible: {', '.join(POOLINGS)}.")
    model = network.model.clone()
    states = model.graph.outputs[_states(network, how)]
    pooling = PoolingNodes(model, {value.name or "" for value in types_of(model.graph)})
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    result = pooling.of_all(states, how) if mask is None else pooling.of_some(states, mask, how)
    for layer in head.layers:
        real = int(states.dtype or ir.DataType.FLOAT)
        result = pooling.layer(result, layer.weight, layer.bias, layer.activation, real)
    if head.normalized:
        result = pooling.unit(result)
    result.name, result.type = POOLED, states.type
    width = len(head.layers[-1].weight) if head.layers else None
    result.shape = None if states.shape is None else ir.Shape([states.shape[0], width or states.shape[2]])
    model.graph.outputs.append(result)
    return Network(model, network.source)


def head_of(network: Network, how: str, own: EmbeddingHead | None) -> EmbeddingHead:
    """Return what makes the embedding that `--pool` asks for: the model's own head, dense layers and unit length too.

    Args: own: by its own files; None: they say nothing.
    Raises: BadInput: a pooling that a network cannot have, or another one than it is judged by.
    """
    if how in POOLINGS and own is not None and own.pooling != how:
        why = "its modules.json says so" if own.pooling != POOLINGS[0] else f"no modules.json beside it says {how}"
        message = f"--pool {how}: this model is scored and judged by its {own.pooling} ({why})"
        raise BadInput(f"{message}. Give --pool {own.pooling}.")
    if own is not None and own.after_prompt:
        raise BadInput(
            f"--pool {how}: this embedding is of the tokens behind a prompt (include_prompt is false), and a graph "
            "does not know where that ends. Leave --pool out, and let sentence-transformers pool."
        )
    head = own or EmbeddingHead(how)
    pooled(network, head)
    return head


def _states(network: Network, how: str) -> int:
    """Place of the output that holds the states of all tokens."""
    names = [port.name for port in network.outputs]
    if POOLED in names:
        raise BadInput(f"--pool {how}: {network.source} gives {POOLED} already. Leave --pool out.")
    places = [place for place, port in enumerate(network.outputs) if _holds_states(port)]
    place = names.index(STATES) if STATES in names else next(iter(places), None)
    if place is None or not _holds_states(network.outputs[place]):
        raise BadInput(
            f"--pool {how} is for feature-extraction, with an output (batch, tokens, hidden); {network.source} gives "
            f"{', '.join(f'{port.name} {_sizes(port)}' for port in network.outputs)}."
        )
    return place


def _holds_states(port: Port) -> bool:
    if port.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
        return False
    return port.name == STATES if port.shape is None else len(port.shape) == 3 and port.name != LOGITS


def _sizes(port: Port) -> str:
    return f"({', '.join(map(str, port.shape))})" if port.shape is not None else "of unknown sizes"
