"""Read torch modules: exported in memory without optimisation, so that weights keep their names and their memory.

The new exporter of torch is tried first; where it fails or writes branches, the one by TorchScript. Either gets the
module in evaluation mode, with plain ("eager") attention and without caches; all of that is as before afterwards.
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.network.checks import check_model
from optin_deploy.network.graph import Network
from optin_deploy.network.normal import normalise, reason
from optin_deploy.network.operators import rows

OPSET, SCRIPT_OPSET = 20, 17
"""Operator sets of the two exporters: below 23, whose Attention node hides the products; 17 is the newest that
TorchScript's exporter writes well."""
PLAIN = {"attn": "eager", "experts": "batched_mm"}
"""Implementations in transformers that an exporter can follow: others are kernels, or loops over what a run finds."""
SWITCHES = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Entries of transformers' configs while a module is read."""
STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Key of the metadata with a node's place in the files of its builder, which nobody needs."""
FAILURES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, AssertionError),
    *(ArithmeticError, ImportError),
)
"""What exporters raise about modules that they cannot trace: their own errors are RuntimeErrors."""

EXPORTING = threading.RLock()
"""Exporters keep what they are at in places that all threads share."""

Axes = Mapping[str, Mapping[int, str]]
"""Axes of inputs whose size is free, and what they are called."""


def read_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    axes: Axes | None = None,
    dynamo: bool | None = None,
) -> Network:
    """Read a module by tracing it.

    Args:
        inputs: example inputs by the names of forward's arguments, with two rows or more.
        axes: axes that stay free; None: the first of each input, as "batch".
        dynamo: True: only torch's new exporter; False: only TorchScript's; None: the second where the first fails, or
            writes what cannot be followed and the second writes less of that.
    Raises: BadInput: neither exporter can trace it; says why.
    """
    source = type(module).__name__
    free = {name: {0: "batch"} for name, value in inputs.items() if value.dim()} if axes is None else axes
    traced = Traced(module, tuple(inputs))
    failures: list[str] = []
    models: list[tuple[int, ir.Model]] = []
    with EXPORTING, prepared(module), torch.no_grad(), quiet():
        for new in (True, False) if dynamo is None else (dynamo,):
            try:
                model = _by_dynamo(traced, inputs, free) if new else _by_script(traced, inputs, free)
                _rename(model, traced, free)
                normalise(model, source)
            except FAILURES as err:
                failures.append(f"{'torch.export' if new else 'TorchScript'}: {reason(err)}")
                continue
            models.append((_obscure(Network(model, source)), model))
            if not models[-1][0]:
                break
    if not models:
        raise BadInput(
            f"{source} cannot be read as a graph. {' '.join(failures)} Give other example inputs, or an .onnx file."
        )
    return Network(min(models, key=lambda each: each[0])[1], source)


def _obscure(network: Network) -> int:
    """Number of nodes that axes cannot be followed through: of an unknown operator, or with a graph inside."""
    return sum(
        (node.domain, node.op) not in rows() or any(isinstance(value, ir.Graph) for value in node.attributes.values())
        for node in network.nodes
    )


class Traced(nn.Module):
    """Takes tensors in the order of their names, and gives the tensors of the output."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names
        self.found_names = _Names()
        self.training = False  # a fresh module is in training mode, and would bring dropout back

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Notes the names of what it returns.

        Raises: BadInput: it returns no tensor.
        """
        output = self.module(**dict(zip(self.names, values, strict=True)))
        found = _tensors(output, "")
        if not found:
            raise BadInput(f"its forward returns no tensor but {type(output).__name__}: return tensors, or a dict.")
        distinct = {id(tensor): (name, tensor) for name, tensor in reversed(found)}
        self.found_names.all = tuple(name for name, _ in reversed(distinct.values()))
        return tuple(tensor for _, tensor in reversed(distinct.values()))


class _Names:
    """Names that a forward leaves behind; torch.export puts back what a module itself holds."""

    all: tuple[str, ...] = ()


def _tensors(output: Any, name: str) -> list[tuple[str, Tensor]]:
    """Named tensors of an output, wherever they lie in it; of an output of transformers only those that are entries
    themselves, so no caches."""
    if isinstance(output, Tensor):
        return [(name or "output", output)]
    if any(kind.__name__ == "ModelOutput" for kind in type(output).__mro__):
        return [(key, value) for key, value in output.items() if isinstance(value, Tensor)]
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        parts = output.items()
    elif is_dataclass(output):
        parts = [(each.name, getattr(output, each.name)) for each in fields(output)]
    elif isinstance(output, (tuple, list)):
        name, parts = name or "output", enumerate(output)
    return [each for key, value in parts for each in _tensors(value, f"{name}_{key}" if name else str(key))]


