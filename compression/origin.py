"""What a result was made of, as far as its identity says. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """The base model, without anything that differs between two runs of equal identity: no path, no time.

    Attributes:
        name: What people call it: of a model on the hub the second half of its id.
        organization: The first half of its id.
        url: Its page on the hub.
        revision: The commit.
        license: As its card or the recipe says; None where neither does.
    """

    name: str
    organization: str | None = None
    url: str | None = None
    revision: str | None = None
    license: str | None = None
