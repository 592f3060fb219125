"""benchmarks/bench_loss.py: counts of work, wrong results that are not timed, files."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bench_loss
import ckd
from common.workers import Failed, Worker
from loss import peers, problem, providers
from loss.bench import Bench, Errors
from tests import oracle

BENCH = Path(bench_loss.__file__)
TINY = "3,7,5,4"
PROVIDERS = "eager,reference,eager-bf16"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), "--seconds", "0.01", *arguments],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_measures_and_shows_what_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run("--case", TINY, "--providers", PROVIDERS, "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert {"commit", "date", "processor", "threads"} <= record["machine"].keys()
    assert record["limits"]["matmul_float32"] > 0
    (case,) = record["cases"]
    assert [row["provider"] for row in case["rows"]] == PROVIDERS.split(",")
    for row in case["rows"]:
        assert set(row["errors"]) == {"loss", "student", "weight", "bias", "logit_scale"}
        for mode in ("step", "forward"):
            assert 0 < row[mode]["p20"] <= row[mode]["p50"] <= row[mode]["p80"]
            assert row[mode]["calls"] >= bench_loss.LEAST_ROUNDS
    shown = run("--show", str(out))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == done.stdout


@pytest.mark.slow
def test_wrong_and_failing_providers_are_rows_and_never_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InProcess:
        """A worker without a process, for fake providers."""

        def __init__(self, provider: str, *_: object) -> None:
            self.provider = provider

        def ask(self, call: str, *arguments: object) -> object:
            if self.provider == "wrong" and call == "errors":
                return Errors({"loss": 1e-7, "student": 2e-3})
            if self.provider == "broken" and call == "memory":
                raise Failed("out of memory")
            if self.provider == "dies" and call == "time":
                raise Failed("killed, out of memory?")
            if self.provider == "nan" and call == "errors":
                return Errors({"loss": float("nan")})
            results = {"truth": None, "memory": 1.0, "errors": Errors({"loss": 1e-7})}
            if call == "time":
                assert self.provider in ("eager", "dies")
                return [1.0, 2.0]
            return results[call]

        def stop(self) -> None:
            pass

    names = ("wrong", "broken", "dies", "nan")
    planted = {name: providers.Provider("", lambda: problem.eager) for name in names}
    absent = providers.Provider("", lambda: problem.eager, missing=lambda: "not installed")
    monkeypatch.setattr(
        providers, "PROVIDERS", {**providers.PROVIDERS, **planted, "absent": absent}
    )
    monkeypatch.setattr(bench_loss, "start", InProcess)
    out = tmp_path / "result.json"
    every = ",".join(["eager", *names, "absent"])
    arguments = ["--case", TINY, "--providers", every, "--seconds", "0.001", "--out", str(out)]
    assert bench_loss.main(arguments) == 1
    rows = {row["provider"]: row for row in json.loads(out.read_text())["cases"][0]["rows"]}
    assert rows["eager"]["step"]["p50"] == 1.5
    assert rows["wrong"]["wrong"] == "an error of 2.0e-03 against float64"
    assert "nan" in rows["nan"]["wrong"]
    assert rows["broken"]["failed"] == "out of memory"
    assert rows["dies"]["failed"] == "killed, out of memory?"
    assert rows["absent"]["failed"] == "not installed"
    assert all("step" not in rows[name] for name in (*names, "absent"))


def test_worker_that_is_killed_says_so() -> None:
    worker = Worker(Bench, "eager", problem.Problem.parse(TINY), threads=1)
    worker._process.kill()
    with pytest.raises(Failed, match="killed"):
        worker.ask("memory")
    worker.stop()


@pytest.mark.parametrize("name", providers.of_device("cpu"))
@pytest.mark.parametrize("text", [TINY, "40,90,16,16,frozen"])
def test_providers_compute_the_same_loss(name: str, text: str) -> None:
    provider = providers.find(name)
    if name in ("compile", "eager-malloc"):
        pytest.skip("takes long, or changes the process")
    reason = provider.missing() or provider.unfit(problem.Problem.parse(text))
    if reason:
        pytest.skip(reason)
    inputs = problem.make_inputs(problem.Problem.parse(text))
    case = oracle.Case(
        inputs.student,
        inputs.bank.float(),
        inputs.target,
        inputs.weight,
        inputs.bias,
        inputs.logit_scale,
    )
    exact = oracle.loss_and_lse(case.cast(torch.float64))[0]
    loss = provider.make()(inputs)
    assert oracle.relative_error(loss, exact) < (2e-2 if provider.half else 1e-5)
    assert len(torch.autograd.grad(loss, inputs.leaves)) == len(inputs.leaves)


def test_inputs_are_the_same_in_every_process() -> None:
    small = problem.Problem.parse(TINY)
    one, other = problem.make_inputs(small), problem.make_inputs(small)
    assert torch.equal(one.bank, other.bank)
    assert torch.equal(one.student, other.student)
    assert not torch.equal(one.bank, problem.make_inputs(small, seed=1).bank)


@pytest.mark.parametrize("learned", [True, False])
def test_operations_are_those_of_the_products(learned: bool) -> None:
    """Against torch's counter of eager's products, plus the logits once more for d_weight."""
    from torch.utils.flop_counter import FlopCounterMode

    size = problem.Problem(6, 10, 8 if not learned else 12, 8, learned)
    inputs = problem.make_inputs(size)

    def count(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def forward() -> Tensor:
        return problem.eager(inputs)

    assert count(forward) == size.forward_flops()
    again = 2 * 6 * 10 * 8 if learned else 0
    # Eager's autograd keeps the logits; `step_flops` counts them again for d_weight.
    step = count(lambda: torch.autograd.grad(forward(), inputs.leaves))
    assert step + again == size.step_flops()


def test_bytes_are_those_of_the_tensors() -> None:
    size = problem.Problem.parse("6,10,12,8")
    inputs = problem.make_inputs(size)
    read = sum(x.numel() * x.element_size() for x in (inputs.bank, *inputs.leaves[:-1]))
    assert size.forward_bytes() == read
    assert size.step_bytes() == 2 * read  # plus the gradients, and the bank again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "nonsense"], "a case is one of call, "),
        (["--case", "1,2,3"], "B,K,D,W"),
        (["--case", "1,2,0,4"], "positive"),
        (["--case", "1,2,3,4,frozen"], "D must equal W"),
        (["--providers", "eager,best"], "a provider is one of eager, "),
        (["--providers", "eager:avx2"], "a provider is one of eager, "),
        (["--providers", "cpu:mmx"], "the tiers for cpu here are"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--competitors", "-1"], "--competitors: expected at least 0, got -1"),
        (["--seconds", "nan"], "--seconds: expected a positive number, got nan"),
        (["--show", "/nowhere/result.json"], "cannot be read"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_loss.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_what_clip_losses_are_compared_with() -> None:
    """Against double loops over the pairs of a batch."""
    inputs = problem.make_inputs(problem.Problem.parse("5,5,8,8,frozen")).cast(torch.float64)
    assert inputs.target.tolist() == list(range(5))
    u = [s / s.norm() for s in inputs.student.detach()]
    n = [t / t.norm() for t in inputs.bank]
    scale = inputs.logit_scale.item()
    logits = [[scale * (a @ b).item() for b in n] for a in u]

    def cross_entropy(rows: list[list[float]]) -> float:
        return sum(math.log(sum(map(math.exp, r))) - r[i] for i, r in enumerate(rows)) / 5

    clip = (cross_entropy(logits) + cross_entropy([list(c) for c in zip(*logits)])) / 2
    assert peers.clip_truth(inputs).item() == pytest.approx(clip, rel=1e-12)
    siglip = sum(
        math.log1p(math.exp((-1 if i == j else 1) * (logit + peers.SIGLIP_BIAS)))
        for i, row in enumerate(logits)
        for j, logit in enumerate(row)
    )
    assert peers.siglip_truth(inputs).item() == pytest.approx(siglip / 5, rel=1e-12)


@pytest.mark.slow
def test_peers_that_cannot_run_are_rows_only_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a peer that lacks the problem's loss; its row has the reason."""
    monkeypatch.setattr(bench_loss, "start", NoWorker)
    peer = providers.Provider(
        "", lambda: problem.eager, is_peer=True, unfit=lambda problem: "unfit"
    )
    monkeypatch.setitem(providers.PROVIDERS, "peer", peer)
    monkeypatch.setattr(providers, "of_device", lambda device: ["eager", "peer"])

    def rows(*more: str) -> list[dict[str, object]]:
        out = tmp_path / "result.json"
        arguments = ["--case", TINY, "--seconds", "0.001", "--device", "cpu", "--out", str(out)]
        assert bench_loss.main([*arguments, *more]) == 0
        found: list[dict[str, object]] = json.loads(out.read_text())["cases"][0]["rows"]
        return found

    assert [row["provider"] for row in rows()] == ["eager"]
    assert [row.get("failed") for row in rows("--providers", "eager,peer")] == [
        None,
        "unfit",
    ]


