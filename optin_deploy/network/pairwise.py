"""Einsums of many tensors become Einsums of two, one behind the other: what three share is summed over in the last."""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

DOTS = "..."


def pairwise_einsums(graph: ir.Graph) -> None:
    """Multiply from left to right, as ONNX Runtime and torch do, in place."""
    for node in [node for node in graph if node.op_type == "Einsum" and node.domain == "" and len(node.inputs) > 2]:
        terms, result = _terms(node.attributes["equation"].as_string())
        if len(terms) != len(node.inputs):
            continue  # a run will say so
        made: list[ir.Node] = []
        value, term, old = node.inputs[0], terms[0], node.outputs[0]
        for number, (other, after) in enumerate(zip(node.inputs[1:], terms[1:], strict=True), start=2):
            later = {letter for each in (*terms[number:], result) for letter in each}
            left = (
                result if number == len(terms) else [letter for letter in _unique([*term, *after]) if letter in later]
            )
            equation = f"{''.join(term)},{''.join(after)}->{''.join(left)}"
            name = node.name if number == len(terms) else f"{node.name or old.name}_{number - 1}"
            made.append(ir.node("Einsum", [value, other], {"equation": equation}, name=name))
            found = made[-1].outputs[0]
            found.name, found.type = f"{old.name}_{number - 1}", old.type
            value, term = found, left
        found.name, found.shape = old.name, old.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [found])


def _terms(equation: str) -> tuple[list[list[str]], list[str]]:
    """Letters of each tensor and of the result; dots are one letter."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_letters(term) for term in left.split(",")]
    if arrow:
        return terms, _letters(right)
    count = Counter(letter for term in terms for letter in term)
    return terms, [
        *([DOTS] if count[DOTS] else []),
        *sorted(each for each in count if count[each] == 1 and each != DOTS),
    ]


def _letters(term: str) -> list[str]:
    return re.findall(r"\.\.\.|.", term)


def _unique(letters: list[str]) -> list[str]:
    """Each letter once, dots first."""
    return sorted(dict.fromkeys(letters), key=lambda letter: letter != DOTS)
