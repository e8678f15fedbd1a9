"""How the commands talk: results on stdout, all else on stderr, bad input as one line and exit code 2."""

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperGroup


EXIT_BAD_INPUT = 2
# What a wrong argument, file or folder raises, here and in the libraries below. Everything else is a fault of the program.
BAD_INPUT = (ValueError, OSError, ImportError)
# Loggers that write about things which a user of a command can do nothing about.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


class VidLLMCommands(TyperGroup):
    """The commands, with bad input and wrong usage turned into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; errors that the input causes become one line (`--debug`: after the traceback)."""
        debug = bool(ctx.params.get("debug"))
        try:
            with quiet_libraries(debug):
                return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except BAD_INPUT as error:
            if debug:
                traceback.print_exc()
            say(f"error: {one_line(error)}", style="bold red")
            raise typer.Exit(EXIT_BAD_INPUT) from None

    def main(self, *args, standalone_mode: bool = True, **kwargs) -> Any:
        """Parse and run; wrong usage becomes one line that names where to read on."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            # typer carries its own copy of click in some versions, so its usage errors are known by what they can do.
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            where = context.command_path if context is not None else "vidllm"
            say(f"error: {' '.join(error.format_message().split())} (see {where} --help)", style="bold red")
            code = EXIT_BAD_INPUT
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


@contextlib.contextmanager
def quiet_libraries(debug: bool = False) -> Iterator[None]:
    """Hide what libraries say about themselves; warnings of this package become one line each."""
    if debug:
        yield
        return
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and _is_ours(filename):
            say(f"warning: {one_line(message)}", style="yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _is_ours(filename: str) -> bool:
    """Whether a warning points into this package, installed or editable."""
    import vidllm.eval
    import vidllm.modeling_vidllm
    import vidllm.processing
    import vidllm.train

    packages = (vidllm, vidllm.eval, vidllm.modeling_vidllm, vidllm.processing, vidllm.train)
    roots = {os.path.abspath(path) for package in packages for path in package.__path__}
    return os.path.dirname(os.path.abspath(filename)) in roots


def one_line(error: BaseException | str) -> str:
    """The message of an error without line breaks; errors of the system as `path: reason`."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str, style: str | None = None) -> None:
    """One line on stderr, never wrapped, coloured on a terminal."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(printable(text), style=style)


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something takes long, and what changes its text; nothing where stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(text) as status:
        yield status.update


def printable(text: str) -> str:
    """Text without control characters, which a model could use to rewrite the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def write(text: str = "", end: str = "\n") -> None:
    """A part of the result on stdout, at once; letters that stdout cannot show are replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(printable(text).encode(encoding, "replace").decode(encoding) + end)
    sys.stdout.flush()


def write_json(document: Any) -> None:
    """The whole result as one JSON document on stdout, in ASCII."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()