class NoWorker:
    """A worker that does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def ask(self, call: str, *arguments: object) -> object:
        results = {"truth": None, "memory": 1.0, "errors": Errors({"loss": 1e-7}), "time": [1.0]}
        return results[call]

    def stop(self) -> None:
        pass


@pytest.mark.slow
def test_without_memory_for_the_truth_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next case is still measured. A failure for another reason is raised."""
    reason = "out of memory"

    class Small(NoWorker):
        def __init__(self, provider: str, size: problem.Problem, *_: object) -> None:
            self.size = size

        def ask(self, call: str, *arguments: object) -> object:
            if call == "truth" and self.size.bank_rows > 10:
                raise Failed(reason)
            return super().ask(call, *arguments)

    monkeypatch.setattr(bench_loss, "start", Small)
    out = tmp_path / "result.json"
    cases = ["--case", "4,20,8,8", "--case", "4,10,8,8"]
    few = ["--providers", "eager,reference", "--seconds", "0.001", "--device", "cpu"]
    assert bench_loss.main([*cases, *few, "--out", str(out)]) == 0
    large, small = json.loads(out.read_text())["cases"]
    assert {row["failed"] for row in large["rows"]} == {f"no float64 to compare with: {reason}"}
    assert all("step" in row for row in small["rows"])
    reason = "ValueError: a mistake"
    with pytest.raises(Failed, match="a mistake"):
        bench_loss.main([*cases, *few])


