"""Draw ``zarrcache top`` while a real training runs, as an animated SVG (``tools/record``).

A server like that of ``zarrcache demo`` holds synthetic densities. A child process trains from it
for some epochs, first through an empty cache; what it prints is in the lower half. The upper half
is what ``zarrcache top`` prints, each second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from html import escape
from pathlib import Path
from typing import Any

import yaml

SAMPLES, EPOCHS, LATENCY_S = 24, 4, 0.02
ROW, TOP, LEFT, WIDE = 19, 52, 20, 560
STYLE = """
rect{fill:#f6f8fa;stroke:#d0d7de}text{fill:#1f2328;font:14px ui-monospace,SFMono-Regular,Menlo,
Consolas,monospace;white-space:pre}.dim{fill:#656d76}.dot{fill:#d0d7de;stroke:none}
@media (prefers-color-scheme:dark){rect{fill:#0d1117;stroke:#30363d}text{fill:#e6edf3}
.dim{fill:#8d96a0}.dot{fill:#30363d}}
"""


def train(path: Path) -> None:
    """The training of the recording: a plain loop, and a line for each epoch."""
    import torch
    from torch.utils.data import DataLoader

    from zarrcache import DataConfig, ZarrDataset, collate
    from zarrcache.registry import open_reader
    from zarrcache.train import LoaderMonitor

    torch.set_num_threads(1)
    dataset = ZarrDataset(open_reader(DataConfig.from_yaml(path)), "all")
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 1, 3, padding=1)
    )
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, collate_fn=collate)
    with LoaderMonitor(loader) as batches:
        for number in range(EPOCHS):
            for batch in batches:
                loss = torch.nn.functional.l1_loss(network(batch["data"]), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            times = batches.epochs[-1]
            print(
                f"epoch {number + 1}: {times.waited_s + times.worked_s:4.1f} s, waited "
                f"{times.waiting_ratio:3.0%}, {times.stats.requests:4d} requests to S3",
                flush=True,
            )


def record() -> list[list[str]]:
    """Screens, one per second: the lines of ``top``, an empty line, those of the training."""
    from zarrcache import DataConfig
    from zarrcache.cli.top import activity_lines
    from zarrcache.convert import plan_convert
    from zarrcache.demo.server import running_server
    from zarrcache.demo.synthetic import write_pairs
    from zarrcache.ops import Monitor
    from zarrcache.origin import make_s3fs

    screens: list[list[str]] = []
    with (
        tempfile.TemporaryDirectory(prefix="zarrcache-") as directory,
        running_server(latency_s=LATENCY_S) as server,
    ):
        home = Path(directory)
        ids = write_pairs(home / "files", SAMPLES)
        make_s3fs(server.s3_kwargs).mkdir("densities")
        for role in ("input", "label"):
            plan_convert(
                home / "files" / role, f"s3://densities/{role}", s3_kwargs=server.s3_kwargs
            ).execute()
        (home / "map.json").write_text(json.dumps({"GGA": ids}))
        config: dict[str, Any] = {
            "data_dir": "s3://densities/input",
            "label_dir": "s3://densities/label",
            "map_dir": str(home / "map.json"),
            "functional": "GGA",
            "train_fraction": 0.8,
            "s3_kwargs": server.s3_kwargs,
            "cache": {"dir": str(home / "cache"), "limit": "1 GiB", "min_free": 0},
        }
        path = home / "train.yaml"
        path.write_text(yaml.safe_dump(config))
        said: list[str] = []
        command = [sys.executable, __file__, "--train", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            reading = threading.Thread(target=lambda: said.extend(child.stdout or ()))
            reading.start()
            while not (home / "cache" / "zarrcache-v1").is_dir() and child.poll() is None:
                time.sleep(0.05)
            monitor = Monitor(DataConfig.from_yaml(path))
            tops: list[list[str]] = []
            while child.poll() is None:
                time.sleep(1.0)
                lines = activity_lines(monitor.read())
                if not lines[1].startswith("No process"):
                    tops.append(lines)
                    screens.append([*lines, "", *_training(said)])
            reading.join()
        if child.returncode or not tops:
            raise SystemExit(f"the training ended with {child.returncode}")
        screens[-1] = [*tops[-1], "", *_training(said)]
    return screens


def _training(said: list[str]) -> list[str]:
    return ["$ python train.py", *(line.rstrip() for line in said)]


def svg(screens: list[list[str]]) -> str:
    """One after the other, a second each and the last one for three; or the last one alone."""
    rows = 1 + max(map(len, screens))
    high, seconds = TOP + ROW * rows, len(screens) + 2
    styles, groups = [STYLE], []
    for number, lines in enumerate(screens):
        is_last = number == len(screens) - 1
        begin, end = 100 * number / seconds, 100 if is_last else 100 * (number + 1) / seconds
        ending = "" if is_last else f"{end:.3f}%,100%{{visibility:hidden}}"
        styles.append(
            f"@keyframes k{number}{{0%{{visibility:{'visible' if not number else 'hidden'}}}"
            f"{begin:.3f}%{{visibility:visible}}{ending}}}"
            f"#s{number}{{visibility:{'visible' if is_last else 'hidden'};"
            f"animation:k{number} {seconds}s step-end infinite}}"
        )
        texts = [
            f'<text x="{LEFT}" y="{TOP + ROW * (row + 1)}"{_dim(line)}>{escape(line)}</text>'
            for row, line in enumerate(lines)
            if line
        ]
        groups.append(f'<g id="s{number}">{"".join(texts)}</g>')
    styles.append("@media (prefers-reduced-motion:reduce){g{animation:none!important}}")
    dots = "".join(f'<circle class="dot" cx="{x}" cy="20" r="5"/>' for x in (22, 40, 58))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high}" width="{WIDE}" '
        f'height="{high}" role="img" aria-labelledby="t"><title id="t">zarrcache top during a '
        "training: the first epoch fetches each density from S3, later ones send no request"
        f"</title><style>{''.join(styles)}</style>"
        f'<rect x=".5" y=".5" width="{WIDE - 1}" height="{high - 1}" rx="8"/>{dots}'
        f'<text x="{LEFT}" y="{TOP}">$ zarrcache top train.yaml</text>{"".join(groups)}</svg>\n'
    )


def _dim(line: str) -> str:
    return ' class="dim"' if line.startswith(("/", " " * 20)) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/top.svg"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(arguments.train)
        return
    arguments.out.write_text(svg(record()), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
