"""The test matrix: one session per backend, in which the other array libraries are not installed."""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False  # also under CI: a missing interpreter skips with its reason
nox.options.sessions = ["lint", "numpy", "torch", "jax", "cupy", "rehearsal", "docs", "wheel"]

PROJECT = nox.project.load_toml("pyproject.toml")
TEST = nox.project.dependency_groups(PROJECT, "test")
TEST_TORCH = nox.project.dependency_groups(PROJECT, "test-torch")
TEST_JAX = nox.project.dependency_groups(PROJECT, "test-jax")
BENCH = nox.project.dependency_groups(PROJECT, "bench")
LINT = nox.project.dependency_groups(PROJECT, "lint")
DOCS = nox.project.dependency_groups(PROJECT, "docs")
BROWSER = nox.project.dependency_groups(PROJECT, "browser")
MUTANTS = nox.project.dependency_groups(PROJECT, "mutants")
EXTRAS = PROJECT["project"]["optional-dependencies"]
CONSTRAINTS = ("-c", "tests/constraints.txt")
WORKERS = ("-n", "2", "--dist", "worksteal")
"""Tests run in two processes, as many as CI has cores; ``-- -n 0`` runs them in one."""


def newest(*versions: str) -> str | None:
    """The first of these Pythons that runs here, on the PATH or among pyenv's; None is the one nox runs on."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in versions:
        for found in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")):
            if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
                return str(found)  # pyenv's own python3.x on the PATH may refuse to run
    return None


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-e", ".[demo]", *LINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=["3.11", "3.12", "3.13"])
def numpy(session: nox.Session) -> None:
    """The reference with its kernels, and the command line with what its main job needs."""
    session.install("-e", ".[demo,numba]", *TEST)
    session.run("pytest", *WORKERS, "--backends=numpy", *session.posargs)


@nox.session
def torch(session: nox.Session) -> None:
    session.install("-e", ".[torch,bench,demo]", *TEST_TORCH, *CONSTRAINTS)
    session.run("pytest", *WORKERS, "--backends=numpy,torch", *session.posargs)


@nox.session(python=newest("3.13", "3.12", "3.11"))
def jax(session: nox.Session) -> None:
    """On the newest Python there is: JAX drops old ones early, and pip then finds an old JAX."""
    session.install("-e", ".[jax,demo]", *TEST_JAX)
    session.run("pytest", *WORKERS, "--backends=numpy,jax", *session.posargs)


@nox.session
def cupy(session: nox.Session) -> None:
    if shutil.which("nvidia-smi") is None:
        session.skip("CuPy needs a CUDA device, and nvidia-smi finds none here")
    session.install("-e", ".[cupy-cuda12]", *TEST)
    session.run("pytest", "--backends=numpy,cupy", *session.posargs)


def lowest(*requirements: str) -> list[str]:
    """These requirements at their lower bounds: ``numpy>=2.0`` as ``numpy==2.0``."""
    return [requirement.replace(">=", "==", 1) for requirement in requirements]


@nox.session(python="3.11")
@nox.parametrize("backend", ["numpy", "torch", "jax"])
def minimums(session: nox.Session, backend: str) -> None:
    """The tests at the lower bounds that pyproject.toml states; not in the default set, which takes long enough."""
    groups = {"numpy": TEST, "torch": TEST_TORCH, "jax": TEST_JAX}
    extras = {"numpy": ["demo", "numba"], "torch": ["torch", "bench"], "jax": ["jax"]}
    own = [bound for extra in extras[backend] for bound in EXTRAS[extra]]
    session.install(*lowest(*PROJECT["project"]["dependencies"], *own, *groups[backend]))
    session.install("--no-deps", "-e", ".")
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # here as users have it, whatever it costs
    session.run("pytest", f"--backends={','.join(dict.fromkeys(('numpy', backend)))}", *session.posargs, env=optimized)


@nox.session
def mutants(session: nox.Session) -> None:
    """How many small changes to the code NumPy's tests notice, of a sample; ``-- --sample 0`` tries all, for hours."""
    session.install("-e", ".[numba]", *TEST, *MUTANTS)
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks on this machine, with the packages of others that they compare with."""
    session.install("-e", ".[torch,jax,bench]", *BENCH, *CONSTRAINTS)
    session.run("python", "-m", "benchmarks", *(session.posargs or ["scan", "rnn", "stack", "memory", "crossover"]))


@nox.session
def experiments(session: nox.Session) -> None:
    """The paper's figures and tables on this machine: all of them, in an hour or two."""
    session.install("-e", ".[torch,bench,demo]", *TEST_TORCH, *CONSTRAINTS)
    session.run("python", "-m", "experiments", *(session.posargs or ["all", "--jobs", "2"]))


@nox.session
def rehearsal(session: nox.Session) -> None:
    """What a GPU would be asked, asked of interpreters and a CPU, so that it works on the day there is one."""
    session.install("-e", ".[torch,jax,bench]", *TEST_TORCH, *CONSTRAINTS)
    out = Path(session.create_tmp(), "rehearsal")
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "benchmarks", "gpu", "--rehearse", "--out", str(out), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, strictly: no broken link, no name without an entry; it opens from disk, site/index.html."""
    session.install(*DOCS)
    session.run("mkdocs", "build", "--strict", "--site-dir", "site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def browser(session: nox.Session) -> None:
    """The pages looked at in Chromium, light and dark, narrow and wide; not in the default set, as it is slow."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.skip("looking at pages needs a browser, and there is no chromium here: apt-get install chromium")
    docs(session)
    session.install(*BROWSER)
    session.run("python", "docs/tools/browser.py", "site", str(Path(session.create_tmp(), "screenshots")))


@nox.session
def wheel(session: nox.Session) -> None:
    """What a release would publish: the wheel installed and used, then the source, with its tests of NumPy's pages."""
    session.install("build>=1.2", *TEST)
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", silent=True)
    there = Path(session.create_tmp()).resolve()
    (wheel,), (source,) = (list(Path("dist").resolve().glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    shutil.unpack_archive(source, there)
    session.install(str(wheel))
    session.chdir(there)
    session.run("hbp", "info")
    session.install("--force-reinstall", "--no-deps", str(source))
    session.chdir(there / source.name.removesuffix(".tar.gz"))
    session.run("pytest", "--backends=numpy", "-q", "tests/test_documentation.py", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """All there is to measure on a GPU, tests first, in the environment nox was started in: nothing is installed."""
    session.run("python", "-m", "benchmarks", "gpu", *session.posargs, external=True)
