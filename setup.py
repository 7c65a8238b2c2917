"""Put `conf/` and `launch/`, which are at the repository's root, into the package of a wheel.

All else is in pyproject.toml, which has no way to say this without listing every package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_bai", "megatron_bai.*"]), "megatron_bai.conf", "megatron_bai.launch"],
    package_dir={"megatron_bai.conf": "conf", "megatron_bai.launch": "launch"},
    package_data={"megatron_bai": ["py.typed"], "megatron_bai.conf": ["**/*.yaml"], "megatron_bai.launch": ["**/*"]},
    include_package_data=False,
)
