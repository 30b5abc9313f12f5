"""The walk over the ancestors of stages, be they planned, stored or reported. Imports no torch."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def walk_ancestors(nodes: Iterable[Node], inputs: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """Return the nodes and all their ancestors, each once and behind its own inputs.

    Args:
        nodes: The start of the walk: names of stages, identities.
        inputs: Returns the inputs of a node. With parents alone, the result for one node is the line from the base to it.
    """
    found: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for source in inputs(node):
                visit(source)
            found.append(node)

    for node in nodes:
        visit(node)
    return found
