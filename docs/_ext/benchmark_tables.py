"""Tables from benchmarks/results/*.json, made while the site is built: no figure is typed into a page.

A page says ``{benchmark} name`` for one file, and ``{benchmark-others}`` for the files that no page names. The content
of a table is a function of the rows, in `TABLES` by file or in `SUITES` by suite; other files show their plain values.
A page shows the first `MOST_COLUMNS` columns of a table; the others are in tables that the reader can unfold.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
NAMED = re.compile(r"^```\{benchmark\} (\w+)$", re.MULTILINE)

MOST_COLUMNS = 8

Rows = list[dict[str, Any]]
Table = list[list[str]]  # the header first


def number(value: Any) -> str:
    """Whole numbers with commas, others with three digits; "-" for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def columns(**fields: str | Callable[[dict], Any]) -> Callable[[Rows], Table]:
    """A table with one line for each row; fields: header (underscores for blanks) = key, or function of the row."""

    def table(rows: Rows) -> Table:
        read = lambda row, field: row.get(field) if isinstance(field, str) else field(row)
        header = [name.replace("_", " ") for name in fields]
        return [header, *([number(read(row, field)) for field in fields.values()] for row in rows)]

    return table


def milliseconds(key: str) -> Callable[[dict], Any]:
    return lambda row: 1000 * row[key]["median_s"]


def nanoseconds(key: str) -> Callable[[dict], Any]:
    return lambda row: row[key]["median"] if key in row else None


def extremes(timing: dict[str, float]) -> str:
    """Smallest to largest, in milliseconds."""
    return f"{number(1000 * timing['min_s'])} to {number(1000 * timing['max_s'])}"


def span(key: str) -> Callable[[dict], str]:
    """A list of smallest, median, largest."""
    return lambda row: " / ".join(number(x) for x in row[key])


def pivot(rows: Rows, across: str, cell: Callable[[Rows], str], *down: str) -> Table:
    """One row for each combination of the fields ``down``, one column for each value of the field ``across``."""
    header = list(dict.fromkeys(row[across] for row in rows))
    groups: dict[tuple, dict[str, Rows]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in down), {}).setdefault(row[across], []).append(row)
    body = [
        [*map(number, key), *(cell(group[name]) if name in group else "" for name in header)]
        for key, group in groups.items()
    ]
    return [[name.replace("_", " ") for name in (*down, *header)], *body]


def iterations(length: int) -> Callable[[Rows], Table]:
    """Median iterations over seeds by problem and solver, at one T, and the mean Lyapunov exponent."""

    def cell(group: Rows) -> str:
        solved = [row["num_iters"] for row in group if row["result"] == "successful"]
        return number(int(median(solved))) if len(solved) == len(group) else "-"

    def table(rows: Rows) -> Table:
        exponents: dict[str, list[float]] = {}
        for row in rows:
            exponents.setdefault(row["problem"], []).append(row["lyapunov_exponent"])
        shown = [row for row in rows if row["length"] == length]
        shown.sort(key=lambda row: row["solver"] == "Picard")  # last: it takes T iterations wherever it was run
        found = pivot(shown, "solver", cell, "problem")
        mean = lambda name: f"{round(sum(exponents[name]) / len(exponents[name]), 3) + 0.0:.3f}"  # no minus at zero
        return [["problem", "LLE", *found[0][1:]], *([row[0], mean(row[0]), *row[1:]] for row in found[1:])]

    return table


def merge_times(rows: Rows) -> Table:
    """Median and largest merge time of the pairs, by kernel and posterior."""

    def cell(group: Rows) -> str:
        (row,) = group
        if row["merged"] == len(row["steps"]):
            return f"{number(int(median(row['steps']) + 0.5))} / {number(max(row['steps']))}"
        return f"{row['merged']} of {len(row['steps'])} merged"

    return pivot(rows, "posterior", cell, "kernel")


def forms(rows: Rows) -> Table:
    """Effective draws per 1,000 gradients (median over the seeds), and merges of all pairs, by model and form."""

    def cell(group: Rows) -> str:
        steps = [step for row in group for step in row["steps"]]
        merged = [step for step in steps if step is not None]
        longest = f" within {number(max(merged))}" if merged else ""
        ess = number(round(median(row["ess_per_1000_gradients"] for row in group), 1))
        return f"{ess}; {len(merged)} of {len(steps)}{longest}"

    return pivot(rows, "form", cell, "model")


# Of whole calls: heading of a group of columns, and the key of a run.
CALL_GROUPS = {
    "ESS 400": "seconds_to_400",
    "ESS 4,000": "seconds_to_4000",
    "seconds": "seconds",
    "min ESS": "min_ess",
}


