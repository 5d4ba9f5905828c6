"""Build settings live in pyproject.toml. What it cannot say is here: a wheel holds the configs, which lie beside the package
in the repository, as fastrobust/configs/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for file in Path("configs").rglob("*.yaml"):
                copy = Path(self.build_lib, "fastrobust", file)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


setup(cmdclass={"build_py": WithConfigs})
