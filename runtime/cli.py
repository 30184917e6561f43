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
from attnc.runtime.call.call_errors import TorchMissingError
from attnc.runtime.commands import console
from attnc.runtime.commands.console import UsageError
from attnc.runtime.process import ascii_text
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
    "cache": "inspect and edit the files on disk: tuned choices and measured rates; path, show, why, clear, load",
    "check": "find what is wrong in .attn files",
    "doctor": "show versions, the machine, and the rates that plans use as costs",
    "emit": "write a pattern's kernels as one self-checking file that needs only torch and triton",
    "explain": "explain the code of a message, with an example",
    "fmt": "format .attn files",
    "list": "list the library's patterns by family, or search them by words",
    "receptive": "show which tokens a token depends on after each layer, and the first layer with all that it should",
    "same": "decide whether two patterns are equal: visible pairs, scores, weights, values; a proof or a witness",
    "show": "draw a pattern: elements, tiles, keys per row, exact density",
    "simulate": "predict how fast a pattern can be on a machine, and with which schedule, without running it",
    "tune": "measure the first few schedules of a call and keep the fastest; prediction beside measurement",
    "verify": "compare every executor with the oracle, forward and gradients, on inputs where every clause matters",
}
_INTERRUPTED, _PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 for success, 1 for a finding or a difference, 2 for bad usage or undecided."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _tolerate_narrow_encodings()
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe; flushing the rest of the buffer at exit must not raise again.
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
    """Run the command that the arguments name, or print the help. Raises TorchMissingError and the command's errors."""
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
    """Print an error of a text, which is a finding; parameters that do not fit (A8xx) are bad usage."""
    if as_json:
        console.print_json({"diagnostics": console.diagnostics_json(error.diagnostics)})
    else:
        console.print_diagnostics(error.diagnostics)
    usage = all(diagnostic.code.startswith("A8") for diagnostic in error.diagnostics)
    return console.USAGE if usage else console.FOUND


def _refuse_value(error: AttncError, as_json: bool) -> int:
    """Print an error of an expression without a value, which is a finding."""
    diagnostic = getattr(error, "diagnostic", None)
    if isinstance(diagnostic, Diagnostic):
        _refuse_text(SpecError((diagnostic,)), as_json)
    else:
        _refuse(str(error), as_json)
    return console.FOUND


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` shows the usage")


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Return the parser for these arguments; only the module of the called command is loaded."""
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


def _called(arguments: list[str], commands: Mapping[str, str]) -> str | None:
    """Return the called command. Raises UsageError for a missing or unknown command."""
    name = next((a for a in arguments if not a.startswith("-")), None)
    listed = f"the commands are {', '.join(commands)}"
    if name is None:
        if {"-h", "--help", "--version"} & set(arguments):
            return None
        raise UsageError(f"no command; {listed}")
    if name not in commands:
        near = did_you_mean(name, commands)
        raise UsageError(f"there is no command `{name}`{': ' + near if near else ''}; {listed}")
    return name


def _module(command: str) -> ModuleType:
    return import_module(f"attnc.runtime.commands.{_MODULES[command]}")


def _tolerate_narrow_encodings() -> None:
    """Replace characters that the terminal cannot show by ASCII text, instead of crashing or printing `?`."""
    for stream in (sys.stdout, sys.stderr):
        if not console.has_unicode(stream) and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ascii_text.HANDLER)


if __name__ == "__main__":
    sys.exit(main())