def _by_dynamo(traced: Traced, inputs: Mapping[str, Tensor], axes: Axes) -> ir.Model:
    from optin_deploy.network.torch_slices import TRANSLATIONS

    with redirect_stderr(io.StringIO()):  # torch prints the graph of what it cannot export
        program = torch.onnx.export(
            traced,
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=list(inputs),
            dynamic_shapes=(tuple(dict(axes.get(name, {})) for name in inputs),),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None, "no file was asked for"
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop(STACK_TRACE, None)
    return program.model


def _by_script(traced: Traced, inputs: Mapping[str, Tensor], axes: Axes) -> ir.Model:
    """The file is written without weights, which then come from the module: no copy, and no limit to their size."""
    written = io.BytesIO()
    torch.onnx.export(
        traced,
        tuple(inputs.values()),
        written,  # type: ignore[arg-type]  # its type leaves out what the older exporter takes
        dynamo=False,
        opset_version=SCRIPT_OPSET,
        export_params=False,
        keep_initializers_as_inputs=True,  # else weights with equal values, such as fresh biases, become one
        do_constant_folding=False,
        input_names=list(inputs),
        dynamic_axes={name: dict(found) for name, found in axes.items()},
    )
    proto = onnx.ModelProto.FromString(written.getvalue())
    check_model(proto, type(traced.module).__name__)
    model: ir.Model = ir.from_proto(proto)
    weights = dict((*traced.named_parameters(), *traced.named_buffers()))
    for value in list(model.graph.inputs):
        if (weight := weights.get(value.name or "")) is not None:
            value.const_value = ir.tensor_adapters.TorchTensor(weight.detach(), value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


def _rename(model: ir.Model, traced: Traced, free: Axes) -> None:
    """Weights get the names that `named_parameters` gives them, outputs those of the module's output.

    A weight that the module uses under two names becomes one.
    """
    module = traced.module
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    again = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    known = {name: first[id(tensor)] for name, tensor in again}
    taken: dict[str, ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        old = value.name or ""
        name = known.get(old.removeprefix("module."), old.removeprefix("module."))
        if name in taken:
            value.replace_all_uses_with(taken[name], replace_graph_outputs=True)
            del model.graph.initializers[old]
        else:
            value.name, taken[name] = name, value
    sizes = {size for axes in free.values() for size in axes.values()}
    for value, name in zip(model.graph.outputs, traced.found_names.all, strict=True):
        if not value.is_initializer() and not value.is_graph_input():
            value.name = name
        if value.shape is not None:  # TorchScript makes up names, and gives one to sizes that differ
            value.shape = ir.Shape(
                [size if isinstance(size, int) or size.value in sizes else None for size in value.shape]
            )


@contextmanager
def prepared(module: nn.Module, *, plain: bool = True) -> Iterator[None]:
    """Evaluation mode, no caches, and plain attention unless it shall stay as it is; all restored.

    So is torch's fast path for encoders, which no exporter knows, and which leaves out what is padded.
    """
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for part in module.modules():
            stack.callback(setattr, part, "training", part.training)
        for config in _configs(module):
            entries = config.__dict__
            stack.callback(entries.update, {name: value for name, value in entries.items() if value is not config})
        module.eval()
        for kind, name in PLAIN.items() if plain else ():
            if callable(change := getattr(module, f"set_{kind}_implementation", None)):
                change(name)
        for config in _configs(module):
            config.__dict__.update({name: value for name, value in SWITCHES.items() if name in config.__dict__})
        yield


def _configs(module: nn.Module) -> Sequence[Any]:
    """Configs of transformers in a module, each once, and those inside of them."""
    found: dict[int, Any] = {}
    waiting = [part.config for part in module.modules() if hasattr(getattr(part, "config", None), "to_diff_dict")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [entry for entry in vars(config).values() if hasattr(entry, "to_diff_dict")]
    return tuple(found.values())


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' notes of progress and deprecation are not for our users."""
    names = ("torch.onnx", "torch.export", "torch.fx", "torch._subclasses", "onnxscript", "onnx_ir", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prints, switch = torch._C._jit_is_onnx_log_enabled(), torch._C._jit_set_onnx_log_enabled
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            switch(False)  # it prints a graph that fails
            torch._C._jit_set_onnx_log_enabled = lambda enabled: None  # the older exporter always switches it on
            yield
        finally:
            torch._C._jit_set_onnx_log_enabled = switch
            switch(prints)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
