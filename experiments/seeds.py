"""The command line of experiments that do one seed after another."""

import argparse
import json
import pathlib
from collections.abc import Callable

import jax

from moex.json_files import read_object


def run_seeds(
    about: str,
    here: pathlib.Path,
    one_seed: Callable[[int], dict],
    table: Callable[[dict], str],
    plot: Callable[[dict], None],
) -> None:
    """Do the seeds of `--seeds`, keep each in results.json, and show all of them.

    Args:
      about: docstring of the experiment.
      here: its folder.
      one_seed: gives the results of a seed, as plain data.
      table: gives the text of all results, {"device", "seeds"}.
      plot: draws them.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cache", default="runs/programs")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    # A second start finds the programs that the first one compiled.
    jax.config.update("jax_compilation_cache_dir", args.cache)
    file = here / "results.json"
    results: dict = {}
    for seed in seeds:
        print(f"seed {seed}", flush=True)
        found = {str(seed): one_seed(seed)}
        # Other seeds stay, so that several processes can do some of them each.
        before = read_object(file)["seeds"] if file.exists() else {}
        device = jax.devices()[0].device_kind
        results = {"device": device, "seeds": dict(sorted((before | found).items()))}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    plot(results)
