"""The run that is converted: its model is read when a conversion needs it."""

import functools
import itertools

from moex.analysis.record_sums import Recorded, record_sums
from moex.analysis.sums import Sums
from moex.config import base as configs
from moex.runs.base import Base, base_hash
from moex.runs.directory import RunDir
from moex.runs.open import LoadedRun, load_run
from moex.sharding import MeshConfig
from moex.train.job import Job, make_job


class Source:
    """A run directory, and what conversions look at.

    Attributes:
      folder: the run directory.
      model: its `Model` config.
      say: called with each line of news.
    """

    def __init__(self, folder: RunDir, say=print):
        self.folder, self.say = folder, say
        self.model = folder.config().model

    @functools.cached_property
    def loaded(self) -> LoadedRun:
        """The newest checkpoint of the run, on the devices that there are."""
        return load_run(self.folder, MeshConfig(), warn=self.say)

    @property
    def digest(self) -> str | None:
        """The digest of its newest checkpoint; None: it has none."""
        steps = self.folder.saved_steps()
        return Base.of(self.folder, steps[-1]).digest if steps else None

    def job(self, cfg) -> Job:
        """A job here, on the devices that there are, with the data of the run."""
        cfg = configs.from_dict(configs.to_dict(cfg))
        cfg.mesh = MeshConfig()
        with cfg.ignore_type():
            cfg.task = cfg.task.alone()
        cfg.task.like(cfg, self.folder)
        return make_job(cfg, log=self.say)

    def sums(self, sequences: int, recorded: Recorded | None = None) -> Sums:
        """The sums of the first training sequences of the run, in whole batches."""
        job = self.job(self.folder.config())
        count = -(-sequences // job.cfg.batch_size)
        self.say(f"sums of {count * job.cfg.batch_size} training sequences")
        return record_sums(
            self.loaded,
            lambda: itertools.islice(job.batches(0), count),
            domains=job.data.domains,
            data={"split": "training", "sequences": count * job.cfg.batch_size},
            recorded=recorded or Recorded(),
        )

    @property
    def base(self) -> str:
        """The hash of the names and shapes of its parameters."""
        return base_hash(self.model)
