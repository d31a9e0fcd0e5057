"""Command line: ``python -m pmcmc demo`` and ``python -m pmcmc doctor``."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command.

    Args:
        arguments: Words after ``python -m pmcmc``. None: those of ``sys.argv``.

    Returns:
        Exit status: 0, or 1 if ``doctor`` found faults.
    """
    options, parser = _parse(arguments)
    if options.command == "doctor":
        from pmcmc import doctor

        return int(doctor.run(options.seconds) > 0)
    from pmcmc import demo

    if options.list:
        for name, example in demo.EXAMPLES.items():
            print(f"{name:15s} {(example.__doc__ or '').splitlines()[0]}")
        return 0
    unknown = [name for name in options.names if name not in demo.EXAMPLES]
    if unknown:
        parser.error(f"unknown example {', '.join(unknown)}: choose from {', '.join(demo.EXAMPLES)}")
    names = options.names or list(demo.EXAMPLES)
    try:
        demo.check_packages(names)
    except ImportError as error:
        parser.error(str(error))
    demo.run(names, options.output, options.scale)
    return 0


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Parse the command line; also return the parser, for its error messages."""
    parser = argparse.ArgumentParser(prog="python -m pmcmc", description="Sample Markov chains in parallel in time.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "demo", help="sample example posteriors and compare with sequential sampling and NUTS"
    )
    command.add_argument("names", nargs="*", help="examples to run, see --list; all by default")
    command.add_argument("--list", action="store_true", help="print the examples and exit")
    command.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for plots")
    command.add_argument("--scale", type=float, default=1.0, help="fraction of the full number of draws")
    doctor = commands.add_parser("doctor", help="report versions, devices, known faults and the cost of lanes")
    doctor.add_argument("--seconds", type=float, default=10.0, help="seconds of calibration, without compilation")
    return parser.parse_args(arguments), parser


if __name__ == "__main__":
    sys.exit(main())
