"""The results of bench_loss.py as tables, CSV rows and curves."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckd._files import atomic_write
from common import report as common_report
from common.report import Record, duration
from loss.bench import FORWARD, STEP
from loss.problem import Problem


def show(record: Record) -> None:
    show_machine(record)
    for case in record["cases"]:
        show_case(case, record["limits"])


def show_machine(record: Record) -> None:
    about = record["machine"]
    common_report.show_machine(about, f"tier {next(iter(about['tiers']), 'none')}")
    print(", ".join(f"{k} {v:,.0f} G/s" for k, v in record["limits"].items()))
    if record["competitors"]:
        print(f"competing with {record['competitors']} busy processes")


def show_case(case: Record, limits: Record) -> None:
    problem = Problem(**case["problem"])
    print(f"\n### {case['name']}: B,K,D,W = {problem}\n")
    floors = {"float32": floor(case, limits, False), "bfloat16": floor(case, limits, True)}
    known = ", ".join(f"{name} {duration(x)}" for name, x in floors.items() if x is not None)
    print(
        f"{case['step_flops'] / 1e9:,.3g} G operations, {case['step_bytes'] / 1e6:,.3g} MB "
        f"at least; floor {known or 'unknown'}\n"
    )
    first = case["rows"][0]
    print(
        "| provider | step p50 (p20 to p80) | of first | forward p50 | of first | G op/s | of peak "
        "| GB/s | of read | extra MiB | of first | worst error |\n|---|" + "---:|" * 11
    )
    for row in case["rows"]:
        why = row.get("failed") or row.get("wrong")
        if why:
            print(f"| {row['provider']} | {why} |" + " |" * 10)
            continue
        step, forward = row[STEP], row[FORWARD]
        rate, peak = case["step_flops"] / step["p50"] / 1e9, gemm_rate(limits, row["half"])
        moved = case["step_bytes"] / step["p50"] / 1e9
        spread = f"{duration(step['p20'])} to {duration(step['p80'])}"
        cells = [
            row["provider"],
            f"{duration(step['p50'])} ({spread})",
            ratio(row, first, STEP),
            duration(forward["p50"]),
            ratio(row, first, FORWARD),
            f"{rate:,.0f}",
            "" if peak is None else f"{rate / peak:.0%}",
            f"{moved:,.1f}",
            f"{moved / limits['read']:.0%}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f}",
            ratio(row, first, "peak_mib"),
            f"{max(row['errors'].values()):.1e}",
        ]
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def gemm_rate(limits: Record, half: bool) -> float | None:
    return limits.get("gemm_bfloat16" if half else "gemm_float32")


def floor(case: Record, limits: Record, half: bool) -> float | None:
    """A lower bound of a step's seconds on this machine (a roofline): arithmetic or memory."""
    rate = gemm_rate(limits, half)
    if rate is None:
        return None
    return max(case["step_flops"] / rate, case["step_bytes"] / limits["read"]) / 1e9


def ratio(row: Record, first: Record, key: str) -> str:
    mine, other = row.get(key), first.get(key)
    if isinstance(mine, dict) and isinstance(other, dict):
        mine, other = mine["p50"], other["p50"]
    return f"{mine / other:.3f}" if mine is not None and other else ""


FIELDS = [
    *("case", "batch", "bank_rows", "teacher_dim", "student_dim", "learned", "provider", "mode"),
    *("p20", "p50", "p80", "calls", "gflops", "gbytes", "peak_mib", "worst_error", "failed"),
]
ABOUT = ["processor", "gpu", "threads", "torch", "triton", "ckd", "commit", "date"]


def write_csv(record: Record, path: Path) -> None:
    """A line for each case, provider and mode; times in seconds, rates in 10^9 a second."""
    common_report.write_csv(path, [*FIELDS, *ABOUT], csv_lines(record))


def csv_lines(record: Record) -> Iterator[Record]:
    for case in record["cases"]:
        for row in case["rows"]:
            line = record["machine"] | case["problem"]
            line |= {"case": case["name"], "provider": row["provider"]}
            failed = row.get("failed") or row.get("wrong")
            if failed:
                yield line | {"failed": failed}
                continue
            line |= {"peak_mib": row["peak_mib"], "worst_error": max(row["errors"].values())}
            for mode in (STEP, FORWARD):
                rates = {
                    "gflops": case[f"{mode}_flops"] / row[mode]["p50"] / 1e9,
                    "gbytes": case[f"{mode}_bytes"] / row[mode]["p50"] / 1e9,
                }
                yield line | row[mode] | rates | {"mode": mode}


def plot(record: Record, path: Path) -> None:
    """Plot time and memory of a step over the bank's rows, for the cases that share B, D and W.

    Raises ValueError if no two cases share them, ImportError without matplotlib.
    """
    cases = longest_sweep(record["cases"])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for provider in dict.fromkeys(row["provider"] for case in cases for row in case["rows"]):
        found = [
            (case["problem"]["bank_rows"], row)
            for case in cases
            for row in case["rows"]
            if row["provider"] == provider and STEP in row
        ]
        rows = [k for k, _ in found]
        axes[0].plot(rows, [row[STEP]["p50"] * 1e3 for _, row in found], "o-", label=provider)
        axes[1].plot(rows, [row["peak_mib"] for _, row in found], "o-", label=provider)
    for axis, label in zip(axes, ("step, ms", "extra memory, MiB")):
        axis.set(xscale="log", yscale="log", xlabel="rows of the bank", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    p, about = cases[0]["problem"], record["machine"]
    figure.suptitle(
        f"B {p['batch']}, D {p['teacher_dim']}, W {p['student_dim']}: "
        f"{about.get('gpu') or about['processor']}, {about['date'][:10]}",
        fontsize="medium",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, picture.getvalue())


def longest_sweep(cases: list[Record]) -> list[Record]:
    """The largest group of cases that differ only in the bank's rows, sorted by them. Raises
    ValueError if no two cases do."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for case in cases:
        sizes = tuple(v for name, v in case["problem"].items() if name != "bank_rows")
        groups.setdefault(sizes, []).append(case)
    longest = max(groups.values(), key=len, default=[])
    if len(longest) < 2:
        raise ValueError("a curve needs two cases of the same B, D and W: run with --sweep")
    return sorted(longest, key=lambda case: int(case["problem"]["bank_rows"]))
