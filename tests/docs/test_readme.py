"""The blocks of the README and of the page on Python run as printed; exceptions are named here with
the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.support.chgcars import SMALL
from tests.support.s3server import S3Server
from tests.support.training import zarrcache
from zarrcache.config import DataConfig
from zarrcache.demo.synthetic import write_pairs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "guides" / "python.md").read_text()
IDS = [f"mp-{n}" for n in range(1, 6)]


@dataclass(frozen=True)
class Block:
    """A fenced block of the README."""

    number: int
    language: str
    text: str


BLOCKS = [
    Block(i, m[1], m[2])
    for i, m in enumerate(
        re.finditer(r"^```(\w*)\n(.*?)^```$", README + PYTHON, re.MULTILINE | re.DOTALL)
    )
]
#: What is not run here, and what runs it instead.
ELSEWHERE = {
    "tools/demo\ntools/test\n": "tools/demo is what tests/docs/test_demo.py runs; tools/test is "
    "what runs this",
    "pip install "
    "'.[convert,train]'\n": "tools/_venv.sh installs the extra; test_extras_exist looks for it",
}
COMMANDS = [b for b in BLOCKS if b.language == "bash" and b.text not in ELSEWHERE]
SCRIPTS = [b for b in BLOCKS if b.language == "python"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Path:
    """A user's directory: configs, densities and a map, with the bucket that the configs name."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "configs", home / "configs")
    made = home / "made"
    for task_id, name in zip(IDS, write_pairs(made, len(IDS), seed=SMALL), strict=True):
        for role in ("input", "label"):
            (home / "chgcars" / role).mkdir(parents=True, exist_ok=True)
            (made / role / f"{name}.CHGCAR").rename(home / "chgcars" / role / f"{task_id}.CHGCAR")
    (config,) = [block.text for block in BLOCKS if block.language == "yaml"]
    (home / "train.yaml").write_text(config)
    s3_server.client().create_bucket(Bucket="my-bucket")
    return home


def _run(command: list[str], home: Path, server: S3Server) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_ENDPOINT_URL_S3": server.endpoint_url,
        "ZARRCACHE_DIR": str(home / "scratch"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout}\n{done.stderr}"
    return done


def test_every_block_and_command_of_the_readme_works_in_its_order(
    home: Path, s3_server: S3Server
) -> None:
    """Convert, warm, status, train, crops, a custom loader: from top to bottom."""
    assert [b for b in BLOCKS if b in COMMANDS or b in SCRIPTS] == COMMANDS + SCRIPTS
    for block in COMMANDS:
        _run(["bash", "-euo", "pipefail", "-c", block.text], home, s3_server)
    # Each as a program of its own, with its own names, in one process that imports PyTorch once.
    # Below a function's guard, as a script has to be whose DataLoader starts processes; here they
    # are forked.
    for block in SCRIPTS:
        (home / f"block_{block.number}.py").write_text(block.text)
    run = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path, run_name='__main__')"
    _run([sys.executable, "-c", run, *(f"block_{b.number}.py" for b in SCRIPTS)], home, s3_server)


def test_no_block_is_forgotten() -> None:
    """A block in another language, or an excuse for a block that no longer exists, fails."""
    assert {b.language for b in BLOCKS} == {"bash", "python", "yaml"}
    assert ELSEWHERE.keys() <= {b.text for b in BLOCKS}
    assert len(COMMANDS) == 1
    assert len(SCRIPTS) == 5


def test_the_yaml_of_the_readme_is_a_config_of_eight_lines() -> None:
    (block,) = [b for b in BLOCKS if b.language == "yaml"]
    assert block.text.count("\n") == 8
    config = DataConfig.of(yaml.safe_load(block.text))
    assert config.cache is not None
    assert config.cache.limit == 200 * 1024**3


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 110
    assert max(len(line) for line in README.splitlines() if not line.startswith(("|", "!"))) <= 150


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`zarrcache ([a-z]+)", README))))
def test_every_verb_of_the_readme_has_help(verb: str) -> None:
    done = zarrcache(verb, "--help")
    assert done.code == 0, done.err
    assert "Usage" in done.out


def test_every_file_the_readme_names_is_there() -> None:
    """Links, and the tests behind the promises."""
    names = set(re.findall(r"\]\(([\w./-]+)\)", README)) | set(
        re.findall(r"`((?:tests|tools|docs|configs)/[\w./-]+)`", README)
    )
    assert {n for n in names if not (ROOT / n).exists()} == set()


def test_every_message_and_page_says_in_one_way_how_to_install_an_extra() -> None:
    """Quoted, because a shell may expand brackets; extras that exist; after "Install it:"."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    sources = [*(ROOT / "configs").rglob("*.py"), *(ROOT / "zarrcache").rglob("*.py")]
    named = set()
    for path in [*files, *sources]:
        text = path.read_text()
        if path in sources:  # strings that go on in the next line
            text = re.sub(r'"\n\s*f?"', "", text)
        for match in re.finditer(r"(\S+ \S+) +pip install (\S+)", text):
            before, what = match.groups()
            quoted = re.fullmatch(r"'(?:zarrcache|\.)\[([a-z,]+)\]'\W*", what)
            if quoted is None:
                assert what.strip('",') == "zarrcache", (path, what)
                continue
            assert set(quoted[1].split(",")) <= extras.keys(), (path, what)
            named |= {*quoted[1].split(",")}
            if path in sources and "#" not in before and '"""' not in before:
                assert before.startswith("Install") or "(" in before, (path, before)
    assert named >= {"convert", "train", "lightning", "dask", "metrics", "plot", "demo"}


@pytest.mark.parametrize("name", re.findall(r"\((docs/images/\S+)\)", README))
def test_the_pictures_are_light_and_need_no_network(name: str) -> None:
    """GitHub shows nothing that an SVG would load from elsewhere."""
    raw = (ROOT / name).read_text()
    assert len(raw) < 100_000
    assert not re.findall(r"(?:href=|url\(|@import|src=)[\"']?+(?!#)", raw)
    assert ElementTree.fromstring(raw).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme" in raw or "fill: #fbfbfd" in raw  # a background of its own
