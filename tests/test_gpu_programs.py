"""The counts of programs for a GPU: reading XLA's dumps, and the gate. Nothing is compiled for a GPU here."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu_programs
from benchmarks._gpu_dumps import Loop, Work, loops_of, machine_code, parse, phases
from benchmarks._harness import RESULTS

ROOT = Path(__file__).parents[1]

# A solve: two launches in a graph; a loop over chunks of 16 steps, each with a loop of unknown length within the step;
# repair, with one launch outside the graph in each step.
THUNKS = """\
000: kCommandBuffer [source | next=003 (1)]
    001: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
    002: kCopy         [source | sink] kCopy
003: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    004: kCustomKernel [source | sink] wrapped_compare
  body:
    005: kCustomKernel [source | sink] loop_slice
    006: kWhile [prev=005 (1) | next=000 (1)]
condition:
        007: kCustomKernel [source | sink] loop_compare_fusion
      body:
        000: kCommandBuffer [source | sink]
            008: kCustomKernel [source | sink] loop_a
            009: kDynamicSliceFusion [source | sink] params=1, results=1
                010: kCopy [source | sink] kCopy
        011: kWhile [prev=005 (1) | next=000 (1)]
condition:
            012: kCustomKernel [source | sink] leapfrog_goes_on
          body:
            013: kCustomKernel [source | sink] leapfrog
            014: kAsyncStart [source | sink] stream=computation_stream[0], async_id=37
                015: kCopy [source | sink] kCopy
            016: kAsyncDone [source | sink] async_id=37
017: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    018: kCustomKernel [source | sink] sweep_goes_on
  body:
    019: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        020: kCustomKernel [source | sink] step_goes_on
      body:
        000: kCommandBuffer [source | sink]
            021: kCustomKernel [source | sink] a
            022: kCustomKernel [source | sink] b
        023: kConditional [source | sink]
          false_branch:
            024: kCustomKernel [source | sink] c
          true_branch:
            025: kCustomKernel [source | sink] d
            026: kCustomKernel [source | sink] e
"""
WALK, REPAIR = ["pmcmc/recurrence/sequential.py:walk"], ["pmcmc/recurrence/shooting/repair.py:repair_sweep"]
LOOPS = {
    3: Loop(None, WALK),
    6: Loop(16, WALK),
    11: Loop(None, [*WALK, "pmcmc/kernels/hmc.py:integrate"], turns=4),
    17: Loop(None, ["pmcmc/recurrence/shooting/solver.py:_run"]),
    19: Loop(None, REPAIR),
}


def tree(text: str = THUNKS):
    root = parse(text)
    for thunk in root.every():
        if thunk.kind == "kWhile":
            thunk.loop = LOOPS[thunk.number]
    return root


def test_a_step_is_counted_with_its_loops_and_its_share_of_a_chunk() -> None:
    zeroth, repair, visit = phases(tree())
    leapfrogs = Work(4 * 3 + 1, 4 * 3 + 1, 5)  # the fifth check ends the loop
    chunk = Work(16 * (2 + leapfrogs.launches) + 2, 16 * (1 + leapfrogs.enqueues) + 2, 16 * leapfrogs.waits + 1)
    assert zeroth == chunk * (1 / 16)
    assert repair == Work(1 + 2 + 2, 1 + 1 + 2, 2)
    assert visit is None


def test_what_is_in_a_graph_asks_nothing_of_the_host() -> None:
    """As where XLA puts loops into graphs."""
    inner = "\n".join("    " * (not line.endswith("condition:")) + line for line in THUNKS.splitlines())
    zeroth, repair, _ = phases(tree(f"000: kCommandBuffer [source | sink]\n{inner}"))
    assert (zeroth.enqueues, zeroth.waits, repair.enqueues, repair.waits) == (0, 0, 0, 0)
    assert zeroth.launches == phases(tree())[0].launches


def test_lanes_at_steps_of_their_own() -> None:
    """The loop within a loop of unknown length is a leapfrog; what surrounds it is a visit."""
    text = THUNKS[: THUNKS.index("017")]
    root = parse(text)
    for thunk in root.every():
        if thunk.kind == "kWhile":
            thunk.loop = Loop(None, WALK) if thunk.number != 11 else LOOPS[11]
    step, repair, visit = phases(root)
    assert step == Work(1 + 2 + 13, 1 + 1 + 13, 1 + 5)
    assert visit == Work(2, 2, 1)
    assert repair is None


HLO = f"""HloModule jit_solve

