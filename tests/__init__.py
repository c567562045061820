"""The tests. A package, so that `python -m tests.golden` finds this folder and none of the same name elsewhere."""
