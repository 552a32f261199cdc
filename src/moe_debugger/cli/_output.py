"""The doors to the terminal: what others wrote (names, problems, tokens) can neither move nor colour it."""

from collections.abc import Iterable

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from moe_debugger._plain_text import plain_text

__all__ = ["PlainConsole", "echo"]


def echo(text: str, *, err: bool = False) -> None:
    """Print `text`, of one or several lines, without control characters; to standard error if `err`."""
    typer.echo(plain_text(text, "\n\t"), err=err)


class PlainConsole(Console):
    """A console that writes no control character but its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain_text(text, "\n"), style, control)
