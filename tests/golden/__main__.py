"""Command line of the golden runner."""

import argparse

from genssm.errors import cli
from tests.golden import Case, find_cases, run_case
from tests.golden.checks import Check


def summary(case: Case, checks: list[Check]) -> str:
    """One line for a case, and one more for each miss."""
    passed = all(check.passed for check in checks)
    parts = []
    for title, prefix in (("output", "out."), ("gradient", "grad.")):
        group = [check for check in checks if check.name.startswith(prefix)]
        if group:
            error, used = max(check.error for check in group), max(check.used for check in group)
            parts.append(f"{title} error {error:.1e} ({used:.3f} of tolerance, {len(group)} tensors)")
    lines = [f"{'pass' if passed else 'MISS'}  {case.path.stem} [{case.model or '-'}, {case.kind}]  {'; '.join(parts)}"]
    for check in checks:
        if check.note or not check.passed:
            lines.append(
                f"      {check.name}: {check.note or f'error {check.error:.2e}, {check.used:.2f} x tolerance'}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run all cases of the folders; 0 when every one passes."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Run every golden case of the folders through genssm's converters. Per case: the largest error of "
        "an output and of a gradient relative to the tensor's largest value, and the largest share of the case's "
        "tolerance that any element used. Exits with 1 when a case misses or nothing knows how to run it.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder with NAME.safetensors + NAME.json pairs")
    args = parser.parse_args(arguments)
    cases = [case for folder in args.folders for case in find_cases(folder)]
    missed = 0
    for case in cases:
        checks = run_case(case)
        missed += not all(check.passed for check in checks)
        print(summary(case, checks), flush=True)
    print(f"{len(cases) - missed} of {len(cases)} cases pass")
    return 1 if missed else 0


if __name__ == "__main__":
    cli(main)