def whole_calls(rows: Rows) -> Table:
    """One row for each posterior, length and use of the cache; one column for each figure and sampler."""
    methods = list(dict.fromkeys(name for row in rows for name in row["runs"]))
    table = [["posterior", *(f"{name}, {group}" for group in CALL_GROUPS for name in methods)]]
    for row in rows:
        what = f"{row['posterior'].replace('_', ' ')}, {number(row['num_samples'])}"
        runs = [row["runs"].get(name, {}) for name in methods]
        cells = [call_cell(run, key) for key in CALL_GROUPS.values() for run in runs]
        table.append([what + (", cache" if row.get("cached") else ""), *cells])
    return table


def call_cell(run: dict[str, Any], key: str) -> str:
    """A figure, marked if the draws differ from those of other samplers, or that the run failed."""
    if "error" in run:
        return "failed" if key == "seconds" else "-"
    return number(run.get(key)) + (" (differs)" if run.get("agrees") is False and key == "seconds" else "")


TABLES: dict[str, Callable[[Rows], Table]] = {
    "hierarchies": forms,
    "planner_cpu": columns(
        posterior="posterior",
        kernel=lambda row: row["pair"].split("/", 1)[1],
        auto_took=lambda row: row["runs"]["auto"]["decision"],
        best="best",
        regret="regret",
        speedup="speedup",
        whole_call_regret="regret_with_warmup",
        whole_call_speedup="speedup_with_warmup",
        steps="num_samples",
    ),
    "gpu_programs": columns(
        program=lambda row: f"{row['case']}, {row['program']}, {row['lanes']:,} lanes",
        jax="jax",
        launches="launches",
        enqueues="enqueues",
        waits="waits",
        repair_launches="repair_launches",
        repair_enqueues="repair_enqueues",
        repair_waits="repair_waits",
        visit_launches="visit_launches",
        compare_and_swap="swaps",
        TF32="tf32",
        spilled_bytes="spills",
        temporary_MiB=lambda row: row["temporary_bytes"] / 2**20,
        compile_s="compile_s",
    ),
    "counts": columns(suite="suite", case="case", count="count", value=lambda row: f"{row['value']:,g}"),
    "whole_call_cpu": whole_calls,
    "claims": columns(
        case="case",
        runs="runs",
        wrong="wrong",
        warned="warned",
        silent="silent",
        unseen="unseen",
        alarms="alarms",
        false_bias="false_bias",
        largest_error_sd="largest_error_sd",
    ),
    "solvers": columns(
        problem="problem",
        method="method",
        T="length",
        seeds=lambda row: "{} to {}".format(*row["seeds"]),
        here=span("min_median_max"),
        published=span("published"),
        chains_unsolved="unsolved",
    ),
    "coalescence": merge_times,
    "recurrence_iterations": iterations(256),
    "chain_iterations": iterations(256),
}

# Of files whose rows name a suite, whatever the device is called.
SUITES: dict[str, Callable[[Rows], Table]] = {
    "kernels": columns(
        case="case",
        T="length",
        blocks="num_blocks",
        critical_path="num_sequential_steps",
        shooting_ms=milliseconds("shooting"),
        speedup="speedup",
        over_best_sequential="speedup_over_best",
        efficiency_vs_own_lanes="efficiency",
        sequential_ms=milliseconds("sequential"),
        D="dim",
        coalescence=lambda row: f"{number(round(row['coalescence_mean']))} / {number(row['coalescence_longest'])}",
        work="evaluations_per_step",
        share_of_path="share_of_path",
        efficiency_vs_own_lanes_at_best_P=lambda row: (
            f"{number(row['efficiency_at_best'])} (P = {number(row['best_limit_blocks'])})"
        ),
        repair_step_cost="repair_step_cost",
        shooting_ms_range=lambda row: extremes(row["shooting"]),
        bytes_per_draw=lambda row: number(round(row["bytes_per_draw"])),
        compile_s=lambda row: next(x["compile_s"] for x in row["tried"] if x["num_blocks"] == row["num_blocks"]),
        result="result",
    ),
    "lanes": columns(
        case="case",
        lanes="lanes",
        together_ns=nanoseconds("together"),
        C_ns=nanoseconds("C together"),
        over_C="over_c",
        one_chain_ns=nanoseconds("sequential 1"),
        four_chains_ns=nanoseconds("sequential 4"),
        noise_ns=nanoseconds("noise"),
        steps_ns=nanoseconds("steps"),
        C_noise_ns=nanoseconds("C noise"),
        C_steps_ns=nanoseconds("C steps"),
        C_all_cores_ns=nanoseconds("C all cores"),
        over_C_all_cores="over_c_all_cores",
        lane_steps="lane_steps",
    ),
    "scaling": columns(
        axis="axis",
        value="value",
        case="case",
        blocks="num_blocks",
        critical_path="num_sequential_steps",
        shooting_ms=milliseconds("shooting"),
        speedup="speedup",
        efficiency_vs_own_lanes="efficiency",
        T="length",
        chains="num_chains",
        sequential_ms=milliseconds("sequential"),
        result="result",
    ),
    "memory": columns(
        what="what",
        D="dim",
        arguments="bytes_arguments",
        additional="bytes_beside_them",
        resident="resident",
        before="before",
        draws="draws",
        decision="decision",
    ),
    "devices": columns(
        posterior="posterior",
        kernel="kernel",
        solver="solver",
        critical_path=lambda row: row["num_sequential_steps"]["all devices"],
        one_device_ms=milliseconds("one device"),
        two_devices_ms=milliseconds("all devices"),
        speedup="speedup",
        cores_busy="cores_busy",
        T="length",
    ),
    "end-to-end": columns(
        posterior="posterior",
        method="method",
        chains="num_chains",
        draws_a_chain="num_samples",
        min_ESS="min_ess",
        seconds="seconds",
        reached="reached",
        failed="error",
    ),
}


