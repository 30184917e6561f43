"""The command line: `attnc COMMAND …`, also `python -m attnc`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from attnc import __version__
from attnc.runtime import ascii_text
from attnc.runtime.call_errors import TorchMissingError
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.spec.diagnostics import Diagnostic
from attnc.spec.errors import AttncError, SpecError
from attnc.spec.suggest import did_you_mean

_MODULES = {
    "cache": "cache",
    "check": "check",
    "doctor": "doctor",
    "emit": "emit",
    "explain": "explain",
    "fmt": "fmt",
    "list": "list_patterns",
    "receptive": "receptive",
    "same": "same",
    "show": "show",
    "simulate": "simulate",
    "tune": "tune",
    "verify": "verify",
}
COMMANDS = tuple(_MODULES)

_SUMMARIES = {
    "cache": "what is kept on disk: tuned choices and measured rates; path, show, why, clear, load",
    "check": "find what is wrong in .attn files",
    "doctor": "versions, the machine, and the rates that plans are costed with",
    "emit": "a pattern's kernels as one file that needs torch and triton alone, and checks itself",
    "explain": "what the code of a message means, with an example",
    "fmt": "write .attn files in their one form",
    "list": "the patterns of the library by family, or those that some words find",
    "receptive": "what a token knows of after each layer, and the first one after which it is all that it should",
    "same": "whether two patterns are the same: visible pairs, scores, weights, values; a proof or a witness",
    "show": "the picture of a pattern: elements, tiles, keys per row, exact density",
    "simulate": "how fast a pattern can be on a machine, before anything runs, and with which schedule",
    "tune": "measure the first few schedules of a call, keep the fastest; prediction beside measurement",
    "verify": "compare every executor with the oracle, forward and gradients, where every clause decides a pair",
}
_INTERRUPTED, _PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 fine, 1 something is wrong or different, 2 bad usage or undecidable."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _tolerate_narrow_encodings()
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away; what is left in the buffer must not raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        return _obey(arguments)
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else console.FINE
    except SpecError as error:
        return _refuse_text(error, as_json)
    except ArithmeticError as error:
        if not isinstance(error, AttncError):
            raise
        return _refuse_value(error, as_json)
    except (UsageError, AttncError) as error:
        return _refuse(str(error), as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{where}{error.strerror or type(error).__name__}", as_json)


def _obey(arguments: list[str]) -> int:
    """Run the command that the arguments name, or print the help. Raises TorchMissingError, and whatever it raises."""
    if not arguments:
        _parser(["--help"]).print_help()
        return console.FINE
    try:
        args = _parser(arguments).parse_args(arguments)
        status: int = _module(args.command).run(args)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TorchMissingError(f"`attnc {arguments[0]}`") from error
    return status


def _refuse(message: str, as_json: bool) -> int:
    if as_json:
        console.print_json({"diagnostics": [console.message_json(message)]})
    else:
        console.print_error(message)
    return console.USAGE


def _refuse_text(error: SpecError, as_json: bool) -> int:
    """What is wrong with a text is a finding; values that do not fit it (A8xx) are bad usage."""
    if as_json:
        console.print_json({"diagnostics": console.diagnostics_json(error.diagnostics)})
    else:
        console.print_diagnostics(error.diagnostics)
    usage = all(diagnostic.code.startswith("A8") for diagnostic in error.diagnostics)
    return console.USAGE if usage else console.FOUND


def _refuse_value(error: AttncError, as_json: bool) -> int:
    """An expression of the pattern has no value: a finding."""
    diagnostic = getattr(error, "diagnostic", None)
    if isinstance(diagnostic, Diagnostic):
        _refuse_text(SpecError((diagnostic,)), as_json)
    else:
        _refuse(str(error), as_json)
    return console.FOUND


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are raised."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` shows how it is used")


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: only the command that is called is loaded."""
    parser = _Parser(prog="attnc", description="A compiler for attention patterns.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"attnc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    called = _called(arguments, _SUMMARIES)
    for name, summary in _SUMMARIES.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == called:
            _module(name).add(command)
    return parser


def _called(arguments: list[str], known: Mapping[str, str]) -> str | None:
    """The command that is called. Raises UsageError where there is none of that name."""
    name = next((a for a in arguments if not a.startswith("-")), None)
    listed = f"the commands are {', '.join(known)}"
    if name is None:
        if {"-h", "--help", "--version"} & set(arguments):
            return None
        raise UsageError(f"no command; {listed}")
    if name not in known:
        near = did_you_mean(name, known)
        raise UsageError(f"there is no command `{name}`{': ' + near if near else ''}; {listed}")
    return name


def _module(command: str) -> ModuleType:
    return import_module(f"attnc.runtime.commands.{_MODULES[command]}")


def _tolerate_narrow_encodings() -> None:
    """A character that the terminal cannot show is replaced by plain ones, never a crash and never `?`."""
    for stream in (sys.stdout, sys.stderr):
        if not console.has_unicode(stream) and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ascii_text.HANDLER)


if __name__ == "__main__":
    sys.exit(main())
