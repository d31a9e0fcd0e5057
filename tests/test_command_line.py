"""``python -m pmcmc``: what the doctor finds, and the names of the examples."""

import tomllib
from pathlib import Path

import jax
import pytest

from pmcmc import doctor
from pmcmc.__main__ import main

ROOT = Path(__file__).parents[1]


def test_doctor(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LANES", (1, 4, 8192))
    assert main(["doctor", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    for expected in (f"jax {jax.__version__}", "Device 0", "float64", "sound", "successful", "100.0%", "No things"):
        assert expected in out
    table = [line.split() for line in out.split("second\n")[1].splitlines()[:2]]
    assert [row[0] for row in table] == ["1", "4"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in table)


@pytest.mark.parametrize(
    ("installed", "seen", "remedy"),
    [
        ({"numpyro": None}, "numpyro is not installed", "pip install 'numpyro>=0.19'"),
        ({"jax": "0.6.9"}, "jax 0.6.9 is older than 0.7.2", "pip install --upgrade 'jax>=0.7.2'"),
        ({"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.7.2"}, "does not match jaxlib", "jax[cuda12]"),
    ],
)
def test_doctor_sees_versions(installed: dict, seen: str, remedy: str) -> None:
    sound = {**{name: "99.0" for name in doctor.DEPENDENCIES}, "jaxlib": "99.0"}
    assert [f.remedy for f in doctor.versions(sound.get)] == [""]
    wrong = [f for f in doctor.versions({**sound, **installed}.get) if f.remedy]
    assert len(wrong) == 1
    assert seen in wrong[0].text
    assert remedy in wrong[0].remedy


def test_doctor_sees_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(doctor, "SLOW_RATIO", 0)
    monkeypatch.setattr(doctor, "_blocks", lambda: doctor.Finding("Blocks."))
    assert ["one_hot" in finding.remedy for finding in doctor._scatters()] == [True, True]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    with jax.debug_nans(True):
        remedies = [f.remedy for f in doctor.settings() if f.remedy]
    assert len(remedies) == 2
    monkeypatch.setattr(doctor, "calibration", lambda seconds: iter(()))
    assert main(["doctor"]) == 1
    assert "3 things to fix" in capsys.readouterr().out


def test_doctor_sees_which_programs_scatter_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each form: the sum once, then pmcmc's program and jax's own."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seconds = iter([1.0, 3.0, 3.0, 5.0, 500.0])
    monkeypatch.setattr(doctor, "_seconds", lambda fn, *args: next(seconds))
    plain, gathered = doctor._scatters()
    assert not plain.remedy
    assert not gathered.remedy
    assert "takes 3 times their sum: the gradients of hierarchical models are sound" in plain.text
    assert "takes 5 times their sum in pmcmc's programs, and 500 times in others" in gathered.text


def test_doctor_sees_products_of_fewer_bits() -> None:
    """TF32 keeps 10 bits of each operand."""
    cut = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    assert not doctor._product().remedy
    assert "Unset jax_default_matmul_precision" in doctor._product(lambda a, b: cut(a) @ cut(b)).remedy


def test_doctor_asks_for_what_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert declared == [f"{name}>={least}" for name, least in doctor.DEPENDENCIES.items()]


def test_names_of_examples(capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", "--list"]) == 0
    assert "eight_schools   Rubin (1981)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "nine_schools"])
    assert "choose from eight_schools, logistic" in capsys.readouterr().err
