"""Packaging: what varies stands in settings.ini, which nbdev reads too; the rest in pyproject.toml.

The README links to files of the repository. On a page of PyPI those links would lead nowhere: with
an address of the repository in settings.ini (`git_url`) they lead there, without one they are text.
"""

import re
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


def long_description(address):
    """The README with links that work on any page; `address`: of the repository, or empty."""
    def moved(link):
        text, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        return f"[{text}]({address}/blob/{settings['branch']}/{target})" if address else text

    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", moved, text)


address = settings.get("git_url", "").rstrip("/")
extras = [key.removesuffix("_requirements") for key in settings if key.endswith("_requirements")]

setup(
    version=settings["version"],
    long_description=long_description(address),
    long_description_content_type="text/markdown",
    author=settings["author"],
    keywords=settings["keywords"].split(),
    project_urls={"Source": address} if address else {},
    # Said outright, it makes an editable install a plain entry in sys.path. Otherwise setuptools
    # adds an import hook, which finds the modules of the repository inside any other copy of the
    # package too, and tools/check_days.py would not see that a day imports a later one.
    package_dir={"": "."},
    packages=find_packages(include=["nanovllm", "nanovllm.*"]),
    # The bundled checkpoint is data of the package, not a package of its own. C is compiled where
    # it runs.
    include_package_data=False,
    package_data={"nanovllm": ["demo_model/*", "py.typed"], "": ["*.c", "*.h", "*.html"]},
    install_requires=lines("requirements"),
    # `flash_attn_requirements` makes the extra flash-attn, and so on.
    extras_require={name.replace("_", "-"): lines(f"{name}_requirements") for name in extras},
    # Lets nbdev's documentation tools link a symbol to the notebook that explains it.
    entry_points={"nbdev": ["nanovllm=nanovllm._modidx:d"],
                  "console_scripts": ["nanovllm=nanovllm.cli:main"]},
    zip_safe=False,
)
