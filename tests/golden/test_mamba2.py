"""The golden cases of the Mamba-2 mixer and of packed sequences under pytest."""

from pathlib import Path

import pytest

from tests.golden import find_cases, mamba2, run_case


@pytest.mark.parametrize(("folder", "kind"), [("aim", "mamba2 mixer"), ("more", "packed scan")])
def test_cases(golden_dir: Path, folder: str, kind: str) -> None:
    assert kind in mamba2.PARTS
    cases = [case for case in find_cases(golden_dir / folder) if case.kind == kind]
    assert cases
    for case in cases:
        checks = run_case(case)
        assert any(check.name.startswith("grad.") for check in checks)
        assert not [check for check in checks if not check.passed], case.path.stem
