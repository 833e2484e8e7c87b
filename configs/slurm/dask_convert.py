"""Convert the densities of a whole Materials Project snapshot on a Slurm cluster. Run it on a login
node; it can be stopped and run again.

    pip install 'zarrcache[convert,dask]' dask-jobqueue
    python configs/slurm/dask_convert.py /shared/chgcars s3://my-bucket/densities/label --jobs 16

Each Slurm job has a Dask worker process per core; jobs are started and ended as the work requires.
All nodes have to see the sources, and the destination if it is a directory.
"""

from __future__ import annotations

import argparse
import sys
import time


def main() -> int:
    """Convert what is not converted yet; 0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="directory of CHGCAR or json.gz files")
    parser.add_argument("dst", help="directory or s3://bucket/prefix")
    parser.add_argument(
        "--jobs", type=int, default=16, help="most Slurm jobs at once [default: 16]"
    )
    parser.add_argument(
        "--cores", type=int, default=32, help="cores of a job, a worker process each [default: 32]"
    )
    parser.add_argument(
        "--memory",
        default="128 GiB",
        help="memory of a job; a material may take several GiB while it is read [default: 128 GiB]",
    )
    parser.add_argument("--walltime", default="12:00:00", help="of a job [default: 12:00:00]")
    parser.add_argument("--partition", help="Slurm partition [default: Slurm's]")
    arguments = parser.parse_args()

    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as exc:
        print(
            f"error: this script needs dask-jobqueue ({exc}). Install it: pip install "
            "'zarrcache[convert,dask]' dask-jobqueue",
            file=sys.stderr,
        )
        return 2

    from zarrcache.convert import ConvertResult, plan_convert
    from zarrcache.parallel import open_cluster

    plan = plan_convert(arguments.src, arguments.dst)
    print(
        f"{len(plan.files)} files to convert, {len(plan.skipped)} are converted already",
        file=sys.stderr,
    )
    if not plan.files:
        return 0
    done, said_s = 0, time.monotonic()

    def progress(result: ConvertResult) -> None:
        nonlocal done, said_s
        done += 1
        if result.error is not None:
            print(f"failed: {result.error}", file=sys.stderr)
        if time.monotonic() - said_s > 60:
            said_s = time.monotonic()
            print(f"{done} of {len(plan.files)}", file=sys.stderr)

    slurm = SLURMCluster(
        cores=arguments.cores,
        # a process per core: Python reads a density in one thread
        processes=arguments.cores,
        memory=arguments.memory,
        walltime=arguments.walltime,
        queue=arguments.partition,
    )
    with slurm:
        slurm.adapt(maximum_jobs=arguments.jobs)
        with open_cluster(slurm.scheduler_address) as cluster:
            report = plan.execute(progress, engine=cluster.spread)
    print(
        f"converted {len(report.converted)}, failed {len(report.failed)}, skipped "
        f"{len(report.skipped)}",
        file=sys.stderr,
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