def plain(rows: Rows) -> Table:
    """The values that are no lists or dicts, under their own names."""
    keys = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list | dict)))
    return columns(**{key: key for key in keys})(rows)


def render(path: Path) -> tuple[Table, str]:
    """The table of a file, and the sentence that says where its figures come from."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    where = stored["environment"]
    precision = "float64" if where.get("x64") else "float32"
    machine = f"{where['device']}, {where['cores']} cores, {where['machine']}"
    others = where.get("packages", {}) | where.get("peers", {})  # that were compared with pmcmc
    packages = ", ".join(f"{name} {version}" for name, version in ({"jax": where["jax"]} | others).items())
    versions = f"Python {where['python']}, {packages}, {precision}"
    rows = stored["rows"]
    table = TABLES.get(path.stem) or SUITES.get(rows[0].get("suite", ""), plain)
    return table(rows), f"{machine}; {versions}; benchmarks/results/{path.name}"


def unnamed() -> list[Path]:
    """Result files that no page names."""
    named = {name for page in DOCS.glob("*.md") for name in NAMED.findall(page.read_text(encoding="utf-8"))}
    return sorted(path for path in RESULTS.glob("*.json") if path.stem not in named)


class Benchmark(SphinxDirective):
    """``{benchmark} name``: the table of one file."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return show(self, RESULTS / f"{self.arguments[0]}.json")


class Others(SphinxDirective):
    """``{benchmark-others}``: the tables of all files that no page names."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for path in unnamed():
            found += [nodes.rubric("", path.stem.replace("_", " ")), *show(self, path)]
        return found


def parts(table: Table, most: int = MOST_COLUMNS) -> list[Table]:
    """The table in tables of at most ``most`` columns, without columns that hold no value.

    The columns that tell the rows apart (the fewest from the left that do) are in each of them.
    """
    columns = [column for column in zip(*table, strict=True) if set(column[1:]) - {"-", ""}]
    num_keys = next((n for n in range(1, most) if len(set(zip(*columns[:n], strict=True))) == len(table)), 1)
    keys, first, rest = columns[:num_keys], columns[num_keys:most], columns[most:]
    step = most - num_keys
    groups = [first, *(rest[start : start + step] for start in range(0, len(rest), step))]
    return [[list(row) for row in zip(*keys, *group, strict=True)] for group in groups]


def show(directive: SphinxDirective, path: Path) -> list[nodes.Node]:
    directive.env.note_dependency(str(path))
    table, source = render(path)
    shown, *folded = map(as_table, parts(table))
    caption = nodes.paragraph("", "", nodes.emphasis("", source), classes=["source"])
    if not folded:
        return [shown, caption]
    opening = nodes.raw("", "<details><summary>More columns</summary>", format="html")
    return [shown, opening, *folded, nodes.raw("", "</details>", format="html"), caption]


def as_table(rows: Table) -> nodes.table:
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in rows[0]), cols=len(rows[0]))
    for part, content in ((nodes.thead, rows[:1]), (nodes.tbody, rows[1:])):
        group += part("", *(nodes.row("", *map(as_entry, row)) for row in content))
    return nodes.table("", group, classes=["figures"])


def as_entry(text: str) -> nodes.entry:
    return nodes.entry("", nodes.paragraph("", text.replace("_", " ")))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("benchmark", Benchmark)
    app.add_directive("benchmark-others", Others)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
