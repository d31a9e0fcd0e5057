"""What README and the command line promise: the example runs as printed, and so does the demo."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pmcmc.__main__ import main

pytestmark = pytest.mark.optimized

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_example_runs_as_printed(tmp_path: Path) -> None:
    code = EXAMPLES[0]
    code += '\nprint(chain.get_samples()["theta"].shape, "sample_stats" in str(idata))\n'
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert any(tmp_path.iterdir()) or sys.platform == "darwin"
    assert "Decision: " in done.stdout  # which one, and whether there is time for a pilot, depends on the machine
    assert "Certificate: " in done.stdout
    assert done.stdout.strip().endswith("(400000, 8) True")


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES[1:], ids=["gibbs", "discrete"])
def test_readme_examples_of_discrete_sites(code: str) -> None:
    code += '\nassert chain.get_samples()["z"].shape[1:] == (6,) and chain.get_samples()["z"].dtype.kind == "i"\n'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight_schools", "logistic"])
def test_demo_reports_and_plots(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["demo", name, "--scale", "0.01", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Decision:" in printed
    assert "ess_bulk (NUTS)" in printed
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_unknown_demo_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "nine_schools"])
    assert "nine_schools" in capsys.readouterr().err
