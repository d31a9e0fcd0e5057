"""``python -m pmcmc``: the command line."""

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    from pmcmc import demo

    parser = argparse.ArgumentParser(prog="python -m pmcmc", description="Sample Markov chains in parallel in time.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "demo", help="sample example posteriors and compare with sequential sampling and NUTS"
    )
    command.add_argument("names", nargs="*", help=f"examples out of {', '.join(demo.EXAMPLES)}; all by default")
    command.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for plots")
    command.add_argument("--scale", type=float, default=1.0, help="fraction of the full number of draws")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in demo.EXAMPLES]
    if unknown:
        parser.error(f"unknown example {', '.join(unknown)}: choose from {', '.join(demo.EXAMPLES)}")
    demo.run(options.names or list(demo.EXAMPLES), options.output, options.scale)


if __name__ == "__main__":
    main()
