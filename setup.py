"""Package discovery: `kernels/`, `pipelines/` and `configs/` stand at the top of the checkout and ship inside `genssm`.

A static list in pyproject.toml would lose new sub-packages from the wheel while an editable install still finds them.
"""

from setuptools import find_namespace_packages, find_packages, setup

packages = find_packages(include=["genssm", "genssm.*"])
packages += ["genssm.kernels", "genssm.pipelines", "genssm.configs"]
packages += [
    f"genssm.{root}.{package}"
    for root in ("kernels", "pipelines", "configs")
    for package in find_namespace_packages(root)
    if "__pycache__" not in package
]
setup(packages=packages)