FileNames
1 "{ROOT}/pmcmc/recurrence/sequential.py"
2 "/elsewhere/model.py"

FunctionNames
1 "walk"
2 "walk.<locals>.body"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1 column=1}}
2 {{file_name_id=2 function_name_id=2 line=1 column=1}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

%a = (s32[]) while(%t), metadata={{scheduling_name="while.1" stack_frame_id=1}}
%b = (s32[]) while(%t), metadata={{scheduling_name="while.2" stack_frame_id=2}}, backend_config={{"known_trip_count":{{"n":"16"}}}}
"""  # noqa: E501


def test_loops_are_known_by_the_functions_that_wrote_them() -> None:
    found = loops_of(HLO)
    assert found["while.1"] == Loop(None, ["pmcmc/recurrence/sequential.py:walk"])
    assert found["while.2"].trips == 16
    assert found["while.2"].functions[-1] == "/elsewhere/model.py:walk.<locals>.body"
    assert all(loop.is_over_steps for loop in found.values())
    assert not Loop(None, ["pmcmc/recurrence/sequential.py:walk", "pmcmc/kernels/hmc.py:integrate"]).is_over_steps
    assert not Loop(None, []).is_over_steps


def test_instructions() -> None:
    texts = [
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1};\nwgmma.mma_async.sync.f32.tf32.tf32 a;\nmma.f16 b;"
    ]
    texts += ["atom.relaxed.sys.global.cas.b32 %r3, [%rd5];\natom.global.add.f32 a;\natom.global.cas.b32 c;"]
    product = '%dot = f32[8,8] custom-call(%a), custom_call_target="__cublas$gemm", {"operand_precision":["%s","%s"]}'
    code = machine_code(texts, "\n".join(product.replace("%s", name) for name in ("DEFAULT", "HIGHEST")))
    assert (code.tf32, code.swaps) == (2 + 1, 2)


ROW = {
    "jax": "0.11.2",
    "case": "a",
    "lanes": 8,
    "program": "solve",
    **dict.fromkeys(gpu_programs.COUNTS, 10.0),
    **dict.fromkeys(("swaps", *gpu_programs.EXACT), 0),
    "visit_launches": None,
    "temporary_bytes": 1000,
    "compile_s": 1.0,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"launches": 11.0, "temporary_bytes": 1100, "compile_s": 9.0}, ""),
        ({"launches": 11.1}, "launches 10.0 before, 11.1 now"),
        ({"repair_waits": 12.0}, "repair_waits 10.0 before, 12.0 now"),
        ({"visit_launches": 3.0}, "visit_launches None before, 3.0 now"),
        ({"temporary_bytes": 1101}, "temporary_bytes 1000 before, 1101 now"),
        ({"tf32": 1}, "1 tf32, and there should be none"),
        ({"spills": 8}, "8 spills, and there should be none"),
        ({"program": "solve as graphs"}, "10 enqueues a step, which a graph does not need"),
        ({"swaps": 1}, "swaps 0 before, 1 now"),
        ({"jax": "0.10.2"}, "not in the file"),
    ],
)
def test_the_gate(change: dict, said: str, capsys: pytest.CaptureFixture) -> None:
    lines = gpu_programs.compare([ROW | change], [ROW])
    assert bool(lines) == bool(said)
    assert said in "".join(lines)


def test_the_file_keeps_its_limits() -> None:
    rows = json.loads((RESULTS / f"{gpu_programs.NAME}.json").read_text(encoding="utf-8"))["rows"]
    assert [line for row in rows for line in gpu_programs.limits(row)] == []
    cases = {row["case"] for row in rows if row["jax"] == "0.11.2" and row["program"] == "solve"}
    assert cases == {gpu_programs.CASES[job.case]().name for job in gpu_programs.SOLVES}
    swaps = {row["case"]: row["swaps"] for row in rows if row["jax"] == "0.11.2"}
    assert swaps["varying intercepts, HMC"] == swaps["intercepts, MALA"] == 0
