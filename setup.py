"""What pyproject.toml cannot say: the configs live at the top of the repository and ship inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # a clone reads configs/ where it is
        target = Path(self.build_lib) / "hfedmoe" / "configs"
        target.mkdir(parents=True, exist_ok=True)
        for config in sorted(Path("configs").glob("*.toml")):
            self.copy_file(str(config), str(target / config.name))


setup(cmdclass={"build_py": BuildWithConfigs})
