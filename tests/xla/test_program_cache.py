"""Programs kept on disk: a second process compiles nothing, and its draws are the same."""

import json
import os
import time
from pathlib import Path

import jax
import pytest

import pmcmc
from pmcmc._xla import disk, folder
from tests.helpers.sources import run_python

RUN = """
import json, sys
import jax, jax.numpy as jnp
from jax import monitoring
counts = {"hits": 0, "misses": 0}
def count(event, **_):
    if event.startswith("/jax/compilation_cache/cache_"):
        counts[event.rsplit("_", 1)[1]] += 1
monitoring.register_event_listener(count)
import logging
jax.config.update("jax_log_compiles", True)
logged = []
class Keep(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())
logging.getLogger("jax").addHandler(Keep())
import pmcmc
assert jax.config.jax_compilation_cache_dir is None  # importing switches nothing on
jax.jit(lambda x: x + 1)(1.0)  # jax has found its cache to be off
pmcmc.cache_programs(sys.argv[1] + " of before")
jax.jit(lambda x: x + 2)(1.0)
folder = pmcmc.cache_programs(sys.argv[1])
scale = float(sys.argv[2])
draws = pmcmc.sample(
    lambda x: -0.5 * jnp.sum((x / scale) ** 2), jnp.zeros(2), 0, num_samples=50, num_warmup=40, progress_bar=False
).get_samples()
names = ("_start_lanes", "run_piece", "draw_noise", "solve_noise", "_tuned_kernel", "constrain")
traced = [line for line in logged if line.startswith("Finished tracing") and any(f" {name} " in line for name in names)]
print(json.dumps({"counts": counts, "draws": draws.tolist(), "folder": str(folder), "traced": traced}))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    run = lambda scale: json.loads(run_python(RUN, str(tmp_path / "programs"), scale).splitlines()[-1])
    first, second, other = run("1.0"), run("1.0"), run("3.0")
    assert first["folder"] == str(tmp_path / "programs")
    assert len(list((tmp_path / "programs").glob("*-program"))) > 5
    assert first["counts"]["misses"] > 5
    assert second["counts"]["misses"] == 0
    assert second["counts"]["hits"] < first["counts"]["misses"]  # most are found without asking JAX
    assert first["traced"]
    assert second["traced"] == []
    assert second["draws"] == first["draws"]
    assert other["draws"] != first["draws"]


@pytest.fixture
def kept_settings():
    """Restore jax's settings of the cache."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    folder.compilation_cache.reset_cache()
    disk.keep_in(None)


def test_which_folder(kept_settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of jax"))
    assert pmcmc.cache_programs() == tmp_path / "of jax"
    assert pmcmc.cache_programs(tmp_path / "named") == tmp_path / "named"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(folder.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    mine = pmcmc.cache_programs()
    assert mine.parent == tmp_path / "home" / "pmcmc"
    assert jax.config.jax_compilation_cache_dir == str(mine)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(folder, "processor", lambda: "another one")
    assert pmcmc.cache_programs() != mine


def test_what_is_not_used_goes_first(kept_settings, tmp_path: Path) -> None:
    for number in range(4):
        file = tmp_path / f"jit_f-{number:064x}-cache"
        file.write_bytes(bytes(100))
        used = time.time() - 1000 * (number + 1 if number else 0)  # the first is the newest, then ever older ones
        os.utime(file, (used, used))
    mine = tmp_path / "results-cache"  # the largest and the oldest
    mine.write_bytes(bytes(1000))
    os.utime(mine, (0, 0))
    (tmp_path / f"folder-{0:064x}-cache").mkdir()
    killed, written = (tmp_path / f"jit_g-{n:064x}-cache" for n in range(2))  # an hour ago, and just now
    killed.touch(), written.touch()
    used = [tmp_path / f"jit_f-{n:064x}-atime" for n in range(4)]  # JAX writes them if it limits the folder by itself
    for file in used:
        file.touch()
    for old in (killed, *used):
        os.utime(old, (time.time() - 3600,) * 2)
    pmcmc.cache_programs(tmp_path, max_bytes=250)
    kept = sorted(file.name for file in tmp_path.iterdir())
    programs = [*(f"jit_f-{n:064x}-{end}" for n in (0, 1) for end in ("atime", "cache")), written.name]
    assert kept == [f"folder-{0:064x}-cache", *programs, "results-cache"]


def test_a_folder_of_somebody_else(kept_settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not be deleted stays."""

    def refuse(self: Path, **_) -> None:
        raise PermissionError(self)

    file = tmp_path / f"jit_f-{0:064x}-cache"
    file.write_bytes(bytes(100))
    monkeypatch.setattr(Path, "unlink", refuse)
    assert pmcmc.cache_programs(tmp_path, max_bytes=10) == tmp_path
    assert file.exists()