@pytest.mark.slow
def test_csv_and_curves_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loss, "start", NoWorker)
    table, picture = tmp_path / "rows.csv", tmp_path / "curves.png"
    few = ["--providers", "eager,reference", "--seconds", "0.001", "--device", "cpu"]
    outputs = ["--csv", str(table), "--plot", str(picture)]
    assert bench_loss.main(["--sweep", *few, *outputs]) == 0
    lines = list(csv.DictReader(table.open()))
    assert len(lines) == len(problem.SWEEP) * 2 * 2
    assert {line["mode"] for line in lines} == {"step", "forward"}
    assert all(line["torch"] == torch.__version__ and line["p50"] == "1.0" for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_committed_results_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((BENCH.parent / "results").glob("loss-*.json"))
    assert files
    for file in files:
        bench_loss.main(["--show", str(file)])
        assert "+" not in json.loads(file.read_text())["machine"]["commit"], "uncommitted changes"
    assert "| eager |" in capsys.readouterr().out


def test_cpu_row_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = ckd.contrastive_cross_entropy

    def spy(*arguments: object, **options: object) -> object:
        asked.append(options)
        return real(*arguments, **{**options, "backend": "reference"})

    monkeypatch.setattr(ckd, "contrastive_cross_entropy", spy)
    providers.by_backend("cpu", False)(problem.make_inputs(problem.Problem.parse(TINY)))
    assert asked == [{"backend": "cpu"}]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512"
    or bool(providers.PROVIDERS["compile"].missing()),
    reason="needs AVX-512 and a C++ compiler",
)
def test_compiled_code_for_narrower_vectors_is_not_taken_from_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for capability in ("avx2", "avx512"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        done = run("--device", "cpu", "--case", "1,10,64,64", "--providers", "compile")
        assert done.returncode == 0, done.stderr
        (row,) = [line for line in done.stdout.splitlines() if line.startswith("| compile ")]
        assert " to " in row, row + done.stderr  # quantiles of its time


@pytest.mark.slow
def test_providers_of_another_device_are_refused_in_words() -> None:
    done = run("--device", "cpu", "--case", TINY, "--providers", "eager,triton-half")
    assert done.returncode == 2
    assert "'triton-half' does not run on cpu; these do: eager, eager-malloc" in done.stderr
    assert {"triton", "triton-half", "cuda", "cuda-half"} < set(providers.of_device("cuda"))
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in run("--device", "cuda").stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`--show file | head`."""
    file = next((BENCH.parent / "results").glob("loss-*.json"))
    command = [sys.executable, "-u", str(BENCH), "--show", str(file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        shown.stdout.close()
        assert shown.stderr.read() == ""
    assert shown.returncode == 128 + signal.SIGPIPE
