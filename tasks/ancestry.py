"""The one walk over what a stage descends from, be it planned, stored or reported. Imports no torch."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def walk_ancestors(nodes: Iterable[Node], inputs: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """Return the nodes and all they descend from, each once and behind its own inputs.

    Args:
        nodes: Where the walk begins: names of stages, identities.
        inputs: What a node is made from. With its parent alone the result of one node is the line from the base to it.
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
