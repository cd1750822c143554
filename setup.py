"""Packaging: everything that varies stands in settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def lines(key):
    """The non-empty lines of the setting `key`: one requirement each."""
    return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]


readme = ROOT / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    python_requires=f">={settings['min_python']}",
    # Said outright, it makes an editable install a plain entry in sys.path. Otherwise setuptools
    # adds an import hook, which finds the modules of the repository inside any other copy of the
    # package too, and tools/check_days.py would not see that a day imports a later one.
    package_dir={"": "."},
    packages=find_packages(include=["nanovllm", "nanovllm.*"]),
    # The bundled checkpoint is data of the package, not a package of its own. C is compiled where
    # it runs.
    package_data={"nanovllm": ["demo_model/*"], "": ["*.c", "*.h", "*.html"]},
    install_requires=lines("requirements"),
    extras_require={
        "flash-attn": lines("flash_attn_requirements"),
        "serve": lines("serve_requirements"),
        "dev": lines("dev_requirements"),
    },
    # Lets nbdev's documentation tools link a symbol to the notebook that explains it.
    entry_points={"nbdev": ["nanovllm=nanovllm._modidx:d"],
                  "console_scripts": ["nanovllm=nanovllm.cli:main"]},
    zip_safe=False,
)
