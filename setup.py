"""How `gs2d` is packaged. Names, versions and requirements are in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
project = config["DEFAULT"]

statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature"]

setup(
    name=project["lib_name"],
    version=project["version"],
    description=project["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=project["author"],
    author_email=project["author_email"],
    url=project["git_url"],
    project_urls={"Documentation": project["doc_host"] + project["doc_baseurl"]},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=project["keywords"],
    classifiers=[
        f"Development Status :: {statuses[int(project['status']) - 1]}",
        f"Intended Audience :: {project['audience']}",
        f"Natural Language :: {project['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    packages=find_packages(include=["gs2d", "gs2d.*"]),
    package_data={"gs2d.show": ["*.js", "*.css", "*.html", "*.txt"]},
    python_requires=">=" + project["min_python"],
    install_requires=project["requirements"].split(),
    extras_require={"dev": project["dev_requirements"].split()},
    entry_points={
        "console_scripts": project["console_scripts"].split(),
        "nbdev": ["gs2d=gs2d._modidx:d"],  # lets nbdev link `names` in the docs of other projects
    },
    zip_safe=False,
)
